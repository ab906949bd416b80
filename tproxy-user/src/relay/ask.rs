//! Flows that the kernel could not decide over: their name is found in the client's first
//! bytes, which stay where they are, and the rules that ask for names decide.

use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::sniff::{self, Sniffed};
use crate::sockopt;

/// How long a client may send nothing before it is taken for one that waits for its server to
/// speak first. A client's first bytes follow its acknowledgement at once; what is
/// lost is sent again after 200 ms at the least (Linux's `TCP_RTO_MIN`).
const PATIENCE: Duration = Duration::from_millis(300);

/// How long all of it may take: a client that sends byte after byte gets no further.
const LONGEST: Duration = Duration::from_secs(2);

/// The name that a connection is for; `None`: none is to be seen.
///
/// # Errors
///
/// The connection broke, or cannot be looked at.
pub(super) async fn name(stream: &TcpStream) -> io::Result<Option<String>> {
    // By a descriptor of its own: what is waited for here would else be missed by who reads then.
    let watched = sockopt::watch(stream.as_fd().try_clone_to_owned()?)?;
    let mut bytes = vec![0; sniff::MOST];
    let mut length = 0;
    let end = Instant::now() + LONGEST;
    loop {
        let patience = end.min(Instant::now() + PATIENCE);
        let Ok(ready) = timeout_at(patience, watched.readable()).await else { return Ok(None) };
        let mut ready = ready?;
        let closed = ready.ready().is_read_closed();
        let more = ready.try_io(|socket| {
            let seen = sockopt::peek(socket.as_fd(), &mut bytes)?;
            // What has been seen stays, so it is readable still; but it is to be waited for more.
            if seen > length { Ok(seen) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match more {
            Ok(seen) => length = seen?,
            Err(_nothing_new) if closed => return Ok(None),
            Err(_nothing_new) => continue,
        }
        match sniff::stream(&bytes[..length]) {
            Sniffed::Name(name) => return Ok(Some(name)),
            Sniffed::Nothing => return Ok(None),
            Sniffed::More => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n";

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.expect("connected"), accepted.expect("accepted").0)
    }

    /// What can be read then, after all of it was looked at.
    async fn rest(mut server: TcpStream, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        server.read_exact(&mut bytes).await.expect("as many bytes as were sent");
        bytes
    }

    #[tokio::test]
    async fn bytes_that_come_in_parts_are_seen_and_stay() {
        let (mut client, server) = connection().await;
        let send = async {
            for part in REQUEST.chunks(7) {
                client.write_all(part).await.expect("sent");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let (name, ()) = tokio::join!(name(&server), send);
        assert_eq!(name.expect("open"), Some("www.example.org".to_owned()));
        assert_eq!(rest(server, REQUEST.len()).await, REQUEST);
    }

    #[tokio::test]
    async fn who_waits_or_stops_has_no_name() {
        for (sent, ends) in [(&b""[..], false), (&REQUEST[..20], false), (&REQUEST[..20], true)] {
            let (mut client, server) = connection().await;
            client.write_all(sent).await.expect("sent");
            if ends {
                client.shutdown().await.expect("shut down");
            }
            let begun = Instant::now();
            assert_eq!(name(&server).await.expect("open"), None);
            assert!(begun.elapsed() < PATIENCE * 2);
            assert!(!ends || begun.elapsed() < PATIENCE, "an end is no reason to wait");
            assert_eq!(rest(server, sent.len()).await, sent);
        }
    }
}

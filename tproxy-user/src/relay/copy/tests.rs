//! Between sockets on the loopback device, which needs no privilege.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

const LONG: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_millis(100);

/// A connection as its peer and the relay hold it.
pub(super) async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a listener");
    let addr = listener.local_addr().expect("its address");
    let (ours, theirs) = tokio::join!(listener.accept(), TcpStream::connect(addr));
    (theirs.expect("a connection"), ours.expect("a connection").0)
}

/// Runs `ends` with client and server while the relay copies between them.
async fn between<T>(
    patience: Patience,
    ends: impl AsyncFnOnce(TcpStream, TcpStream) -> T,
) -> (T, Ending, Traffic) {
    let (client, client_side) = connection().await;
    let (server, upstream_side) = connection().await;
    for side in [&client_side, &upstream_side] {
        socket2::SockRef::from(side).set_out_of_band_inline(true).expect("an open socket");
    }
    let (client_side, upstream_side) = (Wire::Plain(client_side), Wire::Plain(upstream_side));
    let (pool, traffic) = (Pool::default(), Traffic::default());
    let totals = (Value::default(), Value::default());
    let copying = async {
        let totals = (&totals.0, &totals.1);
        let outcome = copy(&client_side, &upstream_side, &pool, &patience, &traffic, totals).await;
        let Outcome::Ended(ending) = outcome else { panic!("quiet") };
        if ending != Ending::Closed {
            sockopt::reset_on_close(client_side.socket());
            sockopt::reset_on_close(upstream_side.socket());
        }
        drop((client_side, upstream_side));
        ending
    };
    let (ending, result) = tokio::join!(copying, ends(client, server));
    assert_eq!((totals.0.get(), totals.1.get()), (traffic.up.get(), traffic.down.get()));
    (result, ending, traffic)
}

const PATIENT: Patience = Patience { idle: LONG, half_close: LONG };

async fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.map(|_| bytes)
}

#[tokio::test]
async fn closing_one_direction_leaves_the_other() {
    let data = vec![7; 3_000_000];
    let ((), ending, traffic) = between(PATIENT, async |mut client, mut server| {
        let upload = async {
            client.write_all(&data).await.expect("an open direction");
            client.shutdown().await.expect("an open direction");
        };
        let (got, ()) = tokio::join!(read_all(&mut server), upload);
        assert!(got.is_ok_and(|got| got == data));
        server.write_all(b"thanks").await.expect("the other is still open");
        drop(server);
        assert_eq!(read_all(&mut client).await.ok().as_deref(), Some(&b"thanks"[..]));
    })
    .await;
    assert_eq!(ending, Ending::Closed);
    assert_eq!((traffic.up.get(), traffic.down.get()), (3_000_000, 6));
}

#[tokio::test]
async fn reset_comes_after_the_bytes_before_it() {
    let ((), ending, _) = between(PATIENT, async |mut client, mut server| {
        server.write_all(b"bye").await.expect("an open direction");
        sockopt::reset_on_close(&server);
        drop(server);
        let mut bytes = [0; 3];
        client.read_exact(&mut bytes).await.expect("what came first");
        let error = client.read(&mut [0]).await.expect_err("no orderly end");
        assert_eq!((bytes, error.kind()), (*b"bye", io::ErrorKind::ConnectionReset));
    })
    .await;
    assert_eq!(ending, Ending::Reset(Side::Upstream));
}

#[tokio::test]
async fn reset_after_a_half_close_is_noticed() {
    let ((), ending, _) = between(PATIENT, async |mut client, mut server| {
        client.shutdown().await.expect("an open direction");
        assert_eq!(read_all(&mut server).await.ok().as_deref(), Some(&[][..]));
        // Nobody reads from the client any more, and nothing is written to it.
        sockopt::reset_on_close(&client);
        drop(client);
        reset(&server).await;
    })
    .await;
    assert_eq!(ending, Ending::Reset(Side::Client));
}

#[tokio::test]
async fn quiet_connections_end() {
    let patience = Patience { idle: SHORT, half_close: LONG };
    let (begun, ending, _) = between(patience, async |mut client, mut server| {
        let begun = Instant::now();
        assert!(client.read(&mut [0]).await.is_err());
        assert!(server.read(&mut [0]).await.is_err());
        begun
    })
    .await;
    assert_eq!(ending, Ending::Idle);
    assert!(begun.elapsed() >= SHORT);

    let patience = Patience { idle: LONG, half_close: SHORT };
    let ((), ending, _) = between(patience, async |mut client, mut server| {
        client.shutdown().await.expect("an open direction");
        assert_eq!(server.read(&mut [0]).await.ok(), Some(0));
        assert!(client.read(&mut [0]).await.is_err());
    })
    .await;
    assert_eq!(ending, Ending::HalfClosed);
}

#[tokio::test]
async fn urgent_data_passes_in_a_bulk_transfer() {
    let data = vec![7; 1_000_000];
    let ((), ending, _) = between(PATIENT, async |mut client, mut server| {
        let upload = async {
            for _ in 0..3 {
                client.write_all(&data).await.expect("an open direction");
                let urgent = socket2::SockRef::from(&client).send_out_of_band(b"!");
                assert_eq!(urgent.ok(), Some(1), "there was no room");
            }
            // Nothing follows the last: whoever stops before it is not woken again.
            client
        };
        socket2::SockRef::from(&server).set_out_of_band_inline(true).expect("an open socket");
        let mut got = vec![0; 3 * (data.len() + 1)];
        let (read, client) = tokio::join!(server.read_exact(&mut got), upload);
        assert_eq!(read.ok(), Some(got.len()));
        assert!(got.chunks(data.len() + 1).all(|part| part.ends_with(&[7, b'!'])));
        drop(client);
    })
    .await;
    assert_eq!(ending, Ending::Closed);
}

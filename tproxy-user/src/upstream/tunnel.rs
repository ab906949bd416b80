//! A connection to a proxy server becomes one to the destination.

use std::io;
use std::net::SocketAddr;

use super::destination::Destination;
use super::socks5::{self, Command, Handshake, Step};
use super::{Cause, ConnectError, http};
use crate::config::upstream::{Credentials, Protocol, Proxy};
use crate::sockopt;
use crate::wire::Wire;

/// Asks the server at the other end for a connection to `to`. Not a byte is read of what the
/// destination says.
///
/// # Errors
/// [`ConnectError`]: of the destination, or with [`Reason::Proxy`](super::Reason::Proxy) of the server.
pub(super) async fn connect(wire: &Wire, proxy: &Proxy, to: Destination<'_>) -> Result<(), ConnectError> {
    let credentials = proxy.credentials.as_ref();
    match proxy.protocol {
        Protocol::Socks5 => socks5(wire, proxy, Command::Connect(to)).await.map(drop),
        Protocol::Http => http(wire, to, credentials).await,
    }
}

/// Says what goes before a request, to see whether the server is there.
///
/// # Errors
/// As [`connect`], of the server.
pub(super) async fn greet(wire: &Wire, proxy: &Proxy) -> Result<(), ConnectError> {
    let credentials = proxy.credentials.as_ref();
    match proxy.protocol {
        Protocol::Socks5 => socks5(wire, proxy, Command::Nothing).await.map(drop),
        Protocol::Http => {
            let request = http::options(&proxy.url(), credentials);
            converse(wire, &request, |head| http::answer(head, credentials.is_some())).await.map(drop)
        }
    }
}

/// Has a SOCKS5 handshake; the server's own address for what was asked for.
///
/// # Errors
/// As [`connect`].
pub(super) async fn socks5(
    wire: &Wire,
    proxy: &Proxy,
    command: Command<'_>,
) -> Result<Option<SocketAddr>, ConnectError> {
    let mut buffer = [0; socks5::LONGEST];
    let (mut handshake, first) = Handshake::new(command, proxy.credentials.as_ref(), proxy.pipelined);
    wire.write_all(&first).await.map_err(broken)?;
    loop {
        let piece = &mut buffer[..handshake.wants()];
        wire.read_exact(piece).await.map_err(broken)?;
        match handshake.receive(piece)? {
            Step::Read => {}
            Step::Send(bytes) => wire.write_all(&bytes).await.map_err(broken)?,
            Step::Done(bound) => return Ok(bound),
        }
    }
}

async fn http(
    wire: &Wire,
    to: Destination<'_>,
    credentials: Option<&Credentials>,
) -> Result<(), ConnectError> {
    let request = http::request(to, credentials);
    let head = converse(wire, &request, |head| http::response(head, credentials.is_some())).await?;
    // The head was looked at; now it is taken: behind it the tunnel begins.
    let mut taken = vec![0; head];
    wire.read_exact(&mut taken).await.map(drop).map_err(broken)
}

/// Sends a request and looks at what comes until `whole` says how long the head is. It is left
/// where it is.
async fn converse(
    wire: &Wire,
    request: &[u8],
    whole: impl Fn(&[u8]) -> Result<Option<usize>, http::Violation>,
) -> Result<usize, ConnectError> {
    wire.write_all(request).await.map_err(broken)?;
    let mut buffer = vec![0; http::LONGEST];
    let mut seen = 0;
    loop {
        let length = wire.peek(seen, &mut buffer).await.map_err(broken)?;
        if length <= seen {
            return Err(ConnectError::of_proxy(Cause::Closed));
        }
        seen = length;
        if let Some(head) = whole(&buffer[..seen])? {
            return Ok(head);
        }
    }
}

/// The server hangs up, or cannot be spoken with any more.
pub(super) fn broken(error: io::Error) -> ConnectError {
    if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return ConnectError::of_proxy(Cause::Tls(error.clone()));
    }
    let hangs_up = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::WouldBlock
    );
    if hangs_up {
        return ConnectError::of_proxy(Cause::Closed);
    }
    ConnectError::of_proxy(sockopt::SocketError { call: "read or write", source: error }.into())
}

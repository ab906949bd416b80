//! What the kernel tells of addresses.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Type};

use super::{Call, OwnMark, SocketError, marked};

/// This host's address towards another one, by its routes. Nothing is sent.
///
/// # Errors
/// [`SocketError`]: no descriptor left, no route.
pub fn address_towards(peer: SocketAddr, mark: OwnMark) -> Result<IpAddr, SocketError> {
    let socket = marked(Domain::for_address(peer), Type::DGRAM, Protocol::UDP, mark)?;
    socket.connect(&peer.into()).call("connect")?;
    let here = socket.local_addr().call("getsockname")?.as_socket();
    here.map(|here| here.ip()).ok_or(io::Error::from(io::ErrorKind::InvalidData)).call("getsockname")
}

/// Whether an address is this host's: an ordinary socket can be bound to it.
#[must_use]
pub fn is_local(addr: SocketAddr) -> bool {
    UdpSocket::bind((addr.ip(), 0)).is_ok()
}

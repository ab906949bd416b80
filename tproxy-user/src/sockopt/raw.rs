//! Sockets that send whole packets.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockFilter, Type};

use super::datagram::{SHARED_BUFFER, allow_fragments};
use super::{Call, OwnMark, SocketError, marked, transparent};

/// A raw socket that sends packets of a protocol from any address and receives nothing.
///
/// The kernel would copy every such packet of the host to it. Two things keep it
/// from that: it is bound to an address to which nothing is sent (the copy is not
/// even made), and a filter drops all.
///
/// # Errors
/// [`SocketError`]: `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`, `EAFNOSUPPORT`
/// where the family is off.
pub fn raw_sender(v6: bool, protocol: Protocol, mark: OwnMark) -> Result<OwnedFd, SocketError> {
    /// `BPF_RET | BPF_K`: keep as many bytes as the constant says, which is none.
    const DROP_ALL: u16 = 0x06;
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = marked(domain, Type::RAW, protocol, mark)?;
    socket.attach_filter(&[SockFilter::new(DROP_ALL, 0, 0, 0)]).call("setsockopt SO_ATTACH_FILTER")?;
    transparent(&socket, v6)?;
    allow_fragments(&socket, v6)?;
    setsockopt(&socket, sockopt::SndBufForce, &SHARED_BUFFER).call("setsockopt SO_SNDBUFFORCE")?;
    // 127/8's last address but one is nobody's, 100::/64 is the discard prefix (RFC 6666).
    let nowhere: SocketAddr = if v6 {
        (Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1), 0).into()
    } else {
        (Ipv4Addr::new(127, 255, 255, 254), 0).into()
    };
    socket.bind(&nowhere.into()).call("bind")?;
    Ok(socket.into())
}

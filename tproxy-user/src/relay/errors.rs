//! Errors of upstream UDP sockets: what ICMP said about a datagram that was
//! sent earlier. The kernel queues them beside the datagrams (`IP_RECVERR`,
//! ip(7)), within the bound of the receive buffer.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg};

use super::receive::socket_addr;
use crate::addr::OrigDst;

/// Bytes of a datagram that an ICMP error can quote to a client, in either
/// family; see [`icmp`](super::icmp).
pub(crate) const QUOTE: usize = 1280;

/// `SO_EE_ORIGIN_ICMP` and `SO_EE_ORIGIN_ICMP6` (`include/uapi/linux/errqueue.h`).
const FROM_ICMP: [u8; 2] = [2, 3];

/// `SO_EE_ORIGIN_LOCAL`.
const FROM_KERNEL: u8 = 1;
const TOO_LONG: u32 = libc::EMSGSIZE as u32;

/// An ICMP error about a datagram of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IcmpError {
    /// Who sent the error.
    pub(crate) offender: IpAddr,
    /// Its ICMP type.
    pub(crate) kind: u8,
    /// Its ICMP code.
    pub(crate) code: u8,
    /// MTU or pointer, by the type; else 0.
    pub(crate) info: u32,
}

/// An entry of the error queue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Queued {
    /// An ICMP error.
    Icmp {
        /// Where the datagram was sent to.
        destination: OrigDst,
        /// What ICMP said of it.
        error: IcmpError,
        /// Bytes of its payload in the buffer: what the error quoted.
        len: usize,
    },
    /// The kernel itself refused a datagram that must not be fragmented.
    TooLong {
        /// The most that fits, in bytes of an IP packet.
        mtu: u32,
    },
    /// Neither: nothing for a client.
    Other,
}

/// Takes one error from a socket's queue; `WouldBlock` where there is none.
pub(crate) fn receive(socket: BorrowedFd<'_>, quote: &mut [u8]) -> io::Result<Queued> {
    // The traffic class stands before the error.
    let mut control = nix::cmsg_space!(libc::c_int, libc::sock_extended_err, libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(quote)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    // The kernel's own errors are about no address.
    let destination = message.address.as_ref().and_then(socket_addr);
    let queued = message.cmsgs()?.find_map(|control| {
        let (error, offender): (_, SocketAddr) = match control {
            ControlMessageOwned::Ipv4RecvErr(error, Some(offender)) => {
                (error, SocketAddrV4::from(SockaddrIn::from(offender)).into())
            }
            ControlMessageOwned::Ipv6RecvErr(error, Some(offender)) => {
                (error, SocketAddrV6::from(SockaddrIn6::from(offender)).into())
            }
            _ => return None,
        };
        if error.ee_origin == FROM_KERNEL && error.ee_errno == TOO_LONG {
            return Some(Queued::TooLong { mtu: error.ee_info });
        }
        let destination = destination.filter(|_| FROM_ICMP.contains(&error.ee_origin))?.into();
        let (offender, info) = (offender.ip(), error.ee_info);
        let error = IcmpError { offender, kind: error.ee_type, code: error.ee_code, info };
        Some(Queued::Icmp { destination, error, len: message.bytes })
    });
    Ok(queued.unwrap_or(Queued::Other))
}

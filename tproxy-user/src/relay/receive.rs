//! Receives datagrams together with what their headers say: original destination, traffic class.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg};

use super::send::TrafficClass;
use crate::addr::OrigDst;

/// Where received datagrams go: longer than any UDP payload, so nothing is ever cut.
pub(crate) const BUFFER: usize = 1 << 16;

/// What came with a datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes of payload in the buffer; zero is a datagram like any other.
    pub(crate) len: usize,
    /// Who sent it.
    pub(crate) sender: SocketAddr,
    /// Where to; None where the kernel did not tell, as it tells listeners alone.
    pub(crate) destination: Option<OrigDst>,
    /// With which traffic class.
    pub(crate) class: TrafficClass,
}

/// Receiver with room for the control messages, so that a datagram costs no allocation.
#[derive(Debug)]
pub(crate) struct Receiver {
    control: Vec<u8>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self { control: nix::cmsg_space!(libc::sockaddr_in6, libc::c_int) }
    }

    /// Takes one datagram, if there is one.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
        let mut parts = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut self.control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let sender = message.address.as_ref().and_then(socket_addr).ok_or(io::ErrorKind::InvalidData)?;
        let mut received =
            Received { len: message.bytes, sender, destination: None, class: TrafficClass::default() };
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::Ipv4OrigDstAddr(addr) => {
                    let destination = SocketAddr::from(SocketAddrV4::from(SockaddrIn::from(addr)));
                    received.destination = Some(destination.into());
                }
                ControlMessageOwned::Ipv6OrigDstAddr(addr) => {
                    let destination = SocketAddr::from(SocketAddrV6::from(SockaddrIn6::from(addr)));
                    received.destination = Some(destination.into());
                }
                ControlMessageOwned::Ipv4Tos(class) => received.class = TrafficClass(class),
                // One byte of the header in an int.
                ControlMessageOwned::Ipv6TClass(class) => {
                    received.class = TrafficClass(class.to_le_bytes()[0]);
                }
                _ => {}
            }
        }
        Ok(received)
    }
}

pub(super) fn socket_addr(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}

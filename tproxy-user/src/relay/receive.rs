//! Receives datagrams together with their original destination.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg};

use crate::addr::{ClientAddr, OrigDst};

/// Where received datagrams go: longer than any UDP payload, so nothing is ever cut.
pub(crate) const BUFFER: usize = 1 << 16;

/// What came with a datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes of payload in the buffer; zero is a datagram like any other.
    pub(crate) len: usize,
    /// Who sent it.
    pub(crate) client: ClientAddr,
    /// Where to; None where the kernel did not tell.
    pub(crate) destination: Option<OrigDst>,
}

/// Receiver with room for the control messages, so that a datagram costs no allocation.
#[derive(Debug)]
pub(crate) struct Receiver {
    control: Vec<u8>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self { control: nix::cmsg_space!(libc::sockaddr_in6) }
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
        let client = message.address.as_ref().and_then(socket_addr).ok_or(io::ErrorKind::InvalidData)?;
        let destination = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4OrigDstAddr(addr) => {
                Some(SocketAddr::from(SocketAddrV4::from(SockaddrIn::from(addr))))
            }
            ControlMessageOwned::Ipv6OrigDstAddr(addr) => {
                Some(SocketAddr::from(SocketAddrV6::from(SockaddrIn6::from(addr))))
            }
            _ => None,
        });
        Ok(Received {
            len: message.bytes,
            client: client.into(),
            destination: destination.map(OrigDst::from),
        })
    }
}

pub(super) fn socket_addr(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}

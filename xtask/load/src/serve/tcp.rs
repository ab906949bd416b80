//! The server's TCP connections.

use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, recv, send};

use super::Counters;
use crate::{CHUNK, MESSAGE};

/// What a port does.
#[derive(Clone, Copy)]
pub(super) enum Service {
    Echo,
    Sink,
    Source,
}

/// Bytes that one call may throw away.
const DISCARDED: usize = 4 << 20;

/// What all connections read into and write from.
pub(super) struct Buffers {
    received: Vec<u8>,
    zeros: Vec<u8>,
}

/// An accepted connection.
pub(super) struct Connection {
    /// It may block, as each call that is made does not: that saves one to say so.
    stream: TcpStream,
    service: Service,
    /// Bytes of the request that has begun.
    request: usize,
}

impl Service {
    /// What it waits for.
    pub(super) fn events(self) -> EpollFlags {
        match self {
            Self::Echo | Self::Sink => EpollFlags::EPOLLIN,
            Self::Source => EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP,
        }
    }
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self { received: vec![0; DISCARDED], zeros: vec![0; CHUNK] }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    pub(super) fn new(stream: TcpStream, service: Service) -> Self {
        Self { stream, service, request: 0 }
    }

    /// Handles an event; false once the connection is over.
    pub(super) fn advance(&mut self, buffers: &mut Buffers, counters: &mut Counters) -> bool {
        let moved = match self.service {
            Service::Echo => self.echo(buffers, counters),
            Service::Sink => self.discard(buffers, counters),
            Service::Source => self.write(&buffers.zeros, counters),
        };
        match moved {
            Ok(bytes) => bytes > 0,
            Err(error) => error == Errno::EAGAIN,
        }
    }

    fn echo(&mut self, buffers: &mut Buffers, counters: &mut Counters) -> nix::Result<usize> {
        // As much as there are zeros to answer with.
        let room = &mut buffers.received[..CHUNK - MESSAGE];
        let received = recv(self.stream.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT)?;
        counters.tcp_received_bytes += received as u64;
        let bytes = self.request + received;
        self.request = bytes % MESSAGE;
        let response = bytes - self.request;
        // A client that does not read its responses is not waited for.
        if response > 0 && self.write(&buffers.zeros[..response], counters)? < response {
            return Err(Errno::ENOBUFS);
        }
        Ok(received)
    }

    fn discard(&mut self, buffers: &mut Buffers, counters: &mut Counters) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let received = recv(self.stream.as_raw_fd(), &mut buffers.received, flags)?;
        counters.tcp_received_bytes += received as u64;
        Ok(received)
    }

    fn write(&self, bytes: &[u8], counters: &mut Counters) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = send(self.stream.as_raw_fd(), bytes, flags)?;
        counters.tcp_sent_bytes += sent as u64;
        Ok(sent)
    }
}

//! The server's UDP ports.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::Socket;

use super::Counters;
use crate::mmsg::Batch;

/// Datagrams of one call.
const BATCH: usize = 64;

/// See [`Sink::advance`].
const NAP: Duration = Duration::from_micros(500);

/// Room for the longest datagram; not a power of two, as then all of a batch would share few
/// lines of the cache.
const LONGEST: usize = 65_536 + 64;

/// Sends each datagram back, from the address that it was sent to.
pub(super) struct Echo {
    socket: Socket,
    batch: Batch,
}

/// Counts datagrams.
pub(super) struct Sink {
    socket: Socket,
    batch: Batch,
}

impl AsFd for Echo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Echo {
    pub(super) fn new(socket: Socket, is_v6: bool) -> Result<Self> {
        if is_v6 {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true).context("IPV6_RECVPKTINFO")?;
            // The answer may leave from an address that only a route makes local.
            socket.set_freebind_v6(true).context("IPV6_FREEBIND")?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).context("IP_PKTINFO")?;
        }
        Ok(Self { socket, batch: Batch::new(BATCH, LONGEST) })
    }

    pub(super) fn advance(&mut self, expected: Option<IpAddr>, counters: &mut Counters) -> Result<()> {
        let count = received(self.batch.receive(&self.socket, 0))?;
        for index in 0..count {
            counters.count_foreign(expected, self.batch.sender(index));
        }
        let mut next = 0;
        while next < count {
            match self.batch.send(&self.socket, next..count) {
                Ok(sent) => {
                    counters.udp_echoed += sent as u64;
                    next += sent;
                }
                // Whoever sent it waits in vain, and the others have theirs.
                Err(_) => next += 1,
            }
        }
        Ok(())
    }
}

impl Sink {
    pub(super) fn new(socket: Socket) -> Result<Self> {
        // What was sent as one piece (`UDP_SEGMENT`) is not cut where nobody reads it.
        setsockopt(&socket, sockopt::UdpGroSegment, &true).context("UDP_GRO")?;
        Ok(Self { socket, batch: Batch::new(BATCH, 1) })
    }

    /// Counts a batch, and lets datagrams gather in its buffer where that was all: to wake the
    /// server for each would cost their sender more than all the rest.
    pub(super) fn advance(&mut self, expected: Option<IpAddr>, counters: &mut Counters) -> Result<()> {
        if !self.count(expected, counters)? {
            thread::sleep(NAP);
        }
        Ok(())
    }

    /// Counts a batch; tells whether there may be more.
    pub(super) fn count(&mut self, expected: Option<IpAddr>, counters: &mut Counters) -> Result<bool> {
        let count = received(self.batch.receive(&self.socket, libc::MSG_TRUNC))?;
        for index in 0..count {
            counters.udp_received += u64::from(self.batch.merged(index));
            counters.udp_received_bytes += u64::from(self.batch.length(index));
            counters.count_foreign(expected, self.batch.sender(index));
        }
        Ok(count == BATCH)
    }
}

fn received(result: io::Result<usize>) -> Result<usize> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        result => result.context("cannot receive datagrams"),
    }
}

//! A socket map: what a socket receives, a program sends from its peer, before any process is woken
//! (`sk_skb` verdict, `net/core/skmsg.c` of the kernel). Nothing of it passes through this process
//! but the ends.
//!
//! What is received is acknowledged at once, however slowly the peer takes it: the kernel holds all
//! that lies between. A client that has ended its direction before it is accepted cannot be relayed:
//! a map takes only sockets whose both directions are open (`sock_map_sk_state_allowed`).

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use libc::tcp_info;
use nix::sys::epoll::EpollFlags;
use socket2::Socket;

use crate::bpf::{self, SocketHash};
use crate::events::Mover;

/// Sockets at one time.
const SOCKETS: u32 = 4096;

/// How often to look whether all is on its way, after an end.
const PAUSE: Duration = Duration::from_millis(1);

pub(crate) struct Maps {
    /// Those whose bytes the program has, by their own cookies.
    sources: SocketHash,
    /// Those it sends from, by the cookies of the sources.
    targets: SocketHash,
}

pub(crate) struct Sockmap<'a> {
    maps: &'a Maps,
    joined: bool,
}

impl Maps {
    pub(crate) fn new() -> Result<Self> {
        let new = || SocketHash::new(SOCKETS).context("a socket map");
        let (sources, targets) = (new()?, new()?);
        bpf::attach_verdict(&sources, &targets).context("the program of the socket map")?;
        Ok(Self { sources, targets })
    }

    fn join(&self, from: &Socket, to: &Socket) -> io::Result<()> {
        let cookie = from.cookie()?;
        // In this order: the program drops what has no target yet.
        self.targets.put(cookie, to)?;
        self.sources.put(cookie, from)
    }
}

impl<'a> Sockmap<'a> {
    pub(crate) fn new(maps: &'a Maps) -> Self {
        Self { maps, joined: false }
    }
}

impl Mover for Sockmap<'_> {
    /// No others: of bytes that come, or go, nobody needs to be told.
    const EVENTS: EpollFlags = EpollFlags::EPOLLRDHUP;

    fn step(&mut self, from: &Socket, to: &Socket) -> io::Result<bool> {
        if !self.joined {
            self.maps.join(from, to)?;
            self.joined = true;
        }
        // This also hands to the program what was received before it was there, which a read that is
        // no peek would count as unread afterwards (`tcp_bpf_recvmsg_parser`, Linux 6.4).
        if from.peek(&mut [MaybeUninit::uninit()])? != 0 {
            return Err(io::Error::new(ErrorKind::InvalidData, "a byte has passed by the socket map"));
        }
        // The end has been received, and counts as a byte. The program's sends may be under way
        // still, in a kernel thread which says nothing of its progress.
        if let Some(error) = to.take_error()? {
            return Err(error);
        }
        let more = info(from)?.tcpi_bytes_received > written(&info(to)?) + 1;
        if more {
            thread::sleep(PAUSE);
        }
        Ok(more)
    }
}

/// Bytes that were sent, or wait to be.
fn written(info: &tcp_info) -> u64 {
    info.tcpi_bytes_sent - info.tcpi_bytes_retrans + u64::from(info.tcpi_notsent_bytes)
}

/// `TCP_INFO`.
fn info(socket: &Socket) -> io::Result<tcp_info> {
    let mut got = MaybeUninit::<tcp_info>::zeroed();
    let mut size = libc::socklen_t::try_from(size_of::<tcp_info>()).map_err(io::Error::other)?;
    let (fd, into) = (socket.as_raw_fd(), got.as_mut_ptr().cast());
    // SAFETY: the kernel writes no more than `size` bytes, which `got` has.
    let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has only numbers, for which zeros do too, where the kernel wrote none.
    Ok(unsafe { got.assume_init() })
}

//! epoll.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Events that one call takes.
const EVENTS: usize = 256;

/// An epoll instance.
pub(crate) struct Poller(Epoll);

impl Poller {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?))
    }

    /// Room for the events of one [`wait`](Self::wait).
    pub(crate) fn room() -> Vec<EpollEvent> {
        vec![EpollEvent::empty(); EVENTS]
    }

    /// Watches a descriptor until it is closed.
    pub(crate) fn add(&self, fd: impl AsFd, key: usize, events: EpollFlags) -> Result<()> {
        self.0.add(fd, EpollEvent::new(events, key as u64)).context("epoll_ctl")
    }

    /// Waits for events, for this time at most.
    pub(crate) fn wait<'a>(
        &self,
        room: &'a mut [EpollEvent],
        limit: Option<Duration>,
    ) -> Result<impl Iterator<Item = usize> + use<'a>> {
        let limit = limit
            .map_or(EpollTimeout::NONE, |limit| EpollTimeout::try_from(limit).unwrap_or(EpollTimeout::MAX));
        let count = match self.0.wait(room, limit) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error).context("epoll_wait"),
        };
        #[expect(clippy::cast_possible_truncation, reason = "every key was a usize")]
        Ok(room[..count].iter().map(|event| event.data() as usize))
    }
}

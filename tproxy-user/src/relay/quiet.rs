//! Connections on which nobody has said anything for a while, in as little memory as they can
//! wait in: without a task, a timer and the runtime's part of two sockets.

mod queue;

use std::io;
use std::net::TcpStream as Socket;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until};

use self::queue::Queue;
use super::copy::Ending;
use super::record::{End, Record};
use super::tcp::{Both, Connection, Shares, relay};
use crate::memory;
use crate::sockopt;
use crate::wire::Wire;

/// After this time without a byte. Coming back costs a few system calls, which matter little
/// as often as this.
pub(super) const AFTER: Duration = Duration::from_secs(2);

/// Those that come back before others are asked.
const BATCH: usize = 64;

/// So many that come leave enough memory behind to give it back to the kernel, some 200 KiB, and so
/// do those that go, once they have ended; after this time, in which others may come and go.
const MANY: (usize, Duration) = (100, Duration::from_secs(1));

/// A quiet connection. Dropping it resets both sides.
#[derive(Debug)]
pub(crate) struct Quiet {
    client_side: Socket,
    upstream_side: Socket,
    record: Record,
    shares: Shares,
    last_byte: Instant,
}

impl Quiet {
    /// Takes a connection from the runtime; `None` where one side is more than a socket.
    pub(super) fn new(
        client_side: Connection,
        upstream_side: Connection,
        record: Record,
        shares: Shares,
        last_byte: Instant,
    ) -> Option<Self> {
        // First: what then fails is no end that the two sides have agreed on.
        for side in [&client_side, &upstream_side] {
            sockopt::reset_on_close(side.socket());
        }
        let (client_side, upstream_side) = (client_side.into_socket()?, upstream_side.into_socket()?);
        Some(Self { client_side, upstream_side, record, shares, last_byte })
    }

    /// Has it relayed again.
    pub(super) fn resume(self) {
        let back = |socket: Socket| {
            let stream = TcpStream::from_std(socket)?;
            sockopt::close_in_order(&stream);
            io::Result::Ok(Connection::new(Wire::Plain(stream)))
        };
        match (back(self.client_side), back(self.upstream_side)) {
            (Ok(client_side), Ok(upstream_side)) => {
                relay(Both { client_side, upstream_side, record: self.record, shares: self.shares });
            }
            (Err(error), _) | (_, Err(error)) => {
                let worker = self.record.worker();
                worker.shared.report_exhaustion("cannot wait for a connection", &error);
            }
        }
    }
}

/// The quiet connections of one worker.
struct Lot {
    epoll: Epoll,
    /// By the number that their events have; the one that is quiet for longest first.
    connections: Queue<Quiet>,
    /// Have come or gone since memory was given back.
    moved: usize,
    /// When it is given back again.
    gives_back: Option<Instant>,
}

impl Lot {
    fn new() -> io::Result<(Self, AsyncFd<OwnedFd>)> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let events = sockopt::watch(epoll.0.try_clone()?)?;
        let lot = Self { epoll, connections: Queue::new(), moved: 0, gives_back: None };
        Ok((lot, events))
    }

    /// Waits for either side of a connection; one that cannot be waited for is resumed.
    fn add(&mut self, quiet: Quiet) {
        let number = self.connections.next_number() as u64;
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, number);
        let added = [&quiet.client_side, &quiet.upstream_side].map(|side| self.epoll.add(side, event));
        if let [Err(error), _] | [_, Err(error)] = added {
            tracing::debug!(%error, "cannot wait for a quiet connection");
            self.forget(&quiet);
            return quiet.resume();
        }
        self.connections.push(quiet);
        self.has_moved();
    }

    /// One has come or gone.
    fn has_moved(&mut self) {
        self.moved += 1;
        if self.moved >= MANY.0 {
            self.gives_back.get_or_insert_with(|| Instant::now() + MANY.1);
        }
    }

    fn forget(&self, quiet: &Quiet) {
        for side in [&quiet.client_side, &quiet.upstream_side] {
            // One that is not there need not be taken away.
            let _ = self.epoll.delete(side);
        }
    }

    /// Takes out those on which something has happened; true where there may be more.
    fn wake(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        for event in &events[..count] {
            // Both sides may have an event; nobody else has their number before the next wait.
            if let Ok(number) = event.data().try_into()
                && let Some(quiet) = self.connections.take(number)
            {
                self.forget(&quiet);
                quiet.resume();
                self.has_moved();
            }
        }
        Ok(count == BATCH)
    }

    /// When something is to be done though nothing happens.
    fn deadline(&self, idle: Duration) -> Option<Instant> {
        self.expiry(idle).into_iter().chain(self.gives_back).min()
    }

    /// When the first has been quiet for too long.
    fn expiry(&self, idle: Duration) -> Option<Instant> {
        self.connections.first().map(|quiet| quiet.last_byte + idle)
    }

    fn do_what_is_due(&mut self, idle: Duration) {
        let is_due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= Instant::now());
        if is_due(self.gives_back) {
            self.connections.shrink();
            memory::give_back();
            (self.moved, self.gives_back) = (0, None);
        }
        if is_due(self.expiry(idle))
            && let Some(quiet) = self.connections.take_first()
        {
            quiet.record.ends(End::Copied(Ending::Idle));
        }
    }
}

/// Keeps the connections that arrive until they are no longer quiet, or have been for `idle`.
///
/// # Errors
/// Where the kernel has no epoll instance for them.
pub(crate) async fn keep(mut arriving: UnboundedReceiver<Quiet>, idle: Duration) -> io::Result<()> {
    let (mut lot, events) = Lot::new()?;
    loop {
        let deadline = lot.deadline(idle);
        let due = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = events.readable() => {
                let mut ready = ready?;
                if !lot.wake()? {
                    ready.clear_ready();
                }
            }
            quiet = arriving.recv() => match quiet {
                Some(quiet) => lot.add(quiet),
                None => return Ok(()),
            },
            () = due => lot.do_what_is_due(idle),
        }
    }
}

//! New connections, a number of them at one time: connect, request, response.

use std::io;
use std::time::Instant;

use anyhow::Result;
use nix::sys::epoll::EpollFlags;
use socket2::Socket;

use crate::drive::{Case, Exchanges, GRACE};
use crate::poller::Poller;
use crate::report::{Failures, Latency};
use crate::targets::Targets;
use crate::{ECHO, sockets};

/// The case; a connection that has its response is closed or kept.
pub(crate) struct Connector {
    targets: Targets,
    /// Connections that may begin.
    limit: u64,
    begun: u64,
    exchanges: Exchanges,
    poller: Poller,
    slots: Vec<Slot>,
    failures: Failures,
    kept: Option<Vec<Socket>>,
    /// Both from the beginning of the connect.
    pub(crate) connected: Latency,
    pub(crate) first_byte: Latency,
}

/// Where one connection after the other takes place.
struct Slot {
    socket: Option<Socket>,
    began: Instant,
    is_connected: bool,
    received: usize,
}

impl Connector {
    pub(crate) fn new(targets: Targets, concurrency: usize, limit: u64) -> Result<Self> {
        let slot = || Slot { socket: None, began: Instant::now(), is_connected: false, received: 0 };
        Ok(Self {
            targets,
            limit,
            begun: 0,
            exchanges: Exchanges::default(),
            poller: Poller::new()?,
            slots: std::iter::repeat_with(slot).take(concurrency).collect(),
            failures: Failures::default(),
            kept: None,
            connected: Latency::new()?,
            first_byte: Latency::new()?,
        })
    }

    /// Keeps the connections open, see [`kept`](Self::kept).
    pub(crate) fn keep(mut self) -> Self {
        self.kept = Some(Vec::new());
        self
    }

    /// Those that completed.
    pub(crate) fn kept(&mut self) -> Vec<Socket> {
        self.kept.take().unwrap_or_default()
    }

    /// How many failed: also those that are still under way.
    pub(crate) fn failed(&mut self) -> u64 {
        for slot in &mut self.slots {
            if slot.socket.take().is_some() {
                let what = if slot.is_connected { "no response" } else { "not connected" };
                self.failures.add(format_args!("{what} {} s after the end", GRACE.as_secs()));
            }
        }
        self.failures.tell()
    }

    fn begin(&mut self, key: usize) -> Result<()> {
        if self.begun >= self.limit || self.exchanges.are_stopped() {
            return Ok(());
        }
        let target = self.targets.at(self.begun, ECHO);
        self.begun += 1;
        let slot = &mut self.slots[key];
        slot.began = Instant::now();
        slot.is_connected = false;
        slot.received = 0;
        match sockets::tcp(target) {
            Ok(socket) => {
                let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
                self.poller.add(&socket, key, events)?;
                slot.socket = Some(socket);
                self.exchanges.begin();
            }
            Err(error) => self.failures.add(format_args!("{target}: {error}")),
        }
        Ok(())
    }
}

impl Case for Connector {
    fn poller(&self) -> &Poller {
        &self.poller
    }

    fn exchanges(&mut self) -> &mut Exchanges {
        &mut self.exchanges
    }

    fn advance(&mut self, key: usize) -> Result<()> {
        let slot = &mut self.slots[key];
        let Some(socket) = &slot.socket else { return Ok(()) };
        let complete = if slot.is_connected {
            sockets::answer(socket, &mut slot.received)
        } else {
            // A connection that failed tells so here.
            sockets::ask(socket).map(|()| false)
        };
        match complete {
            Ok(false) if slot.is_connected => {}
            Ok(false) => {
                slot.is_connected = true;
                self.connected.record(slot.began.elapsed());
            }
            Ok(true) => {
                self.first_byte.record(slot.began.elapsed());
                self.exchanges.complete();
                let socket = slot.socket.take();
                if let Some(kept) = &mut self.kept {
                    kept.extend(socket);
                }
                self.begin(key)?;
            }
            // The next one begins with a tick: no spinning where every attempt fails at once.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                slot.socket = None;
                self.exchanges.fail();
                self.failures.add(error);
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn tick(&mut self, _now: Instant) -> Result<()> {
        for key in 0..self.slots.len() {
            if self.slots[key].socket.is_none() {
                self.begin(key)?;
            }
        }
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.exchanges.completed() + self.failures.count() >= self.limit
    }
}

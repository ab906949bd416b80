//! Movers that are told by epoll when to go on.

use std::io::{self, ErrorKind};
use std::mem;
use std::net::Shutdown;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;
use socket2::Socket;

use crate::{Listener, Pair, report};

/// Moves one direction of a connection.
pub(crate) trait Mover {
    /// What of either socket to be told of.
    const EVENTS: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLOUT);

    /// Moves some bytes; false: the source has ended, and all is on its way.
    ///
    /// # Errors
    /// `WouldBlock` where an event of either socket has to be waited for.
    fn step(&mut self, from: &Socket, to: &Socket) -> io::Result<bool>;
}

/// Steps of one direction before others have their turn.
const STEPS: usize = 16;

/// Events that one call takes.
const EVENTS: usize = 64;

/// The listener's key.
const LISTENER: u64 = u64::MAX;

struct Connection<M> {
    sockets: Pair,
    /// From the client, and from the server; `None`: it has ended.
    movers: [Option<M>; 2],
}

enum State {
    Waits,
    /// It has more to do at once.
    Ready,
    Over,
}

/// Relays for ever.
pub(crate) fn run<M: Mover>(listener: &Listener, mover: impl Fn() -> Result<M>) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    listener.socket.set_nonblocking(true)?;
    epoll.add(&listener.socket, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).context("epoll_ctl")?;
    let mut room = [EpollEvent::empty(); EVENTS];
    let mut connections = Slab::new();
    let mut ready: Vec<usize> = Vec::new();
    loop {
        let limit = if ready.is_empty() { EpollTimeout::NONE } else { EpollTimeout::ZERO };
        let count = match epoll.wait(&mut room, limit) {
            Err(Errno::EINTR) => 0,
            count => count.context("epoll_wait")?,
        };
        let mut turn = mem::take(&mut ready);
        for event in &room[..count] {
            if event.data() == LISTENER {
                let client = match listener.socket.accept() {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    client => client.context("accept")?.0,
                };
                let Some(sockets) = listener.connect(client) else { continue };
                let movers = [Some(mover()?), Some(mover()?)];
                let entry = connections.vacant_entry();
                turn.push(entry.key());
                for socket in &sockets {
                    socket.set_nonblocking(true)?;
                    let events = M::EVENTS | EpollFlags::EPOLLET;
                    epoll.add(socket, EpollEvent::new(events, entry.key() as u64)).context("epoll_ctl")?;
                }
                entry.insert(Connection { sockets, movers });
            } else {
                turn.push(usize::try_from(event.data())?);
            }
        }
        turn.sort_unstable();
        turn.dedup();
        for key in turn {
            // One that is over has no events but those of this turn.
            let Some(connection) = connections.get_mut(key) else { continue };
            match connection.advance() {
                State::Waits => {}
                State::Ready => ready.push(key),
                State::Over => drop(connections.remove(key)),
            }
        }
    }
}

impl<M: Mover> Connection<M> {
    fn advance(&mut self) -> State {
        let [client, server] = &self.sockets;
        let mut ready = false;
        for (direction, (from, to)) in self.movers.iter_mut().zip([(client, server), (server, client)]) {
            let Some(mover) = direction else { continue };
            match advance(mover, from, to) {
                Ok(State::Waits) => {}
                Ok(State::Ready) => ready = true,
                Ok(State::Over) => *direction = None,
                Err(error) => {
                    report(&error);
                    return State::Over;
                }
            }
        }
        match self.movers {
            [None, None] => State::Over,
            _ if ready => State::Ready,
            _ => State::Waits,
        }
    }
}

fn advance(mover: &mut impl Mover, from: &Socket, to: &Socket) -> io::Result<State> {
    for _ in 0..STEPS {
        match mover.step(from, to) {
            Ok(true) => {}
            Ok(false) => return to.shutdown(Shutdown::Write).map(|()| State::Over),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(State::Waits),
            Err(error) => return Err(error),
        }
    }
    Ok(State::Ready)
}

//! The fewest system calls by which new connections can be relayed: what bounds every relay.
//!
//! Threads with a listener and an epoll instance each; nothing is shared. Servers see the client's
//! address. There are no time-outs, no limits and no counters, and a message that a socket does not
//! take at once ends its connection: a bound, and nothing to use.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::thread;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use slab::Slab;
use socket2::{Domain, Socket, Type};

use crate::{CHUNK, Listener, report};

/// Events that one call takes.
const EVENTS: usize = 64;

/// The listener's key.
const LISTENER: u64 = u64::MAX;

/// The client's socket and the server's, by the side of an event's key.
const CLIENT: usize = 0;
const SERVER: usize = 1;

struct Connection {
    sockets: [Socket; 2],
    connected: bool,
    /// What comes from either has ended.
    ended: [bool; 2],
}

/// Relays for ever, with so many threads.
pub(crate) fn run(port: u16, threads: usize) -> Result<()> {
    let listeners = (0..threads).map(|_| Listener::shared(port)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let all: Vec<_> =
            listeners.iter().map(|listener| scope.spawn(move || serve(&listener.socket))).collect();
        println!("{}", listeners[0].address()?);
        all.into_iter().try_for_each(|one| one.join().expect("a thread does not panic"))
    })
}

fn serve(listener: &Socket) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create1")?;
    listener.set_nonblocking(true)?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).context("epoll_ctl")?;
    let mut room = [EpollEvent::empty(); EVENTS];
    let mut connections: Slab<Connection> = Slab::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match epoll.wait(&mut room, EpollTimeout::NONE) {
            Err(Errno::EINTR) => 0,
            count => count.context("epoll_wait")?,
        };
        for event in &room[..count] {
            let done = if event.data() == LISTENER {
                accept(listener, &epoll, &mut connections)
            } else {
                let (key, side) = (usize::try_from(event.data() >> 1)?, usize::from(event.data() & 1 == 1));
                // An event of this turn may be about one that has ended in it.
                let Some(connection) = connections.get_mut(key) else { continue };
                let goes_on = connection.advance(&epoll, key, side, event.events(), &mut buffer);
                if !matches!(goes_on, Ok(true)) {
                    connections.remove(key);
                }
                goes_on.map(drop)
            };
            if let Err(error) = done {
                report(&error);
            }
        }
    }
}

fn accept(listener: &Socket, epoll: &Epoll, connections: &mut Slab<Connection>) -> io::Result<()> {
    let (client, from) = match listener.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
        accepted => accepted?,
    };
    let to = client.local_addr()?;
    let (Some(from), Some(to)) = (from.as_socket(), to.as_socket()) else {
        return Err(ErrorKind::Unsupported.into());
    };
    let server = begin(from, to)?;
    let entry = connections.vacant_entry();
    watch(epoll, &server, entry.key(), SERVER)?;
    entry.insert(Connection { sockets: [client, server], connected: false, ended: [false; 2] });
    Ok(())
}

/// Begins to connect to where a client wanted to go, as that client.
pub(crate) fn begin(mut from: SocketAddr, to: SocketAddr) -> io::Result<Socket> {
    let server = Socket::new(Domain::IPV4, Type::STREAM.nonblocking().cloexec(), None)?;
    server.set_tcp_nodelay(true)?;
    server.set_ip_transparent_v4(true)?;
    setsockopt(&server, sockopt::IpBindAddressNoPort, &true)?;
    from.set_port(0);
    server.bind(&from.into())?;
    match server.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(server),
    }
}

fn watch(epoll: &Epoll, socket: &Socket, key: usize, side: usize) -> io::Result<()> {
    let mut events = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    if side == SERVER {
        events |= EpollFlags::EPOLLOUT;
    }
    Ok(epoll.add(socket, EpollEvent::new(events, (key << 1 | side) as u64))?)
}

impl Connection {
    /// Does what an event asks for. Whether the connection goes on.
    fn advance(
        &mut self,
        epoll: &Epoll,
        key: usize,
        side: usize,
        events: EpollFlags,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        if !self.connected {
            if let Some(error) = self.sockets[SERVER].take_error()? {
                return Err(error);
            }
            self.connected = true;
            watch(epoll, &self.sockets[CLIENT], key, CLIENT)?;
        }
        let has_ended =
            events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        let (mut from, mut to) = (&self.sockets[side], &self.sockets[1 - side]);
        while !self.ended[side] && (has_ended || events.contains(EpollFlags::EPOLLIN)) {
            match from.read(buffer) {
                Ok(0) => {
                    self.ended[side] = true;
                    if !self.ended[1 - side] {
                        to.shutdown(Shutdown::Write)?;
                    }
                }
                Ok(read) => {
                    to.write_all(&buffer[..read])?;
                    // More makes another event.
                    if read < buffer.len() && !has_ended {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.ended != [true; 2])
    }
}

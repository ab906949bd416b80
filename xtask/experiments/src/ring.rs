//! Movers of `io_uring`: one ring for all connections, and one system call for all that was
//! submitted meanwhile and to wait.

use std::io;
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, FromRawFd as _, RawFd};
use std::ptr;

use anyhow::{Context as _, Result};
use io_uring::{IoUring, opcode, squeue, types::Fd};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use slab::Slab;
use socket2::Socket;

use crate::splice::Pipe;
use crate::{CHUNK, Listener, Pair, report};

/// Operations that may wait for their submission.
const ENTRIES: u32 = 256;

/// What is told of a completed accept.
const LISTENER: u64 = u64::MAX;

/// From where the bytes come, or to where they go.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    From,
    To,
}

/// Moves one direction of a connection, with at most one operation of each side under way.
pub(crate) trait Mover {
    /// The operation of this side that can begin now, none of it being under way. What it uses
    /// stays as it is, and where it is, until it is completed.
    fn begin(&mut self, side: Side, socket: Fd) -> Option<squeue::Entry>;

    /// An operation has moved so many bytes.
    fn completed(&mut self, side: Side, bytes: usize);

    /// Whether the source has ended, and all is on its way.
    fn ended(&self) -> bool;
}

struct Connection<M> {
    sockets: Pair,
    /// From the client, and from the server.
    directions: [Direction<M>; 2],
    /// An operation has failed: it is over once none is under way.
    failed: bool,
}

struct Direction<M> {
    mover: M,
    /// Whether an operation of each side is under way.
    busy: [bool; 2],
    /// The end has been passed on.
    over: bool,
}

/// Relays for ever.
pub(crate) fn run<M: Mover>(listener: &Listener, mover: impl Fn() -> Result<M>) -> Result<()> {
    let mut ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(ENTRIES)
        .context("io_uring_setup (needs Linux 6.1)")?;
    // Where this fails operations are under way: what they use stays until the process has ended.
    let mut connections: ManuallyDrop<Slab<Connection<M>>> = ManuallyDrop::new(Slab::new());
    let mut results = Vec::new();
    accept(&mut ring, listener)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            submitted => drop(submitted.context("io_uring_enter")?),
        }
        results.extend(ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (told, result) in results.drain(..) {
            let result = Errno::result(result).map_err(|_| io::Error::from_raw_os_error(-result));
            let key = if told == LISTENER {
                let descriptor = result.context("accept")?;
                // SAFETY: the kernel has just made it, and nobody else knows it.
                let client = unsafe { Socket::from_raw_fd(descriptor) };
                accept(&mut ring, listener)?;
                let Some(sockets) = listener.connect(client) else { continue };
                let direction = || anyhow::Ok(Direction { mover: mover()?, busy: [false; 2], over: false });
                let directions = [direction()?, direction()?];
                connections.insert(Connection { sockets, directions, failed: false })
            } else {
                let (key, direction, side) = told_of(told)?;
                connections[key].completed(direction, side, result);
                key
            };
            let connection = &mut connections[key];
            connection.begin(key, &mut ring)?;
            if connection.is_over() {
                connections.remove(key);
            }
        }
    }
}

impl<M: Mover> Connection<M> {
    fn completed(&mut self, direction: usize, side: Side, result: io::Result<i32>) {
        let direction = &mut self.directions[direction];
        direction.busy[side as usize] = false;
        match result {
            Ok(bytes) => direction.mover.completed(side, usize::try_from(bytes).unwrap_or_default()),
            Err(error) if !self.failed => {
                report(&error);
                self.failed = true;
                // Ends what is still under way; one that is not connected any more has nothing left.
                self.sockets.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
            }
            Err(_) => {}
        }
    }

    /// Submits what can begin, and passes ends on.
    fn begin(&mut self, key: usize, ring: &mut IoUring) -> Result<()> {
        if self.failed {
            return Ok(());
        }
        let [client, server] = &self.sockets;
        let ways = [(client, server), (server, client)];
        for (index, (direction, (from, to))) in self.directions.iter_mut().zip(ways).enumerate() {
            for (side, socket) in [(Side::From, from), (Side::To, to)] {
                if direction.busy[side as usize] {
                    continue;
                }
                if let Some(entry) = direction.mover.begin(side, Fd(socket.as_raw_fd())) {
                    submit(ring, &entry.user_data(telling(key, index, side)))?;
                    direction.busy[side as usize] = true;
                }
            }
            if !direction.over && direction.mover.ended() {
                direction.over = true;
                // Not connected any more: then there is nobody to tell.
                drop(to.shutdown(Shutdown::Write));
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let under_way = self.directions.iter().any(|direction| direction.busy.contains(&true));
        !under_way && (self.failed || self.directions.iter().all(|direction| direction.over))
    }
}

/// What the completion of an operation is to tell.
fn telling(key: usize, direction: usize, side: Side) -> u64 {
    (key as u64) << 2 | (direction as u64) << 1 | side as u64
}

fn told_of(told: u64) -> Result<(usize, usize, Side)> {
    let side = if told & 1 == 0 { Side::From } else { Side::To };
    Ok((usize::try_from(told >> 2)?, usize::from(told & 2 != 0), side))
}

fn accept(ring: &mut IoUring, listener: &Listener) -> Result<()> {
    let accept = opcode::Accept::new(Fd(listener.socket.as_raw_fd()), ptr::null_mut(), ptr::null_mut());
    submit(ring, &accept.flags(libc::SOCK_CLOEXEC).build().user_data(LISTENER))
}

fn submit(ring: &mut IoUring, entry: &squeue::Entry) -> Result<()> {
    if ring.submission().is_full() {
        ring.submit().context("io_uring_enter")?;
    }
    // SAFETY: of what it refers to, an accept has nothing but the listener, which outlives the
    // ring; for the others `Mover::begin` vouches, and a connection is dropped only when none of
    // its operations is under way.
    unsafe { ring.submission().push(entry) }.context("io_uring: no room for an operation")
}

/// Receives and sends: while one of two buffers is sent from, the other is received into.
pub(crate) struct Messages {
    buffers: [Box<[u8]>; 2],
    /// What is to be sent of the buffer that is sent from.
    held: [Range<usize>; 2],
    /// Buffers that were received into, and that were sent; they take turns.
    received: usize,
    sent: usize,
    source_ended: bool,
}

impl Messages {
    pub(crate) fn new() -> Self {
        let buffer = || vec![0; CHUNK].into_boxed_slice();
        Self { buffers: [buffer(), buffer()], held: [0..0, 0..0], received: 0, sent: 0, source_ended: false }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "no buffer is larger than a chunk")]
impl Mover for Messages {
    fn begin(&mut self, side: Side, socket: Fd) -> Option<squeue::Entry> {
        match side {
            Side::From if !self.source_ended && self.received - self.sent < 2 => {
                let buffer = &mut self.buffers[self.received % 2];
                Some(opcode::Recv::new(socket, buffer.as_mut_ptr(), buffer.len() as u32).build())
            }
            Side::To if self.sent < self.received => {
                let index = self.sent % 2;
                let bytes = &self.buffers[index][self.held[index].clone()];
                let send = opcode::Send::new(socket, bytes.as_ptr(), bytes.len() as u32);
                Some(send.flags(libc::MSG_NOSIGNAL).build())
            }
            _ => None,
        }
    }

    fn completed(&mut self, side: Side, bytes: usize) {
        match side {
            Side::From if bytes == 0 => self.source_ended = true,
            Side::From => {
                self.held[self.received % 2] = 0..bytes;
                self.received += 1;
            }
            Side::To => {
                let held = &mut self.held[self.sent % 2];
                held.start += bytes;
                self.sent += usize::from(held.start == held.end);
            }
        }
    }

    fn ended(&self) -> bool {
        self.source_ended && self.sent == self.received
    }
}

/// Splices into a pipe, and out of it, in turn.
pub(crate) struct Splices {
    pipe: Pipe,
    held: usize,
    source_ended: bool,
}

impl Splices {
    pub(crate) fn new(size: u32) -> Result<Self> {
        Ok(Self { pipe: Pipe::new(size, OFlag::empty())?, held: 0, source_ended: false })
    }
}

impl Mover for Splices {
    fn begin(&mut self, side: Side, socket: Fd) -> Option<squeue::Entry> {
        let [read, write]: [RawFd; 2] = [self.pipe.read.as_raw_fd(), self.pipe.write.as_raw_fd()];
        let splice = |from, to, bytes| opcode::Splice::new(from, -1, to, -1, bytes).build();
        match side {
            Side::From if self.held == 0 && !self.source_ended => {
                Some(splice(socket, Fd(write), self.pipe.size))
            }
            Side::To if self.held > 0 => Some(splice(Fd(read), socket, u32::try_from(self.held).ok()?)),
            _ => None,
        }
    }

    fn completed(&mut self, side: Side, bytes: usize) {
        match side {
            Side::From if bytes == 0 => self.source_ended = true,
            Side::From => self.held = bytes,
            Side::To => self.held -= bytes,
        }
    }

    fn ended(&self) -> bool {
        self.source_ended && self.held == 0
    }
}

//! Pipes of one worker, lent to directions that carry much: `splice(2)` moves pages from one
//! socket to the other through a pipe, and no byte is copied.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// What a pipe is asked to hold, in bytes; a fragment of a packet takes a page of it, however
/// short it is.
const SIZE: usize = 256 << 10;

/// Pipes at one time, two descriptors each; who finds none copies.
const MAX: usize = 64;

/// Unused pipes that are kept.
const KEEP: usize = 8;

/// Lends pipes to the tasks of one worker.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    free: RefCell<Vec<Ends>>,
    out: Cell<usize>,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipes {
    /// Lends an empty pipe. `None` where all are out or no descriptor is left.
    pub(crate) fn take(&self) -> Option<Pipe<'_>> {
        if self.out.get() >= MAX {
            return None;
        }
        let ends = self.free.borrow_mut().pop().or_else(Ends::new)?;
        self.out.set(self.out.get() + 1);
        Some(Pipe { ends: Some(ends), held: 0, pool: self })
    }
}

impl Ends {
    fn new() -> Option<Self> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
        // Where it may not be as large (pipe-max-size, pipe(7)) it stays as it is.
        if let Ok(size) = libc::c_int::try_from(SIZE) {
            let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(size));
        }
        Some(Self { read, write })
    }
}

/// A lent pipe. It goes back when dropped, if it is empty: else what it holds is lost.
#[derive(Debug)]
pub(crate) struct Pipe<'a> {
    ends: Option<Ends>,
    held: usize,
    pool: &'a Pipes,
}

impl Pipe<'_> {
    /// Bytes in it.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Takes what a socket has, while the pipe is empty; 0: the other side has closed its
    /// direction.
    ///
    /// # Errors
    /// `WouldBlock` where nothing is there, or urgent data (tcp(7)), which only `recv` passes;
    /// else what `splice(2)` answers.
    pub(crate) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        let Some(ends) = self.ends.as_ref().filter(|_| self.held == 0) else { return Ok(0) };
        self.held = splice(from, None, &ends.write, None, SIZE, FLAGS)?;
        Ok(self.held)
    }

    /// Gives a socket as much as it has room for.
    ///
    /// # Errors
    /// `WouldBlock` where there is no room; else what `splice(2)` answers.
    pub(crate) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let Some(ends) = &self.ends else { return Ok(0) };
        // No more than is there: else the kernel waits for the rest before it sends (`MSG_MORE`).
        let moved = splice(&ends.read, None, to, None, self.held, FLAGS)?;
        self.held -= moved;
        Ok(moved)
    }
}

const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

impl Drop for Pipe<'_> {
    fn drop(&mut self) {
        self.pool.out.set(self.pool.out.get() - 1);
        let mut free = self.pool.free.borrow_mut();
        if self.held == 0 && free.len() < KEEP {
            free.extend(self.ends.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    #[test]
    fn pipes_are_used_again_but_not_with_what_they_hold() {
        let pipes = Pipes::default();
        let (mut sender, from) = UnixStream::pair().expect("sockets");
        let (to, mut receiver) = UnixStream::pair().expect("sockets");
        let mut pipe = pipes.take().expect("a pipe");
        sender.write_all(b"through").expect("room");
        assert_eq!(pipe.fill(&from).ok(), Some(7));
        assert_eq!((pipe.drain(&to).ok(), pipe.held()), (Some(7), 0));
        let mut got = [0; 7];
        receiver.read_exact(&mut got).expect("all of it");
        assert_eq!(&got, b"through");
        drop(pipe);
        assert_eq!(pipes.free.borrow().len(), 1);

        let mut pipe = pipes.take().expect("a pipe");
        sender.write_all(b"lost").expect("room");
        assert_eq!((pipe.fill(&from).ok(), pipe.held()), (Some(4), 4));
        drop(pipe);
        assert_eq!((pipes.free.borrow().len(), pipes.out.get()), (0, 0));
    }

    #[test]
    fn pipes_are_few() {
        let pipes = Pipes::default();
        let out: Vec<_> = (0..MAX).map_while(|_| pipes.take()).collect();
        assert_eq!(out.len(), MAX);
        assert!(pipes.take().is_none());
        drop(out);
        assert_eq!(pipes.free.borrow().len(), KEEP);
    }
}

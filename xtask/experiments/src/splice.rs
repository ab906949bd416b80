//! splice(2) through a pipe.

use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result};
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use socket2::Socket;

use crate::events::Mover;

const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_MOVE.union(SpliceFFlags::SPLICE_F_NONBLOCK);

pub(crate) struct Splice {
    pipe: Pipe,
    held: usize,
}

/// A pipe that is as large as was asked for.
pub(crate) struct Pipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
    pub(crate) size: u32,
}

impl Pipe {
    pub(crate) fn new(size: u32, flags: OFlag) -> Result<Self> {
        let (read, write) = pipe2(flags | OFlag::O_CLOEXEC).context("pipe2")?;
        let asked = FcntlArg::F_SETPIPE_SZ(size.try_into()?);
        fcntl(&write, asked).with_context(|| format!("cannot make a pipe of {size} bytes"))?;
        Ok(Self { read, write, size })
    }
}

impl Splice {
    pub(crate) fn new(size: u32) -> Result<Self> {
        Ok(Self { pipe: Pipe::new(size, OFlag::O_NONBLOCK)?, held: 0 })
    }
}

impl Mover for Splice {
    fn step(&mut self, from: &Socket, to: &Socket) -> io::Result<bool> {
        if self.held == 0 {
            self.held = splice(from, None, &self.pipe.write, None, self.pipe.size as usize, FLAGS)?;
            if self.held == 0 {
                return Ok(false);
            }
        }
        // No more than is there: else the kernel waits for the rest before it sends (`MSG_MORE`).
        self.held -= splice(&self.pipe.read, None, to, None, self.held, FLAGS)?;
        Ok(true)
    }
}

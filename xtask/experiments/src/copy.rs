//! read(2) and write(2).

use std::io::{self, Read as _, Write as _};
use std::ops::Range;

use socket2::Socket;

use crate::CHUNK;
use crate::events::Mover;

pub(crate) struct Copy {
    buffer: Vec<u8>,
    /// What of it is to be written.
    held: Range<usize>,
}

impl Copy {
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; CHUNK], held: 0..0 }
    }
}

impl Mover for Copy {
    fn step(&mut self, mut from: &Socket, mut to: &Socket) -> io::Result<bool> {
        if self.held.is_empty() {
            self.held = 0..from.read(&mut self.buffer)?;
            if self.held.is_empty() {
                return Ok(false);
            }
        }
        self.held.start += to.write(&self.buffer[self.held.clone()])?;
        Ok(true)
    }
}

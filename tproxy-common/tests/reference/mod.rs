//! The parser and the classification once more, in the plainest way and from
//! the standards, and what must hold between them and the real ones.
//!
//! Shared by the properties in `cargo test` and by the fuzz targets: each
//! `check_…` takes any bytes at all and panics where something does not hold.
//!
//! The real parser differs from a complete one on purpose:
//!
//! - it follows six extension headers, and a seventh is [`Skip::Protocol`];
//! - a routing header with segments left is [`Skip::Protocol`];
//! - extension headers may stand in any order and come again, but for a
//!   fragment header behind one of a first fragment, which is malformed;
//! - lengths in headers are compared with each other, not with the buffer: only
//!   what has to be read must be there;
//! - lengths of UDP, checksums and the content of options are not looked at.

#![allow(dead_code, unreachable_pub, reason = "each user needs a part of it")]

mod classify;
mod generate;
mod parse;

pub use classify::{check_classification, check_segments};
pub use generate::packet;
pub use parse::check_packet;

#[cfg(doc)]
use tproxy_common::wire::Skip;

/// Reads numbers from bytes; behind their end all is zero.
pub struct Numbers<'a>(std::slice::Iter<'a, u8>);

impl<'a> Numbers<'a> {
    /// Reads from the first byte on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes.iter())
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    /// The next bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.u8())
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u8) -> bool {
        self.u8() % n == n - 1
    }
}

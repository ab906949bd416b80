//! Buffers and pipes of one worker, lent while there is data in hand.

use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut};

use super::pipe::Pipes;

/// Size of a buffer in bytes. Larger ones hardly lower the cost of a byte; the
/// second-level cache should hold a few.
const LARGE: usize = 64 << 10;

/// Size of the buffers lent once [`MAX_LARGE`] are out.
const SMALL: usize = 4 << 10;

/// Large buffers out at one time (64 MiB a worker). A buffer stays out only while its
/// reader stalls; when thousands do, thrift is worth more than their speed.
const MAX_LARGE: usize = 1024;

/// Unused buffers that are kept.
const KEEP: usize = 16;

/// Lends buffers to the tasks of one worker, and pipes.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    pub(crate) pipes: Pipes,
    free: RefCell<Vec<Box<[u8]>>>,
    large_out: Cell<usize>,
}

impl Pool {
    /// Lends a buffer of [`LARGE`] bytes, or of [`SMALL`] where many are out.
    pub(crate) fn take(&self) -> Buffer<'_> {
        if self.large_out.get() >= MAX_LARGE {
            return Buffer { bytes: vec![0; SMALL].into(), pool: self };
        }
        self.large_out.set(self.large_out.get() + 1);
        let bytes = self.free.borrow_mut().pop().unwrap_or_else(|| vec![0; LARGE].into());
        Buffer { bytes, pool: self }
    }
}

/// A lent buffer; it goes back when dropped. What it holds is left from earlier use.
#[derive(Debug)]
pub(crate) struct Buffer<'a> {
    bytes: Box<[u8]>,
    pool: &'a Pool,
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if self.bytes.len() != LARGE {
            return;
        }
        self.pool.large_out.set(self.pool.large_out.get() - 1);
        let mut free = self.pool.free.borrow_mut();
        if free.len() < KEEP {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_few_are_kept() {
        let pool = Pool::default();
        drop([pool.take(), pool.take()]);
        assert_eq!(pool.free.borrow().len(), 2);
        let one = pool.take();
        assert_eq!((pool.free.borrow().len(), one.len()), (1, LARGE));
        drop(one);
        drop((0..KEEP + 5).map(|_| pool.take()).collect::<Vec<_>>());
        assert_eq!((pool.free.borrow().len(), pool.large_out.get()), (KEEP, 0));
    }

    #[test]
    fn memory_is_bounded_when_readers_stall() {
        let pool = Pool::default();
        let out: Vec<_> = (0..MAX_LARGE).map(|_| pool.take()).collect();
        assert_eq!(pool.take().len(), SMALL);
        drop(out);
        assert_eq!(pool.take().len(), LARGE);
    }
}

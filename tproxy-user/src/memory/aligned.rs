//! Memory that is aligned to cache lines, from the allocator's short paths.
//!
//! The runtime has its tasks and its sockets' states begin at cache lines of their own. glibc's
//! `posix_memalign` passes by what a thread has kept for itself, and takes several times as long as
//! `malloc`: four of them were a tenth of what a connection costs in user mode.

use std::alloc::{GlobalAlloc, Layout, System};

#[global_allocator]
static ALLOCATOR: Aligned = Aligned;

/// What the allocator aligns to by itself.
const USUAL: usize = 16;

/// Two cache lines: what is fetched at a time. Beyond that the room before a block is too much to
/// give away.
const MOST: usize = 128;

/// The system's allocator; what is to be aligned is in a block that is larger by that much.
struct Aligned;

/// The layout of the block that has one of `inner` in it; `None`: that is its own.
fn around(inner: Layout) -> Option<Layout> {
    if inner.align() <= USUAL || inner.align() > MOST {
        return None;
    }
    Layout::from_size_align(inner.size().checked_add(inner.align())?, USUAL).ok()
}

/// Where it is noted where the block begins that `given` is in.
///
/// # Safety
/// It is in one that is larger than asked for.
const unsafe fn note(given: *mut u8) -> *mut *mut u8 {
    #[expect(clippy::cast_ptr_alignment, reason = "`given` is aligned to more than `USUAL`")]
    let after = given.cast::<*mut u8>();
    // SAFETY: at least 16 bytes of the block are before `given`.
    unsafe { after.sub(1) }
}

// SAFETY: blocks are the system's. Of one that is larger than asked for, what is given out begins
// 16 to `align` bytes after its beginning, which is `USUAL`-aligned, and is noted just before; so
// both are within. A layout says always the same of this, so each block goes back as it came.
unsafe impl GlobalAlloc for Aligned {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(block) = around(layout) else {
            // SAFETY: as the caller says.
            return unsafe { System.alloc(layout) };
        };
        // SAFETY: its size is not zero.
        let begins = unsafe { System.alloc(block) };
        if begins.is_null() {
            return begins;
        }
        let before = layout.align() - begins.addr() % layout.align();
        // SAFETY: the block has room for both, see above.
        unsafe {
            let given = begins.add(before);
            note(given).write(begins);
            given
        }
    }

    unsafe fn dealloc(&self, given: *mut u8, layout: Layout) {
        // SAFETY: `given` was given out for this layout, so it is noted where its block begins.
        unsafe {
            match around(layout) {
                Some(block) => System.dealloc(note(given).read(), block),
                None => System.dealloc(given, layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if around(layout).is_none() {
            // SAFETY: as the caller says.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: as the caller says; what was given is as long as `layout` says.
        unsafe {
            let given = self.alloc(layout);
            if !given.is_null() {
                given.write_bytes(0, layout.size());
            }
            given
        }
    }

    unsafe fn realloc(&self, given: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if around(layout).is_none() {
            // SAFETY: as the caller says.
            return unsafe { System.realloc(given, layout, size) };
        }
        // SAFETY: the caller has seen to it that the size fits; both blocks are as long as is copied.
        unsafe {
            let larger = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !larger.is_null() {
                given.copy_to_nonoverlapping(larger, layout.size().min(size));
                self.dealloc(given, layout);
            }
            larger
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Of all alignments, those of the system's allocator and those beyond [`MOST`] too.
        #[test]
        fn blocks_are_aligned_and_keep_what_is_in_them(
            power in 0_u32..10,
            sizes in prop::collection::vec(1_usize..3000, 1..20),
            zeroed: bool,
        ) {
            let mut layout = Layout::from_size_align(sizes[0], 1 << power).expect("a layout");
            // SAFETY: sizes are not zero, every byte that is read was written, and each block is
            // given back once, as what it was last resized to.
            unsafe {
                let mut block = if zeroed { Aligned.alloc_zeroed(layout) } else { Aligned.alloc(layout) };
                prop_assert!(!block.is_null());
                if zeroed {
                    prop_assert!((0..layout.size()).all(|at| block.add(at).read() == 0));
                }
                for (round, &size) in (1_u8..).zip(&sizes) {
                    let before = round - 1;
                    let kept = if round == 1 { 0 } else { layout.size().min(size) };
                    block = Aligned.realloc(block, layout, size);
                    prop_assert!(!block.is_null());
                    layout = Layout::from_size_align(size, layout.align()).expect("a layout");
                    prop_assert_eq!(block.addr() % layout.align(), 0);
                    prop_assert!((0..kept).all(|at| block.add(at).read() == before));
                    block.write_bytes(round, size);
                }
                Aligned.dealloc(block, layout);
            }
        }
    }

    #[test]
    fn what_is_too_large_is_not_there() {
        let layout = Layout::from_size_align(isize::MAX as usize - 127, MOST).expect("a layout");
        // SAFETY: its size is not zero, and nothing is given.
        assert!(unsafe { Aligned.alloc(layout) }.is_null());
    }
}

//! The allocator, and memory that is no longer used: those of others than glibc give it back by
//! themselves.

mod aligned;

/// Has little be kept at the end of the allocator's areas, each time that something there is freed.
///
/// That is what glibc begins with; but from the first large block on that is freed it would keep
/// twice as much as that was, in each worker, and nothing would [give it back](give_back).
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number of the allocator's.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
    }
}

/// Gives what was freed between what is in use back to the kernel, a few milliseconds' work for
/// some ten megabytes.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but what the allocator has free; any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

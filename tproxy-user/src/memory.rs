//! Memory that is no longer used.

/// Gives what was freed back to the kernel, a few milliseconds' work for some ten megabytes.
///
/// glibc keeps it for later, however much it is, where anything is in use beyond it.
#[cfg(target_env = "gnu")]
pub(crate) fn give_back() {
    // SAFETY: it touches nothing but what the allocator has free; any thread may call it at any time.
    unsafe { libc::malloc_trim(0) };
}

/// The allocators of others do so by themselves.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_back() {}

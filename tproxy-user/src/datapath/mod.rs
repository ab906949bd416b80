//! The eBPF side, as userspace sees it.

pub mod attach;
pub mod flows;

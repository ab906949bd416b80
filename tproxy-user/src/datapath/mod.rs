//! The kernel side as userspace sees it: load, fill, attach, read.

pub mod attach;
pub mod bpffs;
pub mod counters;
pub mod features;
pub mod flows;
pub mod group;
pub mod load;
pub mod local;
pub mod names;
pub mod policy;
pub mod query;

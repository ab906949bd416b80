//! What of `tproxy-user` reads names from the network, compiled by itself: to instrument all of that
//! crate takes minutes.

#[path = "../../src/policy/hostname.rs"]
mod hostname;
#[path = "../../src/relay/sniff/mod.rs"]
pub mod sniff;

/// Where `sniff` looks for it.
mod policy {
    pub(crate) use crate::hostname;
}

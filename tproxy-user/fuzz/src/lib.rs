//! What of `tproxy-user` reads bytes of others, compiled by itself: to instrument all of that crate
//! takes minutes.
#![expect(
    dead_code,
    reason = "what these files have beside it: writing requests, telling what a reply means"
)]

#[path = "../../src/policy/hostname.rs"]
mod hostname;
#[path = "../../src/relay/sniff/mod.rs"]
pub mod sniff;

#[path = "../../src/upstream/check.rs"]
pub mod check;
#[path = "../../src/config/upstream/credentials.rs"]
mod credentials;
#[path = "../../src/upstream/destination.rs"]
mod destination;
#[path = "../../src/upstream/http.rs"]
mod http;
#[path = "../../src/upstream/socks5/mod.rs"]
mod socks5;

/// Where these look for them.
mod config {
    pub(crate) mod upstream {
        pub(crate) use crate::credentials::Credentials;
    }
}

/// Where `sniff` looks for it.
mod policy {
    pub(crate) use crate::hostname;
}

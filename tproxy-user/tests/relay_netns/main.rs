//! The relay with real traffic: client, router and server in network namespaces,
//! steered by iptables TPROXY. Needs root: `cargo test --test relay_netns -- --ignored`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod descriptors;
mod lab;
mod listeners;
mod tcp;
mod tcp_limits;
mod udp;

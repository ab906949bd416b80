//! Which sockets a namespace has, as the kernel lists them.

use std::fs;

use anyhow::{Context, Result};

use super::namespace::Namespace;

/// Transport protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// `tcp` or `udp`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// The state of a socket that waits for peers, as `/proc/net` writes it
    /// (`TCP_LISTEN`, `TCP_CLOSE`; `include/net/tcp_states.h`).
    const fn waiting(self) -> &'static str {
        match self {
            Self::Tcp => "0A",
            Self::Udp => "07",
        }
    }
}

/// Whether a socket of either family waits for peers on `port`.
///
/// # Errors
/// Where the kernel's list cannot be read.
pub fn is_bound(namespace: &Namespace, protocol: Protocol, port: u16) -> Result<bool> {
    let suffix = format!(":{port:04X}");
    let waiting = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().take(4).collect();
        matches!(fields[..], [_, local, _, state] if local.ends_with(&suffix) && state == protocol.waiting())
    };
    Ok(lists(namespace, protocol)?.iter().flat_map(|list| list.lines()).any(waiting))
}

/// Whether every TCP socket of either family whose peer has `port` is in `TIME_WAIT`.
///
/// # Errors
/// Where the kernel's list cannot be read.
pub fn all_in_time_wait(namespace: &Namespace, port: u16) -> Result<bool> {
    const TIME_WAIT: &str = "06";
    let suffix = format!(":{port:04X}");
    let other = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().take(4).collect();
        matches!(fields[..], [_, _, peer, state] if peer.ends_with(&suffix) && state != TIME_WAIT)
    };
    Ok(!lists(namespace, Protocol::Tcp)?.iter().flat_map(|list| list.lines()).any(other))
}

/// How many sockets of either family there are, `TIME_WAIT` among them.
///
/// # Errors
/// Where the kernel's list cannot be read.
pub fn count(namespace: &Namespace, protocol: Protocol) -> Result<usize> {
    Ok(lists(namespace, protocol)?.iter().map(|list| list.lines().count().saturating_sub(1)).sum())
}

fn lists(namespace: &Namespace, protocol: Protocol) -> Result<[String; 2]> {
    let read = |suffix| {
        // The calling thread's own view: `/proc/net` would be the process's.
        let path = format!("/proc/thread-self/net/{}{suffix}", protocol.name());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    namespace.enter(|| Ok([read("")?, read("6")?]))?
}

//! Which sockets a namespace has, as the kernel lists them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its own address and port; a mapped IPv4 address is one of IPv4.
    pub local: SocketAddr,
    /// Those of its peer; unspecified and 0 where it has none.
    pub peer: SocketAddr,
    /// By which `/proc/PID/fd` names it; 0 where no process has it any more.
    pub inode: u64,
}

/// The sockets of both families.
///
/// # Errors
/// Where the kernel's list cannot be read.
pub fn all(namespace: &Namespace, protocol: Protocol) -> Result<Vec<Entry>> {
    let lists = lists(namespace, protocol)?;
    let lines = lists.iter().flat_map(|list| list.lines().skip(1));
    lines
        .map(|line| entry(line).with_context(|| format!("not as the kernel lists sockets: {line}")))
        .collect()
}

fn entry(line: &str) -> Option<Entry> {
    let fields: Vec<&str> = line.split_whitespace().take(10).collect();
    Some(Entry {
        local: address(fields.get(1)?)?,
        peer: address(fields.get(2)?)?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// `0100007F:1F90`: an address by words in the machine's own order, and a port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words = address
        .as_bytes()
        .chunks(8)
        .map(|word| Some(u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()?.to_ne_bytes()));
    let bytes = words.collect::<Option<Vec<_>>>()?.concat();
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(four) => IpAddr::from(Ipv4Addr::from(four)),
        Err(_) => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

fn lists(namespace: &Namespace, protocol: Protocol) -> Result<[String; 2]> {
    let read = |suffix| {
        // The calling thread's own view: `/proc/net` would be the process's.
        let path = format!("/proc/thread-self/net/{}{suffix}", protocol.name());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    namespace.enter(|| Ok([read("")?, read("6")?]))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn sockets_are_read_as_the_kernel_lists_them() {
        let entry = |line| entry(line).expect("a socket");
        let four = entry(
            "   1: 010012C6:2328 020200C0:8AE4 01 00000000:00000000 00:00000000 00000000     0        0 48213 1 0",
        );
        assert_eq!(four.local, "198.18.0.1:9000".parse().expect("an address"));
        assert_eq!(four.peer, "192.0.2.2:35556".parse().expect("an address"));
        assert_eq!(four.inode, 48213);
        let six = entry(
            "   0: B80D0120000000000000000001000000:0050 0000000000000000FFFF0000020200C0:8AE4 01 00000000:00000000 \
             00:00000000 00000000     0        0 7 1 0",
        );
        assert_eq!(six.local, "[2001:db8::1]:80".parse().expect("an address"));
        assert_eq!(six.peer, "192.0.2.2:35556".parse().expect("an address"));
    }
}

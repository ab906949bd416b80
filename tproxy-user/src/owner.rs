//! Who holds a port.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::net::SocketAddr;

use procfs::FromBufReadSI as _;
use procfs::net::{TcpNetEntries, TcpState, UdpNetEntries};
use procfs::process::FDTarget;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP: who listens.
    Tcp,
    /// UDP: who is bound.
    Udp,
}

/// Who keeps `address` from being bound, such as `dnsmasq (pid 812)`; more than
/// one are joined by commas. `None`: nobody that can be seen. Without root only
/// the processes of this user can be.
#[must_use]
pub fn of_port(protocol: Protocol, address: SocketAddr) -> Option<String> {
    let inodes = inodes(protocol, address);
    if inodes.is_empty() {
        return None;
    }
    let owners: BTreeSet<String> = procfs::process::all_processes()
        .ok()?
        .flatten()
        .filter(|process| {
            process.fd().is_ok_and(|descriptors| {
                descriptors
                    .flatten()
                    .any(|fd| matches!(fd.target, FDTarget::Socket(inode) if inodes.contains(&inode)))
            })
        })
        .map(|process| {
            let name = process.stat().map_or_else(|_| "a process".to_owned(), |stat| stat.comm);
            format!("{name} (pid {})", process.pid)
        })
        .collect();
    // The kernel has sockets of its own (NFS, WireGuard), and other containers' processes are out of sight.
    Some(if owners.is_empty() {
        "a process that is not visible from here".to_owned()
    } else {
        owners.into_iter().collect::<Vec<_>>().join(", ")
    })
}

/// Sockets that `address` cannot be bound beside.
fn inodes(protocol: Protocol, address: SocketAddr) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for file in ["", "6"] {
        let local: Vec<(SocketAddr, u64)> = match protocol {
            Protocol::Tcp => open(&format!("tcp{file}"))
                .and_then(|reader| TcpNetEntries::from_buf_read(reader, procfs::current_system_info()).ok())
                .map(|entries| {
                    let listening = entries.0.into_iter().filter(|entry| entry.state == TcpState::Listen);
                    listening.map(|entry| (entry.local_address, entry.inode)).collect()
                }),
            Protocol::Udp => open(&format!("udp{file}"))
                .and_then(|reader| UdpNetEntries::from_buf_read(reader, procfs::current_system_info()).ok())
                .map(|entries| {
                    entries.0.into_iter().map(|entry| (entry.local_address, entry.inode)).collect()
                }),
        }
        .unwrap_or_default();
        found.extend(local.into_iter().filter(|(other, _)| collide(address, *other)).map(|(_, inode)| inode));
    }
    found
}

/// Of this thread's network namespace; `/proc/net` is of the process's first thread.
fn open(name: &str) -> Option<BufReader<File>> {
    File::open(format!("/proc/thread-self/net/{name}")).ok().map(BufReader::new)
}

fn collide(wanted: SocketAddr, other: SocketAddr) -> bool {
    let (a, b) = (wanted.ip(), other.ip());
    let overlap = a == b || a.is_unspecified() || b.is_unspecified();
    // An IPv6 wildcard may serve IPv4 too; an IPv4 one never serves IPv6.
    let families = a.is_ipv4() == b.is_ipv4() || (b.is_ipv6() && b.is_unspecified());
    wanted.port() == other.port() && overlap && families
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    #[test]
    fn finds_this_process() {
        let own = format!("(pid {})", std::process::id());
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = tcp.local_addr().expect("address");
        assert!(of_port(Protocol::Tcp, address).expect("found").contains(&own));
        let any = SocketAddr::new([0, 0, 0, 0].into(), address.port());
        assert!(of_port(Protocol::Tcp, any).expect("found").contains(&own));
        let udp = UdpSocket::bind("[::1]:0").expect("bind");
        assert!(of_port(Protocol::Udp, udp.local_addr().expect("address")).expect("found").contains(&own));
        drop(tcp);
        assert_eq!(of_port(Protocol::Tcp, address), None);
    }

    #[test]
    fn other_addresses_do_not_collide() {
        let address = |text: &str| text.parse::<SocketAddr>().expect("address");
        assert!(!collide(address("127.0.0.1:53"), address("127.0.0.53:53")));
        assert!(!collide(address("127.0.0.1:53"), address("127.0.0.1:54")));
        assert!(!collide(address("[::1]:53"), address("0.0.0.0:53")));
        assert!(collide(address("127.0.0.1:53"), address("[::]:53")));
    }
}

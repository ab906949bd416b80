//! Counts what passes an interface, by flow: the truth that flow counters are
//! compared with.
//!
//! Packets are counted as they are on the wire: one that the stack carries
//! whole but a real device would send as several (GSO) counts as several.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Result, ensure};
use etherparse::{Ipv4HeaderSlice, Ipv6FragmentHeader, Ipv6HeaderSlice};

use xtask::lab::Namespace;

use crate::packet_socket::PacketSocket;

/// What was counted in one direction of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Packets on the wire.
    pub(crate) packets: u64,
    /// Their IP-layer bytes.
    pub(crate) bytes: u64,
    /// Those with the TCP SYN flag.
    pub(crate) syn: u64,
    /// Those with the TCP RST flag.
    pub(crate) rst: u64,
}

/// Protocol number, source and destination of a packet. Ports are 0 where the protocol has none.
pub(crate) type Direction = (u8, SocketAddr, SocketAddr);

#[derive(Debug, Default)]
struct Traffic {
    flows: HashMap<Direction, Count>,
    /// Ports of datagrams that came in fragments, or what came before the first.
    fragments: HashMap<(IpAddr, IpAddr, u8, u32), Fragments>,
}

#[derive(Debug)]
enum Fragments {
    Ports(u16, u16),
    Pending(Count),
}

/// A running capture; ends when dropped.
#[derive(Debug)]
pub(crate) struct Capture {
    traffic: Arc<Mutex<Traffic>>,
    socket: Arc<PacketSocket>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures on an interface, both directions.
    ///
    /// # Errors
    /// Where there is no such interface, or no right to capture.
    pub(crate) fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = Arc::new(namespace.enter(|| PacketSocket::open(interface))??);
        let traffic = Arc::new(Mutex::new(Traffic::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (reader, shared, stopped) = (socket.clone(), traffic.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while !stopped.load(Ordering::Relaxed) {
                if !reader.wait() {
                    continue;
                }
                let mut traffic = shared.lock().unwrap_or_else(PoisonError::into_inner);
                // In batches: whoever asks for counts waits for this lock.
                for _ in 0..1000 {
                    let Some((gso_size, frame)) = reader.read(&mut buffer) else {
                        break;
                    };
                    traffic.count(gso_size, frame);
                }
            }
        });
        Ok(Self { traffic, socket, stop, thread: Some(thread) })
    }

    /// What was seen so far in one direction.
    #[must_use]
    pub(crate) fn count(&self, protocol: u8, from: SocketAddr, to: SocketAddr) -> Count {
        self.sum(|direction| *direction == (protocol, from, to))
    }

    /// The sum of all directions that `wanted` picks.
    #[must_use]
    pub(crate) fn sum(&self, wanted: impl Fn(&Direction) -> bool) -> Count {
        let traffic = self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = Count::default();
        for (_, count) in traffic.flows.iter().filter(|(direction, _)| wanted(direction)) {
            sum.add(*count);
        }
        sum
    }

    /// All directions that were seen.
    #[must_use]
    pub(crate) fn directions(&self) -> Vec<Direction> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner).flows.keys().copied().collect()
    }

    /// Refuses to vouch for counts of a capture that lost packets.
    ///
    /// # Errors
    /// Where the kernel dropped some since the capture started or was last asked.
    pub(crate) fn expect_complete(&self) -> Result<()> {
        let lost = self.socket.lost()?;
        ensure!(lost == 0, "the capture itself lost {lost} packets: its counts prove nothing");
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Count {
    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.syn += other.syn;
        self.rst += other.rst;
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ETHERNET: usize = 14;

/// A packet's IP layer, and where it stands in its datagram.
struct Ip<'a> {
    source: IpAddr,
    target: IpAddr,
    protocol: u8,
    /// IP-layer bytes, of which headers before the transport.
    total: u64,
    header: u64,
    /// Identification, and whether it is the first piece, of a fragment.
    fragment: Option<(u32, bool)>,
    transport: &'a [u8],
}

impl Traffic {
    fn count(&mut self, gso_size: u16, frame: &[u8]) {
        let Some(ip) = parse(frame) else { return };
        let mut count = Count { packets: 1, bytes: ip.total, ..Count::default() };
        if ip.protocol == TCP && ip.transport.len() > 13 && ip.fragment.is_none_or(|(_, first)| first) {
            count.syn = u64::from(ip.transport[13] >> 1 & 1);
            count.rst = u64::from(ip.transport[13] >> 2 & 1);
        }
        if gso_size > 0 {
            let transport_header = if ip.protocol == TCP {
                u64::from(ip.transport.get(12).copied().unwrap_or(0) >> 4) * 4
            } else {
                8
            };
            let headers = ip.header + transport_header;
            let data = ip.total.saturating_sub(headers);
            count.packets = data.div_ceil(u64::from(gso_size));
            count.bytes = data + count.packets * headers;
        }
        let ports = match (ip.protocol, ip.fragment) {
            (TCP | UDP, None | Some((_, true))) if ip.transport.len() >= 4 => {
                let port = |at: usize| u16::from_be_bytes([ip.transport[at], ip.transport[at + 1]]);
                Some((port(0), port(2)))
            }
            (TCP | UDP, Some((id, false))) => self.ports_of(&ip, id, count),
            _ => Some((0, 0)),
        };
        let Some((source_port, target_port)) = ports else {
            return;
        };
        if let Some((id, true)) = ip.fragment {
            let known = self
                .fragments
                .insert((ip.source, ip.target, ip.protocol, id), Fragments::Ports(source_port, target_port));
            if let Some(Fragments::Pending(earlier)) = known {
                count.add(earlier);
            }
        }
        let direction =
            (ip.protocol, SocketAddr::new(ip.source, source_port), SocketAddr::new(ip.target, target_port));
        self.flows.entry(direction).or_default().add(count);
    }

    /// Ports of a later fragment; where its first has not come yet, it is counted with that.
    fn ports_of(&mut self, ip: &Ip, id: u32, count: Count) -> Option<(u16, u16)> {
        let known = self
            .fragments
            .entry((ip.source, ip.target, ip.protocol, id))
            .or_insert(Fragments::Pending(Count::default()));
        match known {
            Fragments::Ports(source, target) => Some((*source, *target)),
            Fragments::Pending(pending) => {
                pending.add(count);
                None
            }
        }
    }
}

fn parse(frame: &[u8]) -> Option<Ip<'_>> {
    let packet = frame.get(ETHERNET..)?;
    match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
            let offset = header.fragments_offset().value();
            let fragmented = header.more_fragments() || offset > 0;
            Some(Ip {
                source: header.source_addr().into(),
                target: header.destination_addr().into(),
                protocol: header.protocol().0,
                total: header.total_len().into(),
                header: header.slice().len() as u64,
                fragment: fragmented.then(|| (header.identification().into(), offset == 0)),
                transport: &packet[header.slice().len()..],
            })
        }
        [0x86, 0xdd] => {
            let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
            let rest = &packet[header.slice().len()..];
            let mut ip = Ip {
                source: header.source_addr().into(),
                target: header.destination_addr().into(),
                protocol: header.next_header().0,
                total: u64::from(header.payload_length()) + header.slice().len() as u64,
                header: header.slice().len() as u64,
                fragment: None,
                transport: rest,
            };
            if ip.protocol == FRAGMENT {
                let (fragment, rest) = Ipv6FragmentHeader::from_slice(rest).ok()?;
                ip.protocol = fragment.next_header.0;
                ip.header += Ipv6FragmentHeader::LEN as u64;
                ip.fragment = fragment
                    .is_fragmenting_payload()
                    .then(|| (fragment.identification, fragment.fragment_offset.value() == 0));
                ip.transport = rest;
            }
            Some(ip)
        }
        _ => None,
    }
}

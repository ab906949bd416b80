//! Truncated and malformed packets are never misread: they pass, or are
//! dropped, as they are without a proxy (H12).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::peer::{TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{Scenarios, at, expect_service, service, start_proxy};
use crate::packet::{self, Segment};
use crate::packet_socket::PacketSocket;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H12_malformed_packets_pass_or_are_dropped_as_before", |lab, family| {
        as_before(lab, family, "--iface lan")
    }),
    ("H12_damaged_packets_reach_nobody", damaged),
    ("clsact_H12_malformed_packets_pass_or_are_dropped_as_before", |lab, family| {
        as_before(lab, family, "--iface lan --attach clsact")
    }),
];

const PORT: u16 = 5700;

/// An IP packet and what is wrong with it.
struct Case {
    what: &'static str,
    packet: Vec<u8>,
}

/// Builds cases from a good packet; each gets a number that can be read on the
/// wire: the identification of IPv4, the flow label of IPv6.
struct Cases {
    family: Family,
    cases: Vec<Case>,
}

const MARKER: u16 = 0x7a00;

impl Cases {
    fn add(&mut self, what: &'static str, good: &[u8], spoil: impl FnOnce(&mut Vec<u8>)) {
        let mut packet = good.to_vec();
        let number = MARKER | u16::try_from(self.cases.len()).unwrap_or(0xff);
        let at = self.family.pick(4, 2);
        packet[at..at + 2].copy_from_slice(&number.to_be_bytes());
        spoil(&mut packet);
        self.cases.push(Case { what, packet });
    }

    /// As [`add`](Self::add), with the header checksum and length set right
    /// afterwards, as far as there is a header.
    fn add_mended(&mut self, what: &'static str, good: &[u8], spoil: impl FnOnce(&mut Vec<u8>)) {
        let family = self.family;
        self.add(what, good, |packet| {
            spoil(packet);
            let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
            match family {
                Family::V4 => {
                    packet[2..4].copy_from_slice(&length.to_be_bytes());
                    mend_checksum(packet);
                }
                Family::V6 => packet[4..6].copy_from_slice(&(length - 40).to_be_bytes()),
            }
        });
    }
}

/// The header checksum of IPv4, RFC 1071.
fn mend_checksum(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let header = (usize::from(packet[0] & 0x0f) * 4).min(packet.len());
    let mut sum: u32 = packet[..header]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).unwrap_or(0);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Good packets of both protocols to start from.
struct Good {
    syn: Vec<u8>,
    udp: Vec<u8>,
    /// Bytes of the IP header.
    header: usize,
}

fn good(family: Family) -> Result<Good> {
    let (from, to) = (at(family.client(), 4444), at(family.anywhere(1), PORT));
    let syn = packet::tcp(from, to, &Segment { sequence: 1, syn: true, ..Segment::default() })?;
    let udp = packet::udp_fragments(from, to, b"is anybody there?", 1000, 1)?;
    let [udp] = &udp[..] else { anyhow::bail!("a small datagram became several packets") };
    // The builder of fragments puts a fragment header into every IPv6 packet.
    let udp = match family {
        Family::V4 => udp.clone(),
        Family::V6 => {
            let mut whole = [&udp[..40], &udp[48..]].concat();
            let length = u16::try_from(whole.len() - 40)?;
            whole[4..6].copy_from_slice(&length.to_be_bytes());
            whole[6] = 17;
            whole
        }
    };
    Ok(Good { syn, udp, header: family.pick(20, 40) })
}

/// What the parser must not take for a TCP or UDP packet, or for the beginning of one.
fn misleading(family: Family) -> Result<Vec<Case>> {
    let Good { syn, udp, header } = good(family)?;
    let mut cases = Cases { family, cases: Vec::new() };
    for good in [&syn, &udp] {
        cases.add("version 5", good, |p| p[0] = 0x50 | (p[0] & 0x0f));
        cases.add("cut in the IP header", good, |p| p.truncate(header - 6));
    }
    cases.add_mended("UDP without its ports", &udp, |p| p.truncate(header + 2));
    cases.add_mended("UDP without anything", &udp, |p| p.truncate(header));
    cases.add_mended("TCP cut before its flags", &syn, |p| p.truncate(header + 12));
    cases.add_mended("TCP header of 16 bytes", &syn, |p| p[header + 12] = 0x40);
    cases.add_mended("TCP header of no bytes", &syn, |p| p[header + 12] = 0x00);
    cases.add_mended("TCP header longer than the packet", &syn, |p| p[header + 12] = 0xf0);
    for (what, flags) in [
        ("TCP without flags", 0x00),
        ("SYN and FIN", 0x03),
        ("SYN and RST", 0x06),
        ("all flags", 0xff),
        ("FIN alone", 0x01),
    ] {
        cases.add_mended(what, &syn, |p| p[header + 13] = flags);
    }
    match family {
        Family::V4 => {
            cases.add("header of 16 bytes", &udp, |p| p[0] = 0x44);
            cases.add_mended("header longer than the packet", &udp, |p| p[0] = 0x4f);
            cases.add("shorter by its header than that is", &udp, |p| {
                p[2..4].copy_from_slice(&10_u16.to_be_bytes());
                mend_checksum(p);
            });
            cases.add("header checksum", &udp, |p| p[10] ^= 0x55);
            cases.add("IPv6 in a frame of IPv4", &udp, |p| p[0] = 0x60);
        }
        Family::V6 => {
            cases.add("IPv4 in a frame of IPv6", &udp, |p| p[0] = 0x45);
            let behind = |p: &mut Vec<u8>, number: u8, extension: &[u8]| {
                p[6] = number;
                p.splice(40..40, extension.iter().copied());
            };
            cases.add_mended("extension header cut short", &udp, |p| {
                p.truncate(44);
                p[6] = 60;
            });
            cases.add_mended("extension header longer than the packet", &udp, |p| {
                behind(p, 60, &[17, 200, 1, 4, 0, 0, 0, 0]);
            });
            cases.add_mended("routing header with segments left", &udp, |p| {
                behind(p, 43, &[17, 0, 253, 1, 0, 0, 0, 0]);
            });
            cases.add_mended("fragment header cut short", &udp, |p| {
                p.truncate(44);
                p[6] = 44;
            });
            cases.add_mended("no next header", &udp, |p| p[6] = 59);
        }
    }
    Ok(cases.cases)
}

/// A hardware address, as `ip` prints it.
fn hardware_address(namespace: &Namespace, device: &str) -> Result<[u8; 6]> {
    let output = namespace.sh(&format!("ip -oneline link show dev {device}"))?;
    let mut words = output.stdout.split_whitespace().skip_while(|word| *word != "link/ether");
    let text = words.nth(1).with_context(|| format!("{device} has no hardware address"))?;
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text} is no hardware address"))
}

/// Sends packets from the client's link to the router's.
struct Sender {
    socket: PacketSocket,
    link: Vec<u8>,
}

impl Sender {
    fn new(lab: &Lab, family: Family) -> Result<Self> {
        let (to, from) = (hardware_address(&lab.router, "lan")?, hardware_address(&lab.client, "eth0")?);
        let kind = family.pick([0x08, 0x00], [0x86, 0xdd]);
        let socket = lab.client.enter(|| PacketSocket::open("eth0"))??;
        Ok(Self { socket, link: [&to[..], &from, &kind].concat() })
    }

    fn send(&self, cases: &[Case]) -> Result<()> {
        for case in cases {
            let frame = [&self.link[..], &case.packet].concat();
            self.socket.send(&frame).with_context(|| format!("cannot send: {}", case.what))?;
        }
        Ok(())
    }
}

/// Sends the cases: those that the router forwards to the server's link, as they arrive there.
fn forwarded(lab: &Lab, family: Family, cases: &[Case]) -> Result<BTreeSet<String>> {
    let sender = Sender::new(lab, family)?;
    let observer = lab.router.enter(|| PacketSocket::open("wan"))??;
    sender.send(cases)?;
    let mut found = BTreeSet::new();
    let mut buffer = [0; 512];
    let until = Instant::now() + Duration::from_millis(400);
    while Instant::now() < until {
        if !observer.wait() {
            continue;
        }
        while let Some((_, frame)) = observer.read(&mut buffer) {
            let Some(packet) = frame.get(14..) else { continue };
            let number = family.pick(4, 2);
            let is_clients = match family.client() {
                IpAddr::V4(client) => packet.get(12..16) == Some(&client.octets()[..]),
                IpAddr::V6(client) => packet.get(8..24) == Some(&client.octets()[..]),
            };
            let Some([high, low]) = packet.get(number..number + 2) else { continue };
            if is_clients && u16::from(*high) << 8 == MARKER {
                let case = cases.get(usize::from(*low)).map_or("?", |case| case.what);
                found.insert(format!("{low}: {case}"));
            }
        }
    }
    Ok(found)
}

fn as_before(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _service = service(lab, family)?;
    // The router has to know its neighbours, or it drops for want of them.
    expect_service(lab, family)?;
    let cases = misleading(family)?;
    let without = forwarded(lab, family, &cases)?;
    ensure!(without.len() > 4, "without a proxy only these are forwarded: {without:?}");
    let proxy = start_proxy(lab, flags)?;
    let with = forwarded(lab, family, &cases)?;
    ensure!(
        with == without,
        "forwarded with a proxy but not without: {:?}; without but not with: {:?}",
        with.difference(&without).collect::<Vec<_>>(),
        without.difference(&with).collect::<Vec<_>>()
    );
    let (truncated, malformed) = (proxy.counter("truncated")?, proxy.counter("malformed")?);
    ensure!(truncated > 0 && malformed > 0, "counted: {truncated} truncated, {malformed} malformed");
    expect_service(lab, family).context("after malformed packets")
}

/// Headers that can be read, but whose packet a host would refuse: no
/// application may get anything of it, and the proxy goes on.
fn damaged(lab: &Lab, family: Family) -> Result<()> {
    let Good { syn, udp, header } = good(family)?;
    let mut cases = Cases { family, cases: Vec::new() };
    cases.add_mended("TCP checksum", &syn, |p| p[header + 16] ^= 0x55);
    cases.add_mended("UDP checksum", &udp, |p| p[header + 6] ^= 0x55);
    cases.add_mended("UDP length of 4", &udp, |p| p[header + 4..header + 6].copy_from_slice(&[0, 4]));
    cases.add_mended("UDP length of more than there is", &udp, |p| p[header + 4] = 0x10);
    cases.add_mended("cut in the data", &udp, |p| p.truncate(header + 12));
    cases.add("longer by its header than it is", &udp, |p| p[family.pick(2, 4)] = 0x10);
    match family {
        Family::V4 => {
            cases.add_mended("first fragment of 4 bytes", &udp, |p| {
                p.truncate(header + 4);
                p[6] = 0x20;
            });
            cases.add_mended("fragment over the TCP header", &syn, |p| p[7] = 1);
        }
        Family::V6 => {
            cases.add_mended("a fragment without the others", &udp, |p| {
                p[6] = 44;
                p.splice(40..40, [17, 0, 0, 8, 0, 0, 0, 1]);
            });
            cases.add_mended("hop-by-hop header that is not the first", &udp, |p| {
                p[6] = 60;
                p.splice(40..40, [0, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0]);
            });
        }
    }
    let reached = Arc::new(AtomicU32::new(0));
    let (of_tcp, of_udp) = (reached.clone(), reached.clone());
    let to = at(family.anywhere(1), PORT);
    let _tcp = TcpServer::start(&lab.server, to, move |_, _| {
        of_tcp.fetch_add(1, Ordering::Relaxed);
    })?;
    let _udp = UdpServer::start(&lab.server, to, move |_, _| {
        of_udp.fetch_add(1, Ordering::Relaxed);
        None
    })?;
    let _service = service(lab, family)?;
    let running = crate::common::start(lab, "--iface lan")?;
    expect_service(lab, family)?;
    let sender = Sender::new(lab, family)?;
    for _ in 0..20 {
        sender.send(&cases.cases)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    let count = reached.load(Ordering::Relaxed);
    ensure!(count == 0, "{count} damaged packets reached an application of the server");
    expect_service(lab, family).context("after damaged packets")?;
    running.expect_udp(2)
}

//! What it costs to read the headers of a packet, by its kind and its bytes: the parser that the
//! kernel runs, as userspace compiles it. What a packet costs in the programs themselves
//! tells `cargo xtask bench --cases packet`.

mod brief;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use tproxy_common::abi::{TCP, UDP};
use tproxy_common::wire::{Packet, Skip, icmp, parse_v4, parse_v6};

/// Extension headers (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// One that reads packets.
type Parser<'a> = fn(&&'a [u8]) -> Result<Packet, Skip>;

/// An IPv4 packet with this in the word of flags and fragment offset.
fn v4(protocol: u8, fragment: u16, payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ipv4([10, 0, 0, 1], [192, 0, 2, 1], 64);
    let mut packet = Vec::new();
    let payload = vec![0; payload];
    let written = match protocol {
        TCP => builder.tcp(40_000, 443, 1, 64_000).ack(1).write(&mut packet, &payload),
        _ => builder.udp(40_000, 53).write(&mut packet, &payload),
    };
    written.expect("a packet");
    packet[6..8].copy_from_slice(&fragment.to_be_bytes());
    packet
}

/// The same with options, all of which do nothing.
fn v4_options(words: u8, payload: usize) -> Vec<u8> {
    let mut packet = v4(TCP, 0x4000, payload);
    packet[0] += words;
    packet.splice(20..20, vec![1; usize::from(words) * 4]);
    let length = u16::try_from(packet.len()).expect("short");
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet
}

/// An IPv6 packet with these extension headers of 8 bytes each, a fragment header with this offset
/// and flag.
fn v6(protocol: u8, extensions: &[u8], fragment: u16, payload: usize) -> Vec<u8> {
    let (client, server) = ([0x20; 16], [0x21; 16]);
    let builder = PacketBuilder::ipv6(client, server, 64);
    let mut packet = Vec::new();
    let payload = vec![0; payload];
    let written = match protocol {
        TCP => builder.tcp(40_000, 443, 1, 64_000).ack(1).write(&mut packet, &payload),
        _ => builder.udp(40_000, 53).write(&mut packet, &payload),
    };
    written.expect("a packet");
    for kind in extensions.iter().rev() {
        let [high, low] = if *kind == FRAGMENT { fragment.to_be_bytes() } else { [0; 2] };
        let header = [packet[6], 0, high, low, 0, 0, 0, 7];
        packet.splice(40..40, header);
        packet[6] = *kind;
    }
    let length = u16::try_from(packet.len() - 40).expect("short");
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    packet
}

/// An ICMP error that went to who sent this packet.
fn error_v4(about: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let unreachable = PacketBuilder::ipv4([192, 0, 2, 254], [10, 0, 0, 1], 64).icmpv4_raw(3, 1, [0; 4]);
    unreachable.write(&mut packet, about).expect("a packet");
    packet
}

/// The same over IPv6.
fn error_v6(about: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let unreachable = PacketBuilder::ipv6([0x22; 16], [0x20; 16], 64).icmpv6_raw(1, 0, [0; 4]);
    unreachable.write(&mut packet, about).expect("a packet");
    packet
}

fn headers(criterion: &mut Criterion) {
    let six = [HOP_BY_HOP, DESTINATION_OPTIONS, 60, 60, 60, 60];
    let cases: [(&str, Parser<'_>, Vec<u8>); 17] = [
        ("IPv4 TCP", parse_v4, v4(TCP, 0x4000, 0)),
        ("IPv4 TCP", parse_v4, v4(TCP, 0x4000, 1460)),
        ("IPv4 TCP, 40 bytes of options", parse_v4, v4_options(10, 0)),
        ("IPv4 UDP", parse_v4, v4(UDP, 0, 64)),
        ("IPv4 UDP", parse_v4, v4(UDP, 0, 1472)),
        ("IPv4 UDP, first fragment", parse_v4, v4(UDP, 0x2000, 1472)),
        ("IPv4 UDP, later fragment", parse_v4, v4(UDP, 0x00b9, 1472)),
        ("IPv6 TCP", parse_v6, v6(TCP, &[], 0, 0)),
        ("IPv6 TCP", parse_v6, v6(TCP, &[], 0, 1440)),
        ("IPv6 TCP, 1 extension header", parse_v6, v6(TCP, &[DESTINATION_OPTIONS], 0, 0)),
        ("IPv6 TCP, 6 extension headers", parse_v6, v6(TCP, &six, 0, 0)),
        ("IPv6 UDP", parse_v6, v6(UDP, &[], 0, 64)),
        ("IPv6 UDP", parse_v6, v6(UDP, &[], 0, 1452)),
        ("IPv6 UDP, first fragment", parse_v6, v6(UDP, &[FRAGMENT], 1, 1444)),
        ("IPv6 UDP, later fragment", parse_v6, v6(UDP, &[FRAGMENT], 0x05a8, 1444)),
        ("ICMP error", icmp::error_v4, error_v4(&v4(UDP, 0, 64))),
        ("ICMPv6 error", icmp::error_v6, error_v6(&v6(UDP, &[], 0, 64))),
    ];
    let mut group = criterion.benchmark_group("headers");
    group.throughput(Throughput::Elements(1));
    for (name, parse, packet) in &cases {
        let packet = packet.as_slice();
        // One that is skipped at its first byte would be quick.
        assert_eq!(parse(&packet).map(|_| ()), Ok(()), "{name}");
        let id = BenchmarkId::new(*name, format_args!("{} bytes", packet.len()));
        group.bench_function(id, |bencher| bencher.iter(|| parse(black_box(&packet))));
    }
    group.finish();
}

criterion_group! { name = benches; config = brief::criterion(); targets = headers }
criterion_main!(benches);

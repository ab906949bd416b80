//! What is pure of a flow's way through the programs, by the number of packets: its key, the worker
//! of its client, its state, addresses that are never proxied, what a merged packet was on the wire.

mod brief;

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tproxy_common::abi::{Addr, Family, Flow, FlowKey, TCP, mapped};
use tproxy_common::classify::{is_special, on_the_wire, segments};
use tproxy_common::flow::{tcp_seen, worker};

/// Packets of one turn: more than a branch predictor learns by heart.
const PACKETS: u32 = 4096;

/// What a packet has of these.
struct Packet {
    source: Addr,
    destination: Addr,
    ports: (u16, u16),
    flow: Flow,
    /// Length, that of its headers, the segments and the size of each, as the kernel has them.
    length: [u32; 4],
}

/// Scattered numbers (`SplitMix64`, Steele et al., OOPSLA 2014), the same in each run.
fn scattered(number: u32) -> u64 {
    let mut z = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn packet(number: u32, family: Family) -> Packet {
    let bytes = scattered(number).to_le_bytes();
    let [client, server] = match family {
        Family::V4 => {
            let [.., high, low] = bytes;
            [mapped([10, 0, high, low]), mapped(*bytes.first_chunk().expect("there are eight"))]
        }
        Family::V6 => [0, 4].map(|at| {
            let mut addr = [0; 16];
            addr[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
            addr[12..].copy_from_slice(&bytes[at..at + 4]);
            addr
        }),
    };
    let flow = Flow {
        seen_up: tcp_seen::SYN | tcp_seen::ACK | bytes[0] & tcp_seen::ALL,
        seen_down: bytes[1] & tcp_seen::ALL,
        ..Flow::default()
    };
    let merged = u32::from(bytes[2] % 45);
    Packet {
        source: client,
        destination: server,
        ports: (u16::from_le_bytes([bytes[3], bytes[4]]), 443),
        flow,
        length: [52 + merged * 1448, 52, merged * u32::from(bytes[5] & 1), 1448],
    }
}

/// Measures something of all packets.
fn each<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    packets: &[Packet],
    what: impl Fn(&Packet) -> T,
) {
    group.throughput(Throughput::Elements(packets.len() as u64));
    group.bench_function(BenchmarkId::new(name, format_args!("{} packets", packets.len())), |bencher| {
        bencher.iter(|| {
            for packet in packets {
                black_box(what(black_box(packet)));
            }
        });
    });
}

fn flows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow");
    let [v4, v6] =
        [Family::V4, Family::V6].map(|family| (0..PACKETS).map(|n| packet(n, family)).collect::<Vec<_>>());
    each(&mut group, "key of a request", &v4, |packet| {
        FlowKey::up(TCP, packet.source, packet.destination, packet.ports.0, packet.ports.1)
    });
    each(&mut group, "key of an answer", &v4, |packet| {
        FlowKey::down(TCP, packet.source, packet.destination, packet.ports.0, packet.ports.1)
    });
    each(&mut group, "worker of a client", &v4, |packet| worker(&packet.source, packet.ports.0, 2));
    each(&mut group, "state", &v4, |packet| packet.flow.state(TCP));
    each(&mut group, "merged packet", &v4, |packet| {
        let [ip_len, header_len, gso_segs, gso_size] = packet.length;
        on_the_wire(ip_len, header_len, segments(ip_len, header_len, gso_segs, gso_size))
    });
    for (name, family, packets) in
        [("special address, IPv4", Family::V4, &v4), ("special address, IPv6", Family::V6, &v6)]
    {
        each(&mut group, name, packets, |packet| {
            is_special(&packet.source, family) || is_special(&packet.destination, family)
        });
    }
    group.finish();
}

criterion_group! { name = benches; config = brief::criterion(); targets = flows }
criterion_main!(benches);

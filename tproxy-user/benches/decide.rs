//! What it costs to decide by rules in userspace, by their number and by that of their networks and
//! names. What the same rules cost a new flow in the kernel tells `cargo xtask bench --cases policy`.

#[path = "../../tproxy-common/benches/brief/mod.rs"]
mod brief;
mod sets;

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tproxy_common::abi::{Family, TCP, mapped};
use tproxy_common::policy::Known;
use tproxy_user::policy::asked::NamedRules;
use tproxy_user::policy::facts::{Memory, Packet};

use sets::{BY_FILE, address, networks, port, rules};

/// Packets of one turn.
const PACKETS: u64 = 1024;

/// Of every two packets the first is for one of so many rules or networks, the second for none.
fn packet(number: u64, of: u64) -> Packet {
    let listed = number / 2 * 7919 % of.max(1);
    let to = if number.is_multiple_of(2) { listed } else { number << 32 };
    let ports = (40_000, u16::try_from(port(listed)).expect("a port"));
    Packet {
        family: Family::V4,
        source: mapped([10, 0, 0, 1]),
        destination: mapped(address(to).octets()),
        ports: Known::Is(ports),
        protocol: TCP,
        ..Packet::EMPTY
    }
}

/// Measures deciding over packets, of which every other one is for one of `of`.
fn decisions(criterion: &mut Criterion, directory: &Path, name: &str, sets: [(u64, String); 4]) {
    let mut group = criterion.benchmark_group("decide");
    group.throughput(Throughput::Elements(PACKETS));
    for (of, rules) in sets {
        let config = directory.join("tproxy.toml");
        std::fs::write(directory.join("networks"), networks(of)).expect("written");
        std::fs::write(&config, rules).expect("written");
        let image = Memory(sets::image(&config));
        let packets: Vec<_> = (0..PACKETS).map(|number| packet(number, of)).collect();
        group.bench_function(
            BenchmarkId::new(format!("{PACKETS} packets"), format!("{of} {name}")),
            |bencher| {
                bencher.iter(|| {
                    for packet in &packets {
                        black_box(image.decide(black_box(packet)));
                    }
                });
            },
        );
    }
    group.finish();
}

/// Names that a rule lists: every third one all that are below it.
fn names(count: u64) -> String {
    (0..count).fold(String::new(), |text, number| {
        let wildcard = if number.is_multiple_of(3) { "*." } else { "" };
        text + wildcard + &listed(number) + "\n"
    })
}

fn listed(number: u64) -> String {
    format!("name-{number}.example")
}

/// Measures deciding by the name that was found in a connection's first bytes.
fn by_name(criterion: &mut Criterion, directory: &Path) {
    let mut group = criterion.benchmark_group("decide by name");
    group.throughput(Throughput::Elements(PACKETS));
    for of in [1, 1_000, 100_000] {
        let config = directory.join("tproxy.toml");
        std::fs::write(directory.join("names"), names(of)).expect("written");
        let rule = "[[rule]]\ndomain_file = \"names\"\naction = \"pass\"\n";
        std::fs::write(&config, rule).expect("written");
        let (set, rules) = sets::read(&config);
        let named = NamedRules::of(&set, &rules).expect("rules that fit").expect("one asks for names");
        let asked: Vec<_> = (0..PACKETS)
            .map(|number| match number % 4 {
                0 => listed(number * 7919 % of),
                1 => format!("www.{}", listed(number * 7919 % of)),
                2 => format!("www.{number}.test"),
                _ => format!("a.b.c.d.e.f.g.h.{number}.test"),
            })
            .collect();
        let id = BenchmarkId::new(format!("{PACKETS} connections"), format!("{of} names"));
        group.bench_function(id, |bencher| {
            bencher.iter(|| {
                for name in &asked {
                    black_box(named.decide(black_box(name), Packet { protocol: TCP, ..Packet::EMPTY }, 0));
                }
            });
        });
    }
    group.finish();
}

fn benches(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a directory");
    let by_rules = [1, 10, 100, 1_000].map(|count| (count, rules(count)));
    decisions(criterion, directory.path(), "rules", by_rules);
    let by_networks = [1, 100, 10_000, 100_000].map(|count| (count, BY_FILE.to_owned()));
    decisions(criterion, directory.path(), "networks of a rule", by_networks);
    by_name(criterion, directory.path());
}

criterion_group! { name = all; config = brief::criterion(); targets = benches }
criterion_main!(all);

//! What rules cost: to read, to load, and a new flow in the kernel, by their number and
//! by that of their networks. `cargo xtask bench --cases policy` runs it. Writes JSON as well,
//! to the file that `TPROXY_BENCH_JSON` names.
//!
//! Each new flow is one packet through `tproxy_capture` by `BPF_PROG_TEST_RUN`, whose
//! own clock tells the time. The sets take turns, some flows each, so that all meet the same
//! noise, and each finds in the cache what it would find there by itself; the figure is the
//! median. Exits with 1 where a bound does not hold.

#[path = "../tests/golden/kernel/mod.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod kernel;
#[path = "../tests/golden/packets.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod packets;
mod report;
mod sets;
#[path = "../tests/golden/skip.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod skip;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;
use tproxy_common::abi::{Family, TCP, mapped, program};
use tproxy_common::policy::Known;
use tproxy_user::policy::facts::Packet;

use kernel::{Kernel, usual};
use sets::{BY_FILE, address};

/// Turns of each set, and new flows in each.
const TURNS: u32 = 30;
const FLOWS: u32 = 200;

/// The most that reading, compiling and loading may take together.
const LOADING: Duration = Duration::from_secs(3);

/// The most that a new flow may cost, in terms of one by the smallest set of rules.
const COST: f64 = 1.5;

/// The smallest set: one rule, with one network. No rule at all is decided without a look at any.
const SMALLEST: &str = "1 network";

/// The most that rules may take in the kernel, in bytes.
const MEMORY: usize = 200 << 20;

/// A set of rules, as a config file and the file of networks that it names.
struct Case {
    name: &'static str,
    config: String,
    networks: u64,
}

fn cases() -> Vec<Case> {
    let case = |name, config: &str, networks| Case { name, config: config.to_owned(), networks };
    vec![
        case("no rule", "", 0),
        case(SMALLEST, BY_FILE, 1),
        case("1,000 networks", BY_FILE, 1_000),
        case("1,000,000 networks", BY_FILE, 1_000_000),
        case("1,000 rules", &sets::rules(1_000), 0),
    ]
}

/// What was measured of a set.
struct Measured {
    name: &'static str,
    loading: Duration,
    bytes: usize,
    kernel: Kernel,
    flows: Vec<Duration>,
}

fn load(case: &Case, directory: &Path) -> Measured {
    let config = directory.join("tproxy.toml");
    std::fs::write(directory.join("networks"), sets::networks(case.networks)).expect("written");
    std::fs::write(&config, &case.config).expect("written");
    let mut kernel = Kernel::new(&usual());
    let begun = Instant::now();
    let image = sets::image(&config);
    kernel.set_image(&image);
    let loading = begun.elapsed();
    Measured { name: case.name, loading, bytes: size_of_val(&*image), kernel, flows: Vec::new() }
}

/// The first packet of a flow that has not been yet.
fn opening(number: u32) -> Vec<u8> {
    packets::opening(&Packet {
        family: Family::V4,
        source: mapped([10, 0, 0, 1]),
        destination: mapped(address(u64::from(number) << 32).octets()),
        ports: Known::Is((40_000, 443)),
        protocol: TCP,
        ..Packet::EMPTY
    })
}

fn median(flows: &mut [Duration]) -> Duration {
    flows.sort_unstable();
    flows[flows.len() / 2]
}

fn main() -> ExitCode {
    let directory = tempfile::tempdir().expect("a directory");
    let mut sets: Vec<_> = cases().iter().map(|case| load(case, directory.path())).collect();
    for turn in 0..TURNS {
        for set in &mut sets {
            for flow in 0..FLOWS {
                let packet = opening(turn * FLOWS + flow);
                set.flows.push(set.kernel.time(program::CAPTURE, &packet, 1));
            }
        }
    }
    println!("{:<20} {:>10} {:>12} {:>12} {:>6}", "rules", "loading", "memory", "a new flow", "ratio");
    let mut fine = true;
    let mut results = Vec::new();
    let smallest = sets.iter_mut().find(|set| set.name == SMALLEST).map(|set| median(&mut set.flows));
    let smallest = smallest.expect("one of the sets").as_secs_f64();
    for set in &mut sets {
        let flow = median(&mut set.flows);
        let ratio = flow.as_secs_f64() / smallest;
        let (loading, kib) = (set.loading.as_secs_f64(), set.bytes.div_ceil(1024));
        println!("{:<20} {loading:>8.3} s {kib:>8} KiB {:>9} ns {ratio:>6.2}", set.name, flow.as_nanos());
        results.push(json!({
            "name": set.name, "loading_seconds": loading, "bytes": set.bytes, "new_flow_ns": flow.as_secs_f64() * 1e9,
        }));
        fine &= set.loading < LOADING && ratio < COST && set.bytes < MEMORY;
    }
    report::write(&results);
    if fine {
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "too much: loading may take {LOADING:?}, a new flow {COST} of one by {SMALLEST}, {MEMORY} bytes"
    );
    ExitCode::FAILURE
}

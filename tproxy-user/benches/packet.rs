//! What a packet costs in each program, in nanoseconds: `BPF_PROG_TEST_RUN` runs the program
//! on the same packet a million times and divides its own clock, so everything is in the cache.
//! `cargo xtask bench --cases packet` runs it. Writes JSON as well, to the file that
//! `TPROXY_BENCH_JSON` names. `TPROXY_BENCH_RUNS`: as many runs instead, for
//! `cargo xtask bench --quick`, where a nanosecond is an instruction.

#[path = "../tests/golden/kernel/mod.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod kernel;
#[path = "../tests/golden/packets.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod packets;
mod report;
#[path = "../tests/golden/skip.rs"]
#[allow(dead_code, reason = "the golden tests use more of it")]
mod skip;

use serde_json::json;
use tproxy_common::abi::{Settings, program};

use kernel::{Kernel, usual};
use packets as p;

const RUNS: u32 = 1_000_000;
/// Least of so many.
const TURNS: usize = 5;

fn main() {
    let settings = Settings { early_demux: 1, coarse_clock: 1, ..usual() };
    let runs =
        std::env::var("TPROXY_BENCH_RUNS").map_or(RUNS, |runs| runs.parse().expect("a number of runs"));
    let mut kernel = Kernel::new(&settings);
    for packet in [p::syn_v4(), p::syn_v6(), p::udp_v4(64), p::udp_v6(64)] {
        kernel.run(program::CAPTURE, &packet);
    }
    let cases = [
        ("capture: TCP, a known flow", program::CAPTURE, p::ack_v4()),
        ("capture: UDP, a known flow", program::CAPTURE, p::udp_v4(64)),
        ("capture: UDP over IPv6, a known flow", program::CAPTURE, p::udp_v6(64)),
        ("uplink: TCP, no socket", program::UPLINK, p::reply_of(&p::ack_v4())),
        ("reply: TCP, a known flow", program::REPLY, p::reply_of(&p::ack_v4())),
        ("reply: UDP, a known flow", program::REPLY, p::reply_of(&p::udp_v4(64))),
        ("reply: UDP over IPv6, a known flow", program::REPLY, p::reply_of(&p::udp_v6(64))),
    ];
    println!("{:<40} {:>6}", "packet", "ns");
    let mut results = Vec::new();
    for (name, program, packet) in cases {
        let least = (0..TURNS).map(|_| kernel.time(program, &packet, runs)).min().unwrap_or_default();
        println!("{name:<40} {:>6}", least.as_nanos());
        results.push(json!({ "name": name, "ns": least.as_secs_f64() * 1e9 }));
    }
    report::write(&results);
}

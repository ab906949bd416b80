//! Instructions that the eBPF programs take for a packet, helpers and maps among them: what
//! `BPF_PROG_TEST_RUN` tells in a guest where a nanosecond is an instruction.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::checks::{self, Outcome};
use crate::vm::Kernel;
use crate::{build, vm};

/// Debian's stable kernels change little; what is counted is their code too.
const KERNEL: Kernel = Kernel::V6_1;

/// The fewest of five times so many runs are told: a tick of the timer is no part of a packet.
const SCRIPT: &str =
    "TPROXY_BENCH_RUNS=1000 TPROXY_BENCH_JSON=/tmp/packets ./packet-* >&2 && cat /tmp/packets\n";

/// A packet, as the benchmark tells of it.
#[derive(Deserialize)]
struct Packet {
    name: String,
    ns: f64,
}

/// Counts those of each packet of the benchmark `packet`.
pub(super) fn count() -> Result<Vec<Outcome>> {
    if cfg!(not(target_arch = "x86_64")) {
        println!("instructions of packets: skipped: the kernels are fetched for x86-64 only");
        return Ok(Vec::new());
    }
    let output = vm::run_counted(KERNEL, &build::benchmark("packet")?, SCRIPT)?;
    let json = output.find('[').map_or("", |begin| &output[begin..]);
    let packets: Vec<Packet> =
        serde_json::from_str(json).with_context(|| format!("the benchmark has told: {output}"))?;
    checks::PACKETS
        .iter()
        .map(|(name, check)| {
            let packet = packets.iter().find(|packet| packet.name == *name);
            Ok(check.seen(packet.with_context(|| format!("no packet {name:?} was measured"))?.ns.round()))
        })
        .collect()
}

//! Whether the kernel loads the programs, and how much of its patience they take.

use aya::programs::Program;
use tproxy_common::abi::Settings;

use crate::kernel::{load, usual};

tests![the_verifier_takes_every_program_of_both_builds,];

/// Of the million instructions that the verifier follows (`BPF_COMPLEXITY_LIMIT_INSNS`).
/// Linux 6.1 takes most, 250,000; the rest is left to the versions, which differ.
const MOST_VERIFIED: u32 = 260_000;

fn the_verifier_takes_every_program_of_both_builds() {
    for log in [false, true] {
        // Without own traffic, with it, and with faithful handshakes.
        for (own_traffic, handshake_ifindex) in [(0, 0), (1, 0), (1, 9)] {
            load_all(&Settings { own_traffic, handshake_ifindex, ..usual() }, log);
        }
    }
}

/// Loads every program of the default build or the debugging build.
fn load_all(settings: &Settings, log: bool) {
    let (mut datapath, features) = load(settings, log);
    for (name, program) in datapath.ebpf().programs_mut() {
        let (loaded, info) = match program {
            Program::SchedClassifier(program) => (program.load(), program.info()),
            Program::SocketFilter(program) => (program.load(), program.info()),
            Program::SkLookup(program) if features.sk_lookup() => (program.load(), program.info()),
            Program::CgroupSock(program) if features.socket_notes() => (program.load(), program.info()),
            Program::SkLookup(_) | Program::CgroupSock(_) => continue,
            other => panic!("{name}: an unexpected kind of program: {other:?}"),
        };
        loaded.unwrap_or_else(|error| panic!("{name}: {error}"));
        // Told since Linux 5.16.
        if let Some(count) = info.ok().and_then(|info| info.verified_instruction_count()) {
            assert!(count <= MOST_VERIFIED, "{name}: {count} instructions verified");
        }
    }
}

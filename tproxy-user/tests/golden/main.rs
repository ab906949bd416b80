//! Golden packets: the programs run on them in the kernel, by
//! `BPF_PROG_TEST_RUN`, and counters, mark and return code tell what was decided.
//!
//! Each test has a network namespace of its own, so it needs root; without it
//! they are shown as ignored, and so is a test that needs of `BPF_PROG_TEST_RUN`
//! what this kernel does not have. In a test run the packet is not "at ingress",
//! so that `bpf_sk_assign` answers EOPNOTSUPP: this counter stands for "was
//! handed to a socket".

/// Lists the tests of a module by name. One that is not in the list is dead code.
macro_rules! tests {
    ($($test:ident),+ $(,)?) => {
        pub(crate) const TESTS: &[(&str, fn())] =
            &[$((concat!(module_path!(), "::", stringify!($test)), $test)),+];
    };
}

mod capture;
mod corpus;
mod differential;
mod exchange;
mod fast_path;
mod fragments;
#[path = "../harness/mod.rs"]
mod harness;
mod headers;
mod hierarchy;
mod kernel;
mod link;
mod listeners;
mod names;
mod packets;
mod predict;
mod rules;
mod sides;
mod skip;
mod verdicts;
mod verifier;

use clap::Parser as _;
use libtest_mimic::Trial;

fn main() {
    let root = nix::unistd::geteuid().is_root();
    let modules = [
        capture::TESTS,
        differential::TESTS,
        exchange::TESTS,
        fast_path::TESTS,
        fragments::TESTS,
        headers::TESTS,
        link::TESTS,
        listeners::TESTS,
        names::TESTS,
        rules::TESTS,
        sides::TESTS,
        verdicts::TESTS,
        verifier::TESTS,
    ];
    let trials = modules
        .into_iter()
        .flatten()
        .map(|(name, test)| {
            let name = name.trim_start_matches("golden::");
            let test = || skip::run(*test);
            if root {
                Trial::ignorable_test(name, test)
            } else {
                Trial::ignorable_test(name, test).with_kind("needs root").with_ignored_flag(true)
            }
        })
        .collect();
    let (arguments, trials) = harness::CommandLine::parse().select(trials);
    libtest_mimic::run(&arguments, trials).exit();
}

//! End-to-end scenarios, each in network namespaces of its own with real programs.
//!
//! Names such as `T7_…` are those of the conformance list; every scenario runs
//! with IPv4 and with IPv6, some with both at once. `cargo xtask test netns` builds
//! the proxy and runs this; arguments are those of libtest: `cargo xtask test netns -- T7`.
//!
//! With `TPROXY_LAB_DIRECT=1` no proxy is started: what a scenario expects of a
//! transparent proxy must hold for plain forwarding too.

mod account;
mod bad_input;
mod bounds;
mod bridge;
mod capture;
mod common;
mod company;
mod doctor;
mod domains;
mod faults;
mod firewall;
mod flood;
mod foreign;
mod group;
mod handshake;
#[path = "../../../tproxy-user/tests/harness/mod.rs"]
mod harness;
mod host;
mod icmp;
mod idle;
mod interfaces;
mod leftovers;
mod links;
mod malformed;
mod matching;
mod nat;
mod offloads;
mod options;
mod outside;
mod packet;
mod packet_socket;
mod pass;
mod patience;
mod policy;
mod reload;
mod report;
mod snapshot;
mod soak;
mod sockopt;
mod tcp;
mod tcp_end;
mod tun;
mod udp;
mod udp_errors;
mod upkeep;
mod upstream;
mod variants;
mod wire;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::process::ExitCode;
use std::thread;

use clap::Parser as _;
use libtest_mimic::{Completion, Failed, Trial};
use serde_json::Value;
use xtask::lab::selection::{IDLE, Selection};
use xtask::lab::{Family, Lab, load, proxy, reclaim};

use common::{Scenario, Scenarios, Skip};
use harness::CommandLine;

/// What rests on what kernels came to have at different times, see the README's
/// table of them: each kernel of the matrix runs these.
const CORE: [&str; 10] = [
    "T1_tcp_source_client",
    "T2_udp_source_client",
    "T7_client_port_reused_at_once",
    "T10_datagrams_of_0_to_65000_bytes",
    "T13_late_packets_stay_here",
    "H10_own_and_captured_traffic_together",
    "attach_clsact_is_told_and_chosen",
    "attach_tcx_is_told_and_chosen",
    "nothing_left_after_sigterm",
    "policy_by_group",
];

fn main() -> ExitCode {
    let selection = match set_up().and_then(|()| Selection::from_environment()) {
        Ok(selection) => selection,
        Err(error) => {
            eprintln!("cannot run scenarios: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    // On other kernels these would show nothing new: the program's own behaviour,
    // and loads that take a slow machine long.
    let here: &[Scenarios] = &[
        bounds::SCENARIOS,
        flood::SCENARIOS,
        patience::SCENARIOS,
        soak::SCENARIOS,
        faults::SCENARIOS,
        matching::SCENARIOS,
        bad_input::SCENARIOS,
        doctor::SCENARIOS,
    ];
    // First those that wait most, so that others run meanwhile.
    let anywhere: &[Scenarios] = &[
        upkeep::SCENARIOS,
        interfaces::SCENARIOS,
        tcp::SCENARIOS,
        tcp_end::SCENARIOS,
        handshake::SCENARIOS,
        udp::SCENARIOS,
        pass::SCENARIOS,
        host::SCENARIOS,
        outside::SCENARIOS,
        bridge::SCENARIOS,
        links::SCENARIOS,
        firewall::SCENARIOS,
        options::SCENARIOS,
        malformed::SCENARIOS,
        offloads::SCENARIOS,
        variants::SCENARIOS,
        udp_errors::SCENARIOS,
        account::SCENARIOS,
        nat::SCENARIOS,
        icmp::SCENARIOS,
        leftovers::SCENARIOS,
        report::SCENARIOS,
        company::SCENARIOS,
        policy::SCENARIOS,
        group::SCENARIOS,
        domains::SCENARIOS,
    ];
    // What the family makes no difference to: both in one run.
    let once: &[Scenarios] =
        if selection.is_some() { &[] } else { &[policy::ONCE, group::ONCE, reload::ONCE, upstream::ONCE] };
    let all =
        if selection.is_some() { anywhere.to_vec() } else { [upstream::SCENARIOS, anywhere, here].concat() };
    let mut trials = Vec::new();
    for (number, (name, scenario)) in all.into_iter().flatten().enumerate() {
        let core = CORE.contains(name);
        for family in Family::ALL {
            let taken = selection.is_none_or(|selection| selection.takes(number, core, family));
            if taken {
                let name = format!("{name}::{}", family.name());
                trials.push(Trial::ignorable_test(name, move || run(*scenario, family)));
            }
        }
    }
    for (name, scenario) in once.iter().copied().flatten() {
        let name = format!("{name}::both");
        trials.push(Trial::ignorable_test(name, move || run(*scenario, Family::V4)));
    }
    if std::env::args().any(|argument| argument == IDLE) {
        trials.push(Trial::ignorable_test(format!("{IDLE}::v4"), || run(idle::idle, Family::V4)));
    }
    let (mut arguments, trials) = CommandLine::parse().select(trials);
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    // Scenarios wait for most of their time; more at a time would measure the
    // machine and not the proxy.
    arguments.test_threads.get_or_insert(4 * cores);
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn set_up() -> anyhow::Result<()> {
    reclaim::on_signals()?;
    load::raise_open_files()?;
    if !proxy::is_direct() {
        proxy::binary()?;
    }
    Ok(())
}

fn run(scenario: Scenario, family: Family) -> Result<Completion, Failed> {
    let lab = Lab::new().map_err(|error| format!("{error:#}"))?;
    match scenario(&lab, family) {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(skip) => Ok(Completion::ignored_with(skip.to_string())),
            None => Err(format!("{error:#}\n{}{}", logs(&lab), counters(&lab)).into()),
        },
    }
}

/// The ends of what the proxies of a failed scenario have logged.
fn logs(lab: &Lab) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(lab.dir()).into_iter().flatten().filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("tproxy-user.") {
            continue;
        }
        let log = fs::read(entry.path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n    ");
        text.extend(["  ", &name, ", its last lines:\n    ", &end, "\n"]);
    }
    text
}

/// What the eBPF programs of a failed scenario have counted. The proxy has been
/// killed by now; its maps are still pinned.
fn counters(lab: &Lab) -> String {
    let read = || -> anyhow::Result<BTreeMap<String, u64>> {
        let map = lab.pin().join("COUNTERS");
        let output = lab.router.cmd("bpftool").args(["--json", "map", "dump", "pinned"]).arg(map).check()?;
        let entries: Value = serde_json::from_str(&output.stdout)?;
        let mut sums = BTreeMap::new();
        let cores = entries[0]["formatted"]["values"].as_array().into_iter().flatten();
        for (name, count) in cores.filter_map(|core| core["value"].as_object()).flatten() {
            *sums.entry(name.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
        sums.retain(|_, sum| *sum > 0);
        Ok(sums)
    };
    // Without a proxy, or after one that ended in good order, there is no map.
    read().map_or_else(|_| String::new(), |sums| format!("  counters: {sums:?}\n"))
}

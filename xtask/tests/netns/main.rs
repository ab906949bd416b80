//! End-to-end scenarios, each in network namespaces of its own with real programs.
//!
//! Names such as `T7_…` are those of the conformance list; every scenario runs
//! with IPv4 and with IPv6. `cargo xtask test netns` builds the proxy and runs
//! this; arguments are those of libtest: `cargo xtask test netns -- T7`.
//!
//! With `TPROXY_LAB_DIRECT=1` no proxy is started: what a scenario expects of a
//! transparent proxy must hold for plain forwarding too.

mod account;
mod bad_input;
mod capture;
mod common;
mod faults;
mod host;
mod leftovers;
mod matching;
mod packet;
mod packet_socket;
mod pass;
mod report;
mod snapshot;
mod sockopt;
mod tcp;
mod tcp_end;
mod udp;

use std::fs;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use xtask::lab::{Family, Lab, load, proxy, reclaim};

use common::{Scenario, Skip};

fn main() -> ExitCode {
    if let Err(error) = set_up() {
        eprintln!("cannot run scenarios: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut arguments = Arguments::from_args();
    // Each scenario has up to a dozen busy processes; more at a time would
    // measure the machine and not the proxy.
    arguments.test_threads.get_or_insert(2);
    let all = [
        tcp::SCENARIOS,
        tcp_end::SCENARIOS,
        udp::SCENARIOS,
        pass::SCENARIOS,
        host::SCENARIOS,
        faults::SCENARIOS,
        account::SCENARIOS,
        matching::SCENARIOS,
        report::SCENARIOS,
        leftovers::SCENARIOS,
        bad_input::SCENARIOS,
    ];
    let trials = all.into_iter().flatten().flat_map(|(name, scenario)| {
        Family::ALL.map(|family| {
            Trial::ignorable_test(format!("{name}::{}", family.name()), move || run(*scenario, family))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
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
            None => Err(format!("{error:#}\n{}", logs(&lab)).into()),
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

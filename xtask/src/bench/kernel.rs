//! What the programs cost in the kernel, told by the benchmarks of `tproxy-user/benches`.

use std::fs;
use std::io::ErrorKind;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use xtask::lab::reclaim;

use super::cases::Case;
use super::results;
use super::series::{Better, Figures, Metric, Of, Role, Series, Target};
use crate::build::{self, Profile};
use crate::workspace;

/// What is decided without a look at any rule.
const NO_RULE: &str = "no rule";

/// What the others are compared with.
const SMALLEST: &str = "1 network";

const LOADING: Metric = of("loading", "s", &[Target::Within(3.0)]);
const NEW_FLOW: Metric = of("a new flow", "ns", &[Target::AtMost(1.5, Of::Candidate(SMALLEST))]);
const MEMORY: Metric = of("memory in the kernel", "bytes", &[]);
const PACKET: Metric = of("a packet", "ns", &[]);

const fn of(name: &'static str, unit: &'static str, targets: &'static [Target]) -> Metric {
    Metric { name, unit, better: Better::Less, targets, plot: None }
}

/// A set of rules, as the benchmark `policy` tells of it.
#[derive(Deserialize)]
struct Rules {
    name: String,
    loading_seconds: f64,
    bytes: f64,
    new_flow_ns: f64,
}

/// A packet, as the benchmark `packet` tells of it.
#[derive(Deserialize)]
struct Packet {
    name: String,
    ns: f64,
}

/// Runs a benchmark: its figures, and whether it finds them fine.
pub(crate) fn run(case: Case) -> Result<(Vec<Series>, bool)> {
    build::ensure_all(Profile::Release)?;
    let path = results::directory()?.join(format!("{}.json", case.key()));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut cargo = workspace::cargo("bench");
    cargo.args(["--quiet", "--package", "tproxy-user", "--bench", case.key()]);
    // What it prints is shown as a table, as all the rest.
    let mut child = cargo.env("TPROXY_BENCH_JSON", &path).stdout(Stdio::null()).spawn()?;
    let signals = reclaim::supervise(child.id());
    let status = child.wait()?;
    drop(signals);
    ensure!(path.exists(), "the benchmark {} failed ({status}), see above", case.key());
    let text = fs::read_to_string(&path)?;
    let series = match case {
        Case::Policy => policy(&serde_json::from_str::<Vec<Rules>>(&text).context("policy.json")?),
        Case::Packet => packet(&serde_json::from_str::<Vec<Packet>>(&text).context("packet.json")?),
        _ => bail!("{} is not measured in the kernel", case.key()),
    };
    Ok((series, status.success()))
}

fn policy(sets: &[Rules]) -> Vec<Series> {
    let series = |metric, value: fn(&Rules) -> f64| {
        let figures = sets.iter().map(|set| {
            let is_reference = [NO_RULE, SMALLEST].contains(&set.name.as_str());
            let role = if is_reference { Role::Reference } else { Role::Ours };
            figures(&set.name, role, value(set))
        });
        Series { case: "policy", title: "rules".into(), metric, figures: figures.collect() }
    };
    vec![
        series(NEW_FLOW, |set| set.new_flow_ns),
        series(LOADING, |set| set.loading_seconds),
        series(MEMORY, |set| set.bytes),
    ]
}

fn packet(packets: &[Packet]) -> Vec<Series> {
    let figures = packets.iter().map(|packet| figures(&packet.name, Role::Ours, packet.ns)).collect();
    vec![Series { case: "packet", title: "the eBPF programs".into(), metric: PACKET, figures }]
}

fn figures(name: &str, role: Role, value: f64) -> Figures {
    Figures { key: name.into(), name: name.into(), role, rounds: vec![value], failure: None }
}

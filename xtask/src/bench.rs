//! `cargo xtask bench`: comparisons side by side, in one run.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::json;
use xtask::lab::load::{self, Load, LoadServer, Report, Times};
use xtask::lab::proxy::Launch;
use xtask::lab::{Family, Lab, Proxy, reclaim};

use crate::build::{self, Profile};
use crate::{needs, packages, workspace};

/// Flags of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure
    #[arg(value_name = "CASE", default_value = "steering")]
    case: Case,
    /// Rounds; each measures every candidate once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only these, separated by commas; else all
    #[arg(long, value_delimiter = ',', value_name = "PEER")]
    peers: Vec<Steered>,
    /// Seconds that one measurement lasts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
}

/// A comparison.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Case {
    /// New connections a second, and how long one takes: steered by eBPF, with eager and
    /// faithful handshakes, and by iptables TPROXY with the same relay
    Steering,
    /// What a packet costs in each eBPF program
    Packet,
    /// What rules cost, by their number and by that of their networks: to load, and a new
    /// flow in the kernel
    Policy,
}

/// What steers connections to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Steered {
    /// Nothing: plain forwarding
    Direct,
    /// The eBPF programs
    Ebpf,
    /// The eBPF programs, with `--handshake faithful`
    Faithful,
    /// iptables TPROXY, with the same relay
    Iptables,
    /// The same, with connection tracking that counts each flow's packets and bytes, as
    /// the eBPF programs do
    IptablesCounting,
}

impl Steered {
    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "no proxy (plain forwarding)",
            Self::Ebpf => "tproxy-user, its eBPF programs",
            Self::Faithful => "the same, --handshake faithful",
            Self::Iptables => "tproxy-user, iptables TPROXY",
            Self::IptablesCounting => "the same, flows counted",
        }
    }

    const fn key(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Ebpf => "ebpf",
            Self::Faithful => "faithful",
            Self::Iptables => "iptables",
            Self::IptablesCounting => "iptables-counting",
        }
    }
}

/// One candidate, ready to be measured again and again.
struct Candidate {
    steered: Steered,
    rates: Vec<f64>,
    /// Microseconds until one is connected, and until it has its response: medians of the rounds.
    connected: Vec<f64>,
    answered: Vec<f64>,
    _proxy: Option<Proxy>,
    server: LoadServer,
    // Dropped last.
    lab: Lab,
}

const PORT: u16 = 9000;

/// Destinations: enough that no side runs out of ports while closed connections linger.
const TARGETS: u16 = 64;

const CONCURRENCY: usize = 64;

/// Connections one after the other, for the times that one takes.
const ALONE: u64 = 500;

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    reclaim::on_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    load::raise_open_files()?;
    match args.case {
        Case::Packet => in_kernel("packet", "the benchmark failed, see above"),
        Case::Policy => in_kernel("policy", "rules cost more than they may, see above"),
        Case::Steering => {
            packages::ensure(needs::BENCH)?;
            let binary = build::ensure_all(Profile::Release)?.tproxy_user;
            steering(args, &binary)
        }
    }
}

/// What the programs cost, told by a benchmark of `tproxy-user/benches`.
fn in_kernel(bench: &str, failure: &'static str) -> Result<()> {
    build::ensure_all(Profile::Release)?;
    let mut cargo = workspace::cargo("bench");
    let status = cargo.args(["--quiet", "--package", "tproxy-user", "--bench", bench]).status()?;
    ensure!(status.success(), failure);
    Ok(())
}

fn steering(args: &Args, binary: &Path) -> Result<()> {
    println!(
        "New TCP connections a second: connect, 64 bytes each way, close; {CONCURRENCY} at a time,\n\
         {} rounds of {} s, the candidates in turn. Then {ALONE}, one after the other, for the time that one takes.",
        args.rounds, args.seconds
    );
    let mut candidates = Steered::value_variants()
        .iter()
        .filter(|steered| args.peers.is_empty() || args.peers.contains(steered))
        .map(|steered| prepare(*steered, binary))
        .collect::<Result<Vec<_>>>()?;
    for round in 1..=args.rounds {
        // There and back: what one leaves behind is not always paid by the same other.
        let mut order: Vec<_> = candidates.iter_mut().collect();
        if round % 2 == 0 {
            order.reverse();
        }
        for candidate in order {
            candidate
                .measure(Duration::from_secs(args.seconds))
                .with_context(|| format!("round {round}, {}", candidate.steered.name()))?;
        }
        let rates: Vec<String> = candidates
            .iter()
            .map(|candidate| {
                format!("{} {:.0}", candidate.steered.key(), candidate.rates[candidate.rates.len() - 1])
            })
            .collect();
        println!("round {round}: {}", rates.join(", "));
    }
    for candidate in &candidates {
        let strangers = candidate.server.foreign();
        ensure!(
            strangers == 0,
            "{}: {strangers} connections did not keep the client's address",
            candidate.steered.name()
        );
    }
    report(args, &candidates)
}

fn prepare(steered: Steered, binary: &Path) -> Result<Candidate> {
    let family = Family::V4;
    let lab = Lab::new()?;
    let server =
        LoadServer::start(&lab.server, SocketAddr::new(family.unspecified(), PORT), family.client())?;
    for namespace in [&lab.client, &lab.router] {
        namespace.set_sysctls(&[("net/ipv4/ip_local_port_range", "10000 65535")])?;
    }
    let flags = match steered {
        Steered::Direct => None,
        Steered::Ebpf => Some("--iface lan -4 --proto tcp"),
        Steered::Faithful => Some("--iface lan -4 --proto tcp --handshake faithful"),
        Steered::Iptables | Steered::IptablesCounting => Some("--steer none -4 --proto tcp"),
    };
    match steered {
        Steered::Iptables => iptables(&lab)?,
        Steered::IptablesCounting => {
            iptables(&lab)?;
            count_flows(&lab)?;
        }
        Steered::Direct | Steered::Ebpf | Steered::Faithful => {}
    }
    let proxy = flags.map(|flags| Launch::new(&lab, flags).binary(binary).start()).transpose()?;
    let (rates, connected, answered) = (Vec::new(), Vec::new(), Vec::new());
    Ok(Candidate { steered, rates, connected, answered, _proxy: proxy, server, lab })
}

/// What Documentation/networking/tproxy.rst of the kernel tells to set up.
fn iptables(lab: &Lab) -> Result<()> {
    for command in [
        "iptables -t mangle -N DIVERT",
        "iptables -t mangle -A DIVERT -j MARK --set-mark 1",
        "iptables -t mangle -A DIVERT -j ACCEPT",
        "iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j DIVERT",
        "iptables -t mangle -A PREROUTING -i lan -p tcp -j TPROXY --on-port 15001 --tproxy-mark 0x1/0x1",
        "ip rule add fwmark 1 lookup 100",
        "ip route add local 0.0.0.0/0 dev lo table 100",
    ] {
        lab.router.sh(command)?;
    }
    Ok(())
}

/// Connection tracking, which any rule that asks for a state turns on, with counters:
/// the table that `conntrack -L` lists.
fn count_flows(lab: &Lab) -> Result<()> {
    lab.router.sh("iptables -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT")?;
    // Ended connections leave its table at once: full, it would drop new ones.
    lab.router.set_sysctls(&[
        ("net/netfilter/nf_conntrack_acct", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_close", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_last_ack", "1"),
    ])?;
    Ok(())
}

impl Candidate {
    /// One round.
    fn measure(&mut self, duration: Duration) -> Result<()> {
        let targets = (1..=TARGETS).map(|n| SocketAddr::new(Family::V4.anywhere(n), PORT)).collect();
        let mut load =
            Load { targets, concurrency: CONCURRENCY, connections: u64::MAX, duration, reset: false };
        self.rates.push(self.run(&load)?.rate());
        (load.concurrency, load.connections) = (1, ALONE);
        let times = self.run(&load)?.times;
        let median = |of: fn(&Times) -> Duration| {
            let micros: Vec<f64> = times.iter().map(|times| of(times).as_secs_f64() * 1e6).collect();
            spread(&micros).0
        };
        self.connected.push(median(|times| times.connected));
        self.answered.push(median(|times| times.answered));
        Ok(())
    }

    fn run(&self, load: &Load) -> Result<Report> {
        let report = load.run(&self.lab.client, &AtomicBool::new(false))?;
        report.expect_all(report.completed)?;
        Ok(report)
    }
}

/// Median and extremes.
fn spread(rates: &[f64]) -> (f64, f64, f64) {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    (median, sorted[0], sorted[sorted.len() - 1])
}

fn report(args: &Args, candidates: &[Candidate]) -> Result<()> {
    let reference = candidates.iter().find(|candidate| candidate.steered == Steered::Iptables);
    let reference = reference.map(|reference| reference.rates.as_slice());
    println!(
        "\n{:<32} {:>10} {:>10} {:>10} {:>12}",
        "connections a second", "median", "least", "most", "of iptables"
    );
    let mut results = Vec::new();
    for candidate in candidates {
        let (median, least, most) = spread(&candidate.rates);
        // Round by round: what disturbs the machine for longer than a round disturbs both.
        let ratio = reference.map(|reference| {
            let ratios: Vec<f64> = candidate.rates.iter().zip(reference).map(|(a, b)| a / b).collect();
            spread(&ratios).0
        });
        let shown = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!("{:<32} {median:>10.0} {least:>10.0} {most:>10.0} {shown:>12}", candidate.steered.name());
        results.push(json!({
            "candidate": candidate.steered.key(), "rounds": candidate.rates,
            "median": median, "least": least, "most": most, "ratio_to_iptables": ratio,
            "connected_us": candidate.connected, "answered_us": candidate.answered,
        }));
    }
    println!("\n{:<32} {:>10} {:>10}", "one alone, µs (median)", "connected", "answered");
    for candidate in candidates {
        let (connected, answered) = (spread(&candidate.connected).0, spread(&candidate.answered).0);
        println!("{:<32} {connected:>10.0} {answered:>10.0}", candidate.steered.name());
    }
    let path = workspace::target().join("bench/steering.json");
    fs::create_dir_all(workspace::target().join("bench"))?;
    let result = json!({
        "case": "new TCP connections a second", "unit": "1/s", "seconds": args.seconds, "concurrency": CONCURRENCY, "results": results,
    });
    fs::write(&path, format!("{result:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nas JSON: {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(spread(&[5.0, 1.0, 3.0]), (3.0, 1.0, 5.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]), (3.0, 1.0, 9.0));
    }
}

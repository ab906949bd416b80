//! `cargo xtask bench`: comparisons side by side, in one run.

mod arena;
mod cases;
mod generator;
mod kernel;
mod limits;
mod measure;
mod peers;
mod plots;
mod processes;
mod proof;
pub(crate) mod quick;
mod results;
mod rounds;
mod series;
mod statistics;
mod table;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::reclaim;

use self::arena::Programs;
use self::cases::Case;
use self::peers::Peer;
use self::rounds::Comparison;
use self::series::Series;
use crate::build::{self, Profile};
use crate::{needs, packages};

/// Flags of `cargo xtask bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure, separated by commas; else all but `steering`
    #[arg(long, value_delimiter = ',', value_name = "CASE")]
    cases: Vec<Case>,
    /// Only these, separated by commas; else all that can do it, but no `exp-…`, nor `one-worker`
    #[arg(long, value_delimiter = ',', value_name = "PEER")]
    peers: Vec<Peer>,
    /// Rounds; each measures every candidate once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds that one measurement lasts; a third of it where that is enough
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Measure this `tproxy-user`, such as an installed one, and not what is built here; but for
    /// `policy` and `packet`
    #[arg(long, value_name = "PROGRAM", conflicts_with = "record")]
    tproxy_user: Option<PathBuf>,
    /// Write the results into README.md too, with their plots
    #[arg(long, conflicts_with_all = ["cases", "peers"])]
    record: bool,
    /// Only check what does not depend on the machine, in two minutes: system calls, segments,
    /// allocations, descriptors, memory, instructions a packet; part `bench` of `cargo xtask test`
    #[arg(long, exclusive = true)]
    quick: bool,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    reclaim::on_signals()?;
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    if args.quick {
        return check();
    }
    limits::raise()?;
    let plan = plan(args);
    let needs: Vec<_> =
        plan.iter().flat_map(|(_, peers)| peers).flat_map(|peer| peer.needs()).copied().collect();
    packages::ensure(&[needs::BENCH, needs.as_slice()].concat())?;
    let programs = Programs {
        tproxy_user: match &args.tproxy_user {
            None => build::ensure_all(Profile::Release)?.tproxy_user,
            // Absolute, wherever it is started.
            Some(path) => path
                .canonicalize()
                .with_context(|| format!("--tproxy-user {}: no program is there", path.display()))?,
        },
        tproxy_load: build::program("tproxy-load", Profile::Release)?,
        experiments: plan
            .iter()
            .any(|(_, peers)| peers.iter().any(|peer| peer.is_experiment()))
            .then(|| build::program("tproxy-experiments", Profile::Release))
            .transpose()?,
    };
    let conditions = results::Conditions::now(args.rounds, args.seconds)?;
    let mut comparison = Comparison::new(args.rounds, args.seconds, programs, &plan)?;
    let mut all: Vec<Series> = Vec::new();
    let mut bad = Vec::new();
    for (case, peers) in plan {
        let found = if case.in_kernel() {
            let (found, fine) = kernel::run(case)?;
            if !fine {
                bad.push(case.key());
            }
            found
        } else {
            comparison.run(case, &peers)?
        };
        for series in &found {
            println!("\n{}", table::text(series).trim_end());
        }
        all.extend(found);
        // After each case: what a later one ends is not lost.
        results::save(&conditions, &all)?;
    }
    println!("\n{}", table::summary(&all));
    for file in results::save(&conditions, &all)? {
        println!("{}", file.display());
    }
    if args.record {
        results::record(&conditions, &all)?;
    }
    ensure!(bad.is_empty(), "too much in the kernel, see above: {}", bad.join(", "));
    Ok(())
}

/// Runs the quick checks.
fn check() -> Result<()> {
    packages::ensure(needs::QUICK)?;
    let results = quick::run(&build::ensure_all(Profile::Release)?.tproxy_user, &[])?;
    print!("{}", results.table());
    let failures = results.failures();
    ensure!(failures.is_empty(), "not as it was:\n{}", failures.join("\n"));
    Ok(())
}

/// Cases, and who takes part in each.
fn plan(args: &Args) -> Vec<(Case, Vec<Peer>)> {
    let cases = if args.cases.is_empty() { Case::ALL.as_slice() } else { &args.cases };
    let chosen = |peer: &&Peer| args.peers.is_empty() || args.peers.contains(*peer);
    let asked = |case: Case| args.peers.iter().filter(move |peer| case.is_for_asked(**peer));
    let plan = cases.iter().map(|case| {
        let peers = case.peers().iter().filter(chosen).chain(asked(*case));
        (*case, peers.copied().collect())
    });
    plan.filter(|(case, peers): &(Case, Vec<Peer>)| case.in_kernel() || !peers.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experiments_take_part_only_where_they_are_asked_for() {
        let of = |peers: &[Peer]| {
            plan(&Args {
                cases: vec![Case::Bulk, Case::Connect],
                peers: peers.into(),
                rounds: 1,
                seconds: 1,
                tproxy_user: None,
                record: false,
                quick: false,
            })
        };
        let (_, all) = &of(&[])[0];
        assert!(all.contains(&Peer::Ebpf) && !all.iter().any(|peer| peer.is_experiment()), "{all:?}");
        let asked = [Peer::Direct, Peer::ExpCopy];
        assert_eq!(of(&asked), [(Case::Bulk, asked.into()), (Case::Connect, vec![Peer::Direct])]);
        let fewest = [Peer::ExpConnections];
        assert_eq!(of(&fewest), [(Case::Connect, fewest.into())]);
        let worker = [Peer::OneWorker];
        assert_eq!(of(&worker), [(Case::Bulk, worker.into()), (Case::Connect, worker.into())]);
    }
}

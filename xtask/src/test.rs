//! `cargo xtask test`: builds the tests, runs them, counts.

mod choice;
mod execute;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde_json::Value;
use xtask::lab::reclaim;

use self::choice::{Choice, chosen};
use self::execute::execute;
use crate::bench::quick;
use crate::build::{self, Profile};
use crate::fuzz::{Fuzzers, Target};
use crate::recap::Recap;
use crate::term::{Step, say};
use crate::totals::Totals;
use crate::vm::{Kernel, Matrix};
use crate::{needs, packages, vm, workspace};

/// Flags of `cargo xtask test`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Parts to run [default: all]; a kernel's version stands for part vm on that kernel
    #[arg(value_name = "PART|KERNEL")]
    choices: Vec<Choice>,
    /// Run only tests whose name contains one of these; flags of libtest such as --list
    #[arg(last = true, value_name = "FILTER")]
    filters: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask test                 everything
  cargo xtask test unit golden     two parts
  cargo xtask test netns -- T7     the end-to-end scenarios that are called T7…
  cargo xtask test vm              golden and netns on all other kernels
  cargo xtask test vm 6.1 newest   on these kernels, and there everything
  cargo xtask test 5.10 -- T7      some scenarios on one kernel
  cargo xtask test newest -- idle_100000_connections
                                   what each of 100,000 idle connections takes: 7 to 26 minutes

The last line says how many passed, failed and, if any, were skipped. A test that
cannot run on this machine is skipped with its reason, and never counts as passed.
Parts `golden` and `netns` need root.

Part `vm` boots Debian's kernels in QEMU, without root, acceleration or an installed
kernel. They are fetched with apt from the Debian mirror that this machine uses, and
kept in target/vm for a week, beside results.json and each guest's console. In the
whole matrix each scenario runs on one kernel with one family, those that rest on what
kernels came to have at different times on all; on a kernel that is named everything
runs, which takes half an hour. What a kernel lacks is skipped with the version that
has it; on a kernel that should have it, that is a failure.";

/// A group of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Pure logic, and sockets on loopback: unit and property tests of all crates
    Unit,
    /// The eBPF programs on prepared packets, run by the kernel itself
    Golden,
    /// The whole proxy with real programs in network namespaces, and its relay behind iptables TPROXY
    Netns,
    /// What each connection and datagram costs the proxy: system calls, segments, allocations,
    /// descriptors, memory, instructions of the eBPF programs
    Bench,
    /// The parser and the classification on inputs that a fuzzer makes, for some seconds
    Fuzz,
    /// `golden` and `netns` on Linux 5.10, 6.1, 6.12 and the newest, in virtual machines
    Vm,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Golden => "golden",
            Self::Netns => "netns",
            Self::Bench => "bench",
            Self::Fuzz => "fuzz",
            Self::Vm => "vm",
        }
    }

    /// Whether an executable of cargo's belongs to it.
    fn has(self, target: &str) -> bool {
        match self {
            Self::Unit => !["golden", "netns", "relay_netns"].contains(&target),
            Self::Golden => target == "golden",
            Self::Netns => ["netns", "relay_netns"].contains(&target),
            Self::Vm => ["golden", "netns"].contains(&target),
            Self::Bench | Self::Fuzz => false,
        }
    }

    /// Whether it needs privileges on this kernel.
    const fn needs_root(self) -> bool {
        matches!(self, Self::Golden | Self::Netns | Self::Bench)
    }

    /// How long one of its executables may run; a fuzz target runs all that time. The steps of
    /// the benchmark have limits of their own.
    const fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Unit | Self::Bench => 180,
            Self::Golden => 240,
            Self::Netns | Self::Vm => 1200,
            Self::Fuzz => 4,
        })
    }

    /// Arguments of `cargo test`, of each run that builds something of it; none where cargo does not.
    const fn selections(self) -> &'static [&'static [&'static str]] {
        const NETNS: &[&str] = &["--package", "xtask", "--package", "tproxy-user", "--test", "*netns"];
        match self {
            // Builds those of the other parts too: they need nothing that is not there anyway.
            Self::Unit => &[&["--workspace", "--exclude", "tproxy-ebpf", "--lib", "--bins", "--tests"]],
            Self::Golden => &[&["--package", "tproxy-user", "--test", "golden"]],
            Self::Netns => &[NETNS],
            Self::Bench | Self::Fuzz => &[],
            Self::Vm => &[&["--package", "tproxy-user", "--test", "golden"], NETNS],
        }
    }
}

/// A test executable that cargo has built.
struct Executable {
    target: String,
    name: String,
    path: PathBuf,
    /// The directory of its package, where cargo would run it.
    home: PathBuf,
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    reclaim::on_signals()?;
    let (parts, kernels) = chosen(&args.choices);
    let (mut totals, mut recap) = (Totals::default(), Recap::default());
    match prepare(&parts) {
        Ok(proxy) => {
            for part in parts {
                totals.add(run_part(part, &kernels, &args.filters, proxy.as_deref(), &mut recap));
            }
        }
        Err(error) => {
            say(&format!("error: cannot build what is to be tested: {error:#}"));
            totals.failed += 1;
        }
    }
    print!("{}", recap.text());
    println!("{}", totals.line());
    // The line above stays the last one: no error message follows it.
    std::process::exit(i32::from(totals.failed > 0));
}

/// Builds what the tests themselves do not; gives the proxy to be tested.
fn prepare(parts: &[Part]) -> Result<Option<PathBuf>> {
    if parts == [Part::Fuzz] {
        return Ok(None);
    }
    if [Part::Netns, Part::Bench, Part::Vm].iter().any(|part| parts.contains(part)) {
        if is_root() {
            if parts.contains(&Part::Bench) {
                packages::ensure(needs::QUICK)?;
            }
            if parts != [Part::Bench] {
                packages::ensure(needs::NETNS)?;
            }
        }
        // The build that users run is the one that is tested.
        return Ok(Some(build::ensure_all(Profile::Release)?.tproxy_user));
    }
    let (_lock, toolchain) = build::prepare()?;
    build::objects(&toolchain)?;
    Ok(None)
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn run_part(
    part: Part,
    kernels: &[Kernel],
    filters: &[String],
    proxy: Option<&Path>,
    recap: &mut Recap,
) -> Totals {
    if part == Part::Fuzz {
        return fuzz(filters, recap);
    }
    if part.needs_root() && !is_root() {
        println!("{}: skipped: needs root (run `sudo -E env PATH=\"$PATH\" cargo xtask test`)", part.name());
        return Totals { skipped: 1, ..Totals::default() };
    }
    if part == Part::Bench {
        return bench(filters, proxy, recap);
    }
    let executables = match compile(part) {
        Ok(executables) => executables,
        Err(error) => {
            recap.tell(format!("{}: FAILED: {error:#}", part.name()));
            return Totals { failed: 1, ..Totals::default() };
        }
    };
    let mut totals = Totals::default();
    if part == Part::Vm {
        match run_vm(&executables, kernels, filters, proxy, recap) {
            Ok(counts) => totals.add(counts),
            Err(error) => {
                recap.tell(format!("vm: FAILED: {error:#}"));
                totals.failed += 1;
            }
        }
        return totals;
    }
    for executable in executables {
        match execute(part, &executable, filters, proxy, recap) {
            Ok(counts) => totals.add(counts),
            Err(error) => {
                recap.tell(format!("{}: FAILED: {}: {error:#}", part.name(), executable.name));
                totals.failed += 1;
            }
        }
    }
    totals
}

/// Runs the quick checks of the benchmark, each as one test.
fn bench(filters: &[String], proxy: Option<&Path>, recap: &mut Recap) -> Totals {
    let results = proxy.context("no tproxy-user was built").and_then(|proxy| quick::run(proxy, filters));
    let results = match results {
        Ok(results) => results,
        Err(error) => {
            recap.tell(format!("{}: FAILED: {error:#}", Part::Bench.name()));
            return Totals { failed: 1, ..Totals::default() };
        }
    };
    let failures = results.failures();
    let totals = Totals { passed: results.passed(), failed: failures.len() as u64, skipped: 0 };
    if totals != Totals::default() {
        print!("\n{}: what each costs the proxy\n{}", Part::Bench.name(), results.table());
    }
    for failure in failures {
        recap.tell(format!("{}: FAILED: {failure}", Part::Bench.name()));
    }
    totals
}

/// Runs the fuzz targets, each as one test.
fn fuzz(filters: &[String], recap: &mut Recap) -> Totals {
    let part = Part::Fuzz;
    let chosen =
        |target: &Target| filters.is_empty() || filters.iter().any(|filter| target.name().contains(filter));
    let targets: Vec<_> = Target::tests().filter(chosen).collect();
    let fuzzers = match Fuzzers::build(&targets) {
        Ok(fuzzers) => fuzzers,
        Err(error) => {
            recap.tell(format!("{}: FAILED: {error:#}", part.name()));
            return Totals { failed: 1, ..Totals::default() };
        }
    };
    let mut totals = Totals::default();
    println!("\n{}: tproxy-common/fuzz", part.name());
    for target in targets {
        match fuzzers.fuzz(target, part.limit()) {
            Ok(inputs) => {
                println!("test {} ... ok ({inputs} inputs)", target.name());
                totals.passed += 1;
            }
            Err(error) => {
                recap.tell(format!("test {} ... FAILED: {error:#}", target.name()));
                totals.failed += 1;
            }
        }
    }
    totals
}

fn run_vm(
    executables: &[Executable],
    kernels: &[Kernel],
    filters: &[String],
    proxy: Option<&Path>,
    recap: &mut Recap,
) -> Result<Totals> {
    let test = |of: &Executable| vm::Test { name: of.target.clone(), path: of.path.clone() };
    let tests: Vec<_> = executables.iter().map(test).collect();
    let proxy = proxy.context("no tproxy-user was built")?;
    Matrix { kernels, tests: &tests, proxy, filters }.run(recap)
}

/// Builds the executables of a part.
fn compile(part: Part) -> Result<Vec<Executable>> {
    let path = workspace::target().join(format!("log/test-{}.json", part.name()));
    fs::create_dir_all(workspace::target().join("log"))?;
    let label = format!("building the tests of part {}", part.name());
    let mut executables = Vec::new();
    for selection in part.selections() {
        let mut cargo = workspace::cargo("test");
        cargo.args(["--locked", "--no-run", "--message-format", "json-render-diagnostics"]).args(*selection);
        Step::new(&label, &format!("test-{}", part.name())).stdout(&path).run(&mut cargo)?;
        let messages = fs::read_to_string(&path)?;
        executables.extend(messages.lines().filter_map(executable).filter(|found| part.has(&found.target)));
    }
    if executables.is_empty() {
        bail!("cargo built no test of part {}", part.name());
    }
    Ok(executables)
}

/// Reads the test executable that one of cargo's messages tells of.
fn executable(message: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["profile"]["test"] != true {
        return None;
    }
    let target = message["target"]["name"].as_str()?;
    let kinds: BTreeSet<_> = message["target"]["kind"].as_array()?.iter().filter_map(Value::as_str).collect();
    let manifest = Path::new(message["manifest_path"].as_str()?);
    let home = manifest.parent()?.to_owned();
    let package = home.file_name()?.to_string_lossy().into_owned();
    let name = match kinds.first() {
        Some(&"test") => format!("{package}, tests/{target}"),
        Some(&"bin") => format!("{package}, program {target}"),
        _ => package,
    };
    let path = message["executable"].as_str()?.into();
    Some(Executable { target: target.to_owned(), name, path, home })
}

#[cfg(test)]
#[path = "../../tproxy-user/tests/harness/mod.rs"]
mod harness;

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use libtest_mimic::Trial;

    use super::*;

    #[test]
    fn each_of_several_filters_selects_tests() {
        let selected = |words: &str| {
            let command = harness::CommandLine::parse_from(std::iter::once("golden").chain(words.split(' ')));
            let trials = ["one", "two", "onetwo", "three"].map(|name| Trial::test(name, || Ok(())));
            let (arguments, trials) = command.select(trials.into());
            // What is left to libtest-mimic.
            let runs = trials.iter().filter(|trial| !arguments.is_filtered_out(trial));
            runs.map(|trial| trial.name().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(selected("one"), ["one", "onetwo"]);
        assert_eq!(selected("two hr"), ["two", "onetwo", "three"]);
        assert_eq!(selected("--exact one two"), ["one", "two"]);
        assert_eq!(selected("one --skip onet --test-threads 2 two"), ["one", "two"]);
        assert_eq!(selected("four five"), [""; 0]);
    }

    #[test]
    fn executables_are_found_and_named() {
        let message = r#"{"reason":"compiler-artifact","manifest_path":"/w/tproxy-user/Cargo.toml","target":{"kind":["test"],
            "name":"golden"},"profile":{"test":true},"executable":"/t/golden-1"}"#;
        let found = executable(&message.replace('\n', "")).expect("a test executable");
        assert_eq!(found.name, "tproxy-user, tests/golden");
        let parts: Vec<_> = Part::value_variants().iter().filter(|part| part.has(&found.target)).collect();
        assert_eq!(parts, [&Part::Golden, &Part::Vm]);
        assert!(executable(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}

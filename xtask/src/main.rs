//! The development tasks of tproxy: `cargo xtask --help`.

mod bench;
mod build;
mod compiler;
mod demo;
mod fuzz;
mod install;
mod linker;
mod lint;
mod needs;
mod packages;
mod recap;
mod term;
mod test;
mod toolchain;
mod totals;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The tasks of tproxy: set up, build, show, test, install.
///
/// Every task finds or installs what it needs, says so, and is quick the
/// second time. Nothing outside this checkout's target directory is touched,
/// but for distribution packages, which are named before they are installed,
/// and for what `build-ebpf` and `install` install.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

const EXAMPLES: &str = "\
Start here:
  cargo xtask demo                 see it work: three network namespaces, real traffic
  cargo xtask test                 run every test that can run on this machine
  cargo xtask build-ebpf && sudo tproxy-user --iface eth0
                                   build it and proxy what arrives on eth0

Environment:
  TPROXY_BPF_RUSTC=PATH            compile the eBPF programs with this rustc and no other
  CARGO_TARGET_DIR=DIR             where the userspace is built; the eBPF objects, the
                                   linker and the logs of the set-up stay in ./target";

#[derive(Subcommand)]
enum Task {
    /// Show the proxy at work in network namespaces, then remove everything
    Demo(demo::Args),
    /// Run the tests
    Test(test::Args),
    /// Build the eBPF objects and the `tproxy-user` that embeds them
    BuildEbpf(build::Args),
    /// Install the binary, man pages, shell completions, systemd unit, options file
    Install(install::Args),
    /// Measure, side by side with what others do
    Bench(bench::Args),
    /// Try what reads packets and names on inputs that a fuzzer makes
    Fuzz(fuzz::Args),
    /// Check format, lints, manifests and, where cargo-deny is installed, licences and advisories
    Lint(lint::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::BuildEbpf(args) => build::run(&args),
        Task::Install(args) => install::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Lint(args) => lint::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            term::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

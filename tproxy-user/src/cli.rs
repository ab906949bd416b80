//! The command line. Help, man pages and completions all come from here.
//!
//! [`Cli`] is what was typed; [`merge::config_file`] adds what a config file says,
//! and [`resolve::config`] turns both into the [`Config`](crate::config::Config)
//! that everything else reads.

#![expect(clippy::doc_markdown, reason = "the doc comments here are help texts, which have no markup")]

pub(crate) mod parse;
pub(crate) use parse::is_glob;
pub mod merge;
pub mod resolve;

mod run;

pub use run::{CaptureArgs, LimitArgs, RunArgs, SourceArgs, SteeringArgs, TimeoutArgs};

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::policy::question::Question;

/// Defaults that several commands share.
pub mod default {
    /// Directory of the pinned maps and links.
    pub const PIN: &str = "/sys/fs/bpf/tproxy";
}

const EXAMPLES: &str = "\
Examples:
  tproxy-user --iface eth0
        Relay all TCP and UDP that arrives on eth0 for anywhere but this host;
        servers see the client's own address.
  tproxy-user --iface br-lan --iface 'wg*' --not-to 10.0.0.0/8 --not-to fd00::/8
        Two kinds of interface, and private networks left to the kernel.
  tproxy-user --iface eth0 --proto udp --dport 53,853 --source proxy
        DNS only, and servers see this host's address.
  tproxy-user --config /etc/tproxy/tproxy.toml
        What that file says, and rules for single networks, ports, users and more.
  tproxy-user check --iface eth0
        Print what that would set up, and change nothing (needs no root).
  tproxy-user doctor --iface eth0
        Look for what on this host would keep that from working, and what mends it.
  tproxy-user flows
        Who talks to whom, with packets and bytes each way.

Exit codes: 0 done, 1 failed at run time (doctor: a FAIL), 2 wrong usage,
3 not running, 4 missing privilege or kernel feature, 5 something is taken
by another.";

/// A transparent proxy for TCP and UDP, steered by eBPF: no iptables or nft rule needed.
#[derive(Debug, Parser)]
#[command(
    name = "tproxy-user",
    version,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do; without one: run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `run`, where no command is given.
    #[command(flatten)]
    pub run: RunArgs,
    /// Logging.
    #[command(flatten)]
    pub logging: LoggingArgs,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Capture and relay, until SIGTERM or SIGINT [default]
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Print what `run` with the same flags would set up; changes nothing, needs no privilege
    ///
    /// Prints interfaces, map entries, routing rules, routes and sockets, and
    /// reports what would stop `run`: a conflict is exit code 5 here as there.
    Check {
        /// Flags of `run`.
        #[command(flatten)]
        run: Box<RunArgs>,
        /// Say what becomes of such a packet, and by which rule
        ///
        /// For example: 'tcp 192.168.1.5:1234 > 1.1.1.1:443 iface br-lan'. Instead of iface NAME, own
        /// stands for what this host sends. Rules may ask for more: domain, mac, dscp, mark, uid,
        /// gid, cgroup, each with a value.
        #[arg(long, value_name = "PACKET", conflicts_with = "diff")]
        packet: Option<Question>,
        /// Say what differs from what runs
        #[arg(long)]
        diff: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look for what on this host would keep `run` with the same flags from working; changes nothing
    ///
    /// Each line is ok, warn or FAIL, with what mends it: a command, or flags to start with.
    /// Run it as root: without, some of it cannot be looked at. Exit code 1 where a line is a FAIL.
    Doctor {
        /// Flags of `run`.
        #[command(flatten)]
        run: Box<RunArgs>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the flows that are or were captured, latest first
    Flows(DataArgs),
    /// Show whether a proxy is running, and its counters
    Status(DataArgs),
    /// Remove what a killed run left: programs, maps, rules, routes, settings
    ///
    /// Running it twice is no error. Refused (exit code 5) while the proxy is running.
    Cleanup {
        /// Pin directory of the run that was killed
        #[arg(long, value_name = "DIR", default_value = default::PIN, value_parser = parse::pin)]
        pin: PathBuf,
    },
    /// Make a configuration of rules of iptables or nft that lead traffic to a proxy
    ///
    /// Reads what iptables-save, ip6tables-save (or both, one after the other) or
    /// nft -j list ruleset prints, and prints a configuration file. What it cannot
    /// say is in there as a comment, and on standard error. Exit code 2 where none
    /// can be made. For example: iptables-save | tproxy-user import > tproxy.toml
    Import {
        /// File to read; none, or -: standard input
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Have the running proxy read its config file again: interfaces, ports, networks, upstreams, rules, log level
    ///
    /// All of it is checked first; with a mistake nothing changes (exit code 2). Flows that
    /// run go on as they are. What only a restart can change is named. Takes the flags of `run`, so
    /// that it finds the proxy that was started with them: by --pin, or what the file of --config
    /// says of it.
    Reload {
        /// Flags of `run`.
        #[command(flatten)]
        run: Box<RunArgs>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print shell completions
    ///
    /// For example: tproxy-user completions bash > /etc/bash_completion.d/tproxy-user
    Completions {
        /// bash, zsh, fish, elvish or powershell
        shell: Shell,
    },
    /// Print the JSON schema of the config file
    ///
    /// For editors and for programs that write such files.
    Schema,
    /// Write man pages, one a command
    #[command(hide = true)]
    Man {
        /// Directory to write to
        dir: PathBuf,
    },
}

/// Flags of the commands that print what a running proxy pinned.
#[derive(Clone, Debug, Args)]
pub struct DataArgs {
    /// Pin directory of the proxy
    #[arg(long, value_name = "DIR", default_value = default::PIN, value_parser = parse::pin)]
    pub pin: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is logged, and how. Logs go to standard error.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Logging")]
pub struct LoggingArgs {
    /// Log more: -v debug, -vv trace
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Log less: -q warnings and errors, -qq errors
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub quiet: u8,
    /// Form of the log on standard error
    #[arg(long, value_name = "FORM", default_value = "text", global = true, action = ArgAction::Set,
          value_parser = PossibleValuesParser::new(["text", "json"]).map(|form| form == "json"))]
    pub log_format: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_is_run() {
        let cli = Cli::try_parse_from(["tproxy-user", "--iface", "eth0", "-v"]).expect("parses");
        assert!(cli.command.is_none());
        assert_eq!(cli.run.capture.interfaces, ["eth0"]);
        assert_eq!(cli.logging.verbose, 1);
        let cli =
            Cli::try_parse_from(["tproxy-user", "run", "-i", "eth0", "-i", "wg*", "-qq"]).expect("parses");
        let Some(Command::Run(run)) = cli.command else { panic!("not run: {cli:?}") };
        assert_eq!(run.capture.interfaces, ["eth0", "wg*"]);
        assert_eq!(cli.logging.quiet, 2);
    }

    #[test]
    fn every_flag_of_run_has_a_heading() {
        let ungrouped: Vec<_> = Cli::command()
            .get_arguments()
            .filter(|arg| {
                arg.get_help_heading().is_none() && !matches!(arg.get_id().as_str(), "help" | "version")
            })
            .map(|arg| arg.get_id().to_string())
            .collect();
        assert_eq!(ungrouped, [""; 0]);
    }
}

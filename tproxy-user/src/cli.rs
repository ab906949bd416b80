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

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;
use ipnet::IpNet;

use crate::config::file::upstream::Upstreams;
use crate::config::rule::Rule;
use crate::config::upstream::SendProxy;
use crate::config::{AccessLog, Attach, Fail, Handshake, Kernel, Mark, SourceMode, Steer};
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

/// Flags of `run`, `check`, `doctor` and `reload`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Config file (TOML): a key for each of these flags, and rules; flags given here go before it
    ///
    /// `tproxy-user schema` prints what it may have.
    #[arg(short, long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<PathBuf>,
    /// Reload when the config file changes, or a file of networks that it names
    #[arg(long, help_heading = "Configuration")]
    pub watch: bool,
    /// The `Capture` group.
    #[command(flatten)]
    pub capture: CaptureArgs,
    /// The `Steering` group.
    #[command(flatten)]
    pub steering: SteeringArgs,
    /// The `Source` group.
    #[command(flatten)]
    pub source: SourceArgs,
    /// The `Time-outs` group.
    #[command(flatten)]
    pub timeouts: TimeoutArgs,
    /// The `Limits` group.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// Which packets are captured.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Capture")]
pub struct CaptureArgs {
    /// Interface whose incoming traffic is captured; repeatable, globs such as 'wg*' too
    ///
    /// An interface that a glob matches may appear later. Traffic for this host,
    /// multicast, broadcast and link-local traffic is never captured. Of a bridge,
    /// name the bridge, not its ports; for the host's own traffic see --own-traffic.
    #[arg(short, long = "iface", value_name = "NAME", value_parser = parse::interface)]
    pub interfaces: Vec<String>,
    /// Protocols to capture: tcp, udp
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "tcp,udp",
          value_parser = PossibleValuesParser::new(["tcp", "udp"]))]
    pub proto: Vec<String>,
    /// Destination ports to capture, such as 53,80,1000-2000; repeatable [default: all]
    #[arg(long, value_name = "PORTS", value_delimiter = ',', value_parser = parse::ports)]
    pub dport: Vec<(u16, u16)>,
    /// Destination network to capture; repeatable [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub to: Vec<IpNet>,
    /// Destination network to leave alone, whatever --to says; repeatable
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub not_to: Vec<IpNet>,
    /// Source network to capture; repeatable [default: all]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub from: Vec<IpNet>,
    /// Source network to leave alone, whatever --from says; repeatable
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = parse::cidr)]
    pub not_from: Vec<IpNet>,
    /// Capture IPv4 only
    #[arg(short = '4', long = "ipv4")]
    pub v4: bool,
    /// Capture IPv6 only
    #[arg(short = '6', long = "ipv6")]
    pub v6: bool,
    /// Capture what this host itself sends, too
    #[arg(long)]
    pub own_traffic: bool,
    /// New flows while no proxy is there to take them: open forwards them, closed drops them
    #[arg(long, value_name = "HOW", default_value = "open",
          value_parser = PossibleValuesParser::new(["open", "closed"])
              .map(|how| if how == "open" { Fail::Open } else { Fail::Closed }))]
    pub fail: Fail,
    /// Rules of the config file.
    #[arg(skip)]
    pub rules: Vec<Rule>,
}

/// How captured packets reach the proxy.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Steering")]
pub struct SteeringArgs {
    /// ebpf: this program does it all; none: rules of yours do (iptables -j TPROXY), only listen and relay
    #[arg(long, value_name = "BY", default_value = "ebpf",
          value_parser = PossibleValuesParser::new(["ebpf", "none"])
              .map(|by| if by == "ebpf" { Steer::Ebpf } else { Steer::None }))]
    pub steer: Steer,
    /// How programs are attached: tcx (Linux 6.6), clsact, or auto, the better that the kernel has
    #[arg(long, value_name = "HOW", default_value = "auto",
          value_parser = PossibleValuesParser::new(["auto", "tcx", "clsact"])
              .map(|how| match how.as_str() { "tcx" => Attach::Tcx, "clsact" => Attach::Clsact, _ => Attach::Auto }))]
    pub attach: Attach,
    /// When a client's TCP handshake is completed: eager, at once; faithful, once the server has answered
    ///
    /// With faithful a server that refuses, cannot be reached or does not answer looks
    /// so to the client, and one that is slow looks slow. It makes each connection
    /// cost a little more, and the server be connected to before the client has
    /// shown that its address is its own (Linux 5.8, and a tun device).
    #[arg(long, value_name = "WHEN", default_value = "eager",
          value_parser = PossibleValuesParser::new(["eager", "faithful"])
              .map(|when| if when == "eager" { Handshake::Eager } else { Handshake::Faithful }))]
    pub handshake: Handshake,
    /// Port of the listeners
    ///
    /// With --steer ebpf nobody connects to it: packets are handed over whatever their port is.
    #[arg(long, value_name = "PORT", default_value = "15001", value_parser = parse::port)]
    pub on_port: u16,
    /// Address of the listeners, one a family [default: 127.0.0.1 and ::1; --steer none: all]
    #[arg(long, value_name = "IP", value_delimiter = ',', value_parser = parse::ip)]
    pub on_ip: Vec<IpAddr>,
    /// Mark of captured packets, decimal or 0x hex; without MASK all bits count, as in ip rule
    ///
    /// Only the bits of MASK are changed and compared: give it a bit that no other
    /// program on this host uses.
    #[arg(long, value_name = "VALUE[/MASK]", default_value = "0x1/0x1", value_parser = parse::mark)]
    pub tproxy_mark: Mark,
    /// Mark of the proxy's own sockets, by which their packets are told apart
    #[arg(long, value_name = "VALUE", default_value = "0x2", value_parser = parse::number)]
    pub own_mark: u32,
    /// Routing table for the local route; must hold no routes of others
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = parse::table)]
    pub table: u32,
    /// Priority of the routing rules, 1 to 32765
    ///
    /// The default puts them before the rules of VPNs (Tailscale 5210, wg-quick below
    /// 32766) and VRFs (1000): a captured packet must not be routed by those.
    #[arg(long, value_name = "NUMBER", default_value = "100", value_parser = parse::priority)]
    pub rule_priority: u32,
    /// Directory of the pinned maps and programs, on a bpf filesystem; its last part names this instance
    #[arg(long, value_name = "DIR", default_value = default::PIN, value_parser = parse::pin)]
    pub pin: PathBuf,
    /// Use the eBPF build that logs each decision (slow; Linux 5.8)
    #[arg(long)]
    pub bpf_log: bool,
    /// Choose features as if this kernel was older
    #[arg(long, value_name = "X.Y", hide = true, value_parser = parse::kernel)]
    pub assume_kernel: Option<Kernel>,
}

/// Where connections go, and as whom.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Source and upstream")]
pub struct SourceArgs {
    /// Whose address servers see: client, its address; client-port, address and port; proxy, this host's
    ///
    /// client-port falls back to another port where the client's is taken.
    #[arg(long, value_name = "WHOSE", default_value = "client",
          value_parser = PossibleValuesParser::new(["client", "client-port", "proxy"])
              .map(|whose| match whose.as_str() {
                  "client-port" => SourceMode::ClientPort,
                  "proxy" => SourceMode::Proxy,
                  _ => SourceMode::Client,
              }))]
    pub source: SourceMode,
    /// How captured flows reach their destinations: direct, or through socks5://HOST[:PORT] or http://HOST:PORT
    ///
    /// Or the name of an upstream of the config file. Repeatable: the first that works. A proxy server is asked for the original
    /// destination, which then sees that server's address. HTTP carries TCP alone: UDP is refused.
    /// A user and a password can be given as in socks5://USER:PASSWORD@HOST, but others may see them
    /// for a moment; a config file can name a file that has the password.
    #[arg(long, value_name = "URL", default_value = "direct")]
    pub upstream: Vec<String>,
    /// Tell servers and diverted flows' targets the client and its destination, by the PROXY protocol
    ///
    /// v1 and v2 begin each TCP connection with it, v2 each UDP datagram as well. Who does not expect
    /// it takes it for what the client says. Not said through proxy servers.
    #[arg(long, value_name = "VERSION", default_value = "off",
          value_parser = PossibleValuesParser::new(["off", "v1", "v2"])
              .map(|version| match version.as_str() { "v1" => SendProxy::V1, "v2" => SendProxy::V2, _ => SendProxy::Off }))]
    pub send_proxy: SendProxy,
    /// Upstreams of the config file.
    #[arg(skip)]
    pub upstreams: Upstreams,
    /// A line on standard output for each connection that ends
    #[arg(long, value_name = "FORM", default_value = "off",
          value_parser = PossibleValuesParser::new(["off", "json", "text"])
              .map(|form| match form.as_str() { "json" => AccessLog::Json, "text" => AccessLog::Text, _ => AccessLog::Off }))]
    pub access_log: AccessLog,
}

/// Time-outs: a number with its unit, such as 300s, 5m or 1h30m.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Time-outs (such as 300s, 5m, 1h30m)")]
pub struct TimeoutArgs {
    /// How long a server may take to accept a connection
    ///
    /// With --handshake faithful the client has as long again to complete its own.
    /// Long enough for three lost SYNs (Linux repeats them after 1, 3 and 7 s).
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::duration)]
    pub connect_timeout: Duration,
    /// A TCP connection without a byte either way
    ///
    /// What RFC 5382 (REQ-5) asks of whatever stands between two hosts: 2 h and the
    /// 4 min of a keep-alive. (HAProxy's timeout tunnel and Envoy's idle_timeout are
    /// usually 1 h; Linux conntrack has 5 days.)
    #[arg(long, value_name = "TIME", default_value = "2h4m", value_parser = parse::duration)]
    pub tcp_idle_timeout: Duration,
    /// A TCP connection that one side has closed, without a byte from the other
    ///
    /// RFC 5382 (REQ-5): at least 4 min for partly closed connections. (Linux
    /// conntrack has 1 to 2 min, too short for a server that computes an answer.)
    #[arg(long, value_name = "TIME", default_value = "4m", value_parser = parse::duration)]
    pub half_close_timeout: Duration,
    /// A UDP flow that was replied to, without a datagram
    ///
    /// RFC 4787 (REQ-5): never less than 2 min. Linux conntrack has 2 min.
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = parse::duration)]
    pub udp_timeout: Duration,
    /// A UDP flow that was not replied to yet
    ///
    /// As Linux conntrack; most are DNS queries whose resolver is gone.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse::duration)]
    pub udp_timeout_unreplied: Duration,
    /// From SIGTERM until connections are cut; 0s: at once
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse::duration_or_zero)]
    pub drain_timeout: Duration,
}

/// Bounds.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// TCP connections at one time; each takes two descriptors
    ///
    /// With --handshake faithful those that wait for their server count, too.
    #[arg(long, value_name = "NUMBER", default_value = "65536", value_parser = parse::count)]
    pub max_connections: u32,
    /// TCP connections and UDP flows of one client address at one time; 0: no bound of its own
    ///
    /// The default leaves half of the UDP flows to the others. A network that
    /// hides behind one address needs more.
    #[arg(long, value_name = "NUMBER", default_value = "8192", value_parser = parse::count_or_zero)]
    pub max_per_client: u32,
    /// UDP flows (one a client's address and port) at one time; each takes a descriptor
    #[arg(long, value_name = "NUMBER", default_value = "16384", value_parser = parse::count)]
    pub max_udp_flows: u32,
    /// Entries of the flow table that `flows` shows; the oldest give way (104 bytes each) [default: 131072]
    #[arg(long, value_name = "NUMBER", value_parser = parse::flow_entries)]
    pub max_flows: Option<u32>,
    /// Worker threads, 1 to 64 [default: one a core]
    #[arg(long, value_name = "NUMBER", value_parser = parse::workers)]
    pub workers: Option<u32>,
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

//! The resolved configuration: what every other part of the program reads.
//!
//! [`Config`] is built from the command line and the config [file](mod@file) by `cli.rs`;
//! a value of it cannot say something that contradicts itself, so nothing behind
//! it checks again.

pub mod file;
mod keys;
pub mod rule;
pub mod upstream;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use file::value::{Level, LogForm};
pub use keys::Key;

/// A packet mark and the bits of it that count, as `ip rule fwmark` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// The value; no bit outside `mask` is set.
    pub value: u32,
    /// The bits that are compared and written.
    pub mask: u32,
}

/// How packets reach the listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Steer {
    /// The eBPF programs of this project.
    Ebpf,
    /// Rules that the user made (`iptables -j TPROXY`): listeners and relay only.
    None,
}

/// Whose address the server sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceMode {
    /// The client's address, a port of the proxy's choice.
    Client,
    /// The client's address and port; where that port is taken, another.
    ClientPort,
    /// The proxy's address.
    Proxy,
}

/// When a client's TCP handshake is completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Handshake {
    /// At once.
    Eager,
    /// Once upstream has answered.
    Faithful,
}

/// What happens to matching new flows while no proxy is there to take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fail {
    /// They are forwarded as if nothing was captured.
    Open,
    /// They are dropped.
    Closed,
}

/// How programs are attached to interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Attach {
    /// tcx where the kernel has it (6.6), else clsact.
    Auto,
    /// tcx links.
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

/// Which packets are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Interface names or globs.
    pub interfaces: Vec<String>,
    /// Which flows.
    pub scope: Scope,
    /// What becomes of them, where not all are proxied.
    pub rules: Arc<[rule::Rule]>,
    /// The host's own traffic is captured too.
    pub own_traffic: bool,
    /// What happens without a proxy.
    pub fail: Fail,
}

/// Which flows are captured: those that are selected in every respect.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "four independent choices")]
pub struct Scope {
    /// TCP is captured.
    pub tcp: bool,
    /// UDP is captured.
    pub udp: bool,
    /// IPv4 is captured.
    pub v4: bool,
    /// IPv6 is captured.
    pub v6: bool,
    /// Destination ports as inclusive ranges; empty: all.
    pub ports: Vec<(u16, u16)>,
    /// Destinations to capture; empty: all.
    pub to: Vec<IpNet>,
    /// Destinations to leave alone, whatever `to` says.
    pub not_to: Vec<IpNet>,
    /// Sources to capture; empty: all.
    pub from: Vec<IpNet>,
    /// Sources to leave alone, whatever `from` says.
    pub not_from: Vec<IpNet>,
}

impl Default for Scope {
    /// Every flow.
    fn default() -> Self {
        Self {
            tcp: true,
            udp: true,
            v4: true,
            v6: true,
            ports: Vec::new(),
            to: Vec::new(),
            not_to: Vec::new(),
            from: Vec::new(),
            not_from: Vec::new(),
        }
    }
}

/// How captured packets reach the listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steering {
    /// By whom.
    pub by: Steer,
    /// When TCP handshakes are completed; eager where no TCP is captured.
    pub handshake: Handshake,
    /// Attachment of the programs.
    pub attach: Attach,
    /// Mark of steered packets.
    pub mark: Mark,
    /// Mark of the proxy's own sockets.
    pub own_mark: u32,
    /// Routing table with the local route.
    pub table: u32,
    /// Priority of the routing rules.
    pub rule_priority: u32,
    /// IPv4 address of the listeners.
    pub on_ip4: Ipv4Addr,
    /// IPv6 address of the listeners.
    pub on_ip6: Ipv6Addr,
    /// Port of the (first) listeners.
    pub on_port: u16,
    /// The debugging build of the eBPF object, which logs each decision.
    pub bpf_log: bool,
}

/// Time-outs of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From a client's connection to the upstream's answer.
    pub connect: Duration,
    /// A TCP connection without a byte either way.
    pub tcp_idle: Duration,
    /// A TCP connection of which one side has closed, without a byte.
    pub half_close: Duration,
    /// A UDP flow that was replied to.
    pub udp: Duration,
    /// A UDP flow that was not.
    pub udp_unreplied: Duration,
    /// From SIGTERM until connections are cut.
    pub drain: Duration,
}

/// Bounds of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// TCP connections at one time.
    pub connections: u32,
    /// TCP connections and UDP flows of one client address at one time;
    /// `u32::MAX`: no bound.
    pub per_client: u32,
    /// UDP flows (client address and port) at one time.
    pub udp_flows: u32,
    /// Entries of the flow table.
    pub flow_table: u32,
}

/// Where the line about each ended connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AccessLog {
    /// Nowhere.
    Off,
    /// Standard output, one JSON object a line.
    Json,
    /// Standard output, for people.
    Text,
}

/// What is logged to standard error, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// Least severity.
    pub level: Level,
    /// Form of a line.
    pub form: LogForm,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: Level::Info, form: LogForm::Text }
    }
}

/// A kernel version, `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kernel {
    /// The 5 of 5.7.
    pub major: u32,
    /// The 7 of 5.7.
    pub minor: u32,
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Everything that `run` was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which packets.
    pub capture: Capture,
    /// How they get here.
    pub steering: Steering,
    /// Whose address servers see.
    pub source: SourceMode,
    /// How flows reach their destinations, where no rule says otherwise.
    pub upstream: upstream::Upstream,
    /// What servers and targets are told of the client.
    pub send_proxy: upstream::SendProxy,
    /// Time-outs.
    pub timeouts: Timeouts,
    /// Bounds.
    pub limits: Limits,
    /// Workers, 1 to [`MAX_WORKERS`](tproxy_common::abi::MAX_WORKERS).
    pub workers: u32,
    /// Directory of the pinned maps and links.
    pub pin: PathBuf,
    /// The log.
    pub log: Log,
    /// The line about each ended connection.
    pub access_log: AccessLog,
    /// Where it was written: the config file, and what its rules and upstreams name.
    pub files: Vec<PathBuf>,
    /// A change of these files reloads.
    pub watch: bool,
    /// Kernel to take this one for when features are chosen; `None`: the one that runs.
    pub assume_kernel: Option<Kernel>,
}

impl Config {
    /// The upstreams that flows can go by: of rules, and where none says otherwise.
    pub fn upstreams(&self) -> impl Iterator<Item = &upstream::Upstream> {
        let of_rules = self.capture.rules.iter().filter_map(|rule| match &rule.action {
            rule::Action::Proxy(upstream) => upstream.as_ref(),
            _ => None,
        });
        of_rules.chain([&self.upstream])
    }
}

impl Mark {
    /// Whether a packet with this mark is matched.
    #[must_use]
    pub const fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }

    /// Whether both compare some bit, and one packet can match both.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        let both = self.mask & other.mask;
        both != 0 && (self.value ^ other.value) & both == 0
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl Steering {
    /// The listeners' address of one family.
    #[must_use]
    pub fn on_ip(&self, v6: bool) -> IpAddr {
        if v6 { self.on_ip6.into() } else { self.on_ip4.into() }
    }
}

//! The config file: every flag of `run` as a key, and rules.
//!
//! [`File`] is what is written there; `cli/merge.rs` puts it where the command
//! line said nothing, and [`read`] resolves its rules. Values are parsed by the
//! parsers of the flags, so that both accept the same and say the same.

mod cgroup;
mod error;
mod lines;
mod list;
mod names;
mod prefixes;
mod resolve;
pub mod rule;
mod schema;
#[cfg(test)]
mod tests;
pub mod upstream;
pub mod value;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::upstream::SendProxy;
use crate::config::{AccessLog, Attach, Fail, Handshake, SourceMode, Steer as By, rule as resolved};
use crate::failure::Failure;
pub use list::List;
pub use schema::schema;
use upstream::Upstreams;
use value::{
    Address, Count, CountOrZero, Directory, Family, FlowEntries, Interface, Level, LogForm, Network, OwnMark,
    Port, Ports, Priority, Protocol, SteerMark, Table, Time, TimeOrZero, Workers,
};

/// The config file of tproxy-user. Flags given on the command line go before what is here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct File {
    /// Reload when this file changes, or one that it names (--watch).
    pub watch: Option<bool>,
    /// Which packets are captured.
    #[serde(skip_serializing_if = "is_default")]
    pub capture: Capture,
    /// How captured packets reach the proxy.
    #[serde(skip_serializing_if = "is_default")]
    pub steer: Steer,
    /// Where connections go, and as whom.
    #[serde(skip_serializing_if = "is_default")]
    pub source: Source,
    /// What is logged, and how.
    #[serde(skip_serializing_if = "is_default")]
    pub log: Log,
    /// Time-outs: a number with its unit, such as "300s", "5m" or "1h30m".
    #[serde(skip_serializing_if = "is_default")]
    pub timeouts: Timeouts,
    /// Bounds.
    #[serde(skip_serializing_if = "is_default")]
    pub limits: Limits,
    /// Proxy servers that flows can be sent through.
    #[serde(rename = "upstream", skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<upstream::Upstream>,
    /// Groups of them, of which one is chosen for each flow.
    #[serde(rename = "group", skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<upstream::Group>,
    /// What becomes of flows. The first rule that matches decides; without one they are proxied.
    #[serde(rename = "rule", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<rule::Rule>,
}

/// Which packets are captured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Capture {
    /// Interfaces whose incoming traffic is captured; globs such as "wg*" too (--iface).
    pub interfaces: Option<List<Interface>>,
    /// Protocols to capture (--proto).
    pub protocols: Option<List<Protocol>>,
    /// Destination ports to capture, such as 53 or "1000-2000"; without: all (--dport).
    pub ports: Option<List<Ports>>,
    /// Destination networks to capture; without: all (--to).
    pub to: Option<List<Network>>,
    /// Destination networks to leave alone, whatever `to` says (--not-to).
    pub not_to: Option<List<Network>>,
    /// Source networks to capture; without: all (--from).
    pub from: Option<List<Network>>,
    /// Source networks to leave alone, whatever `from` says (--not-from).
    pub not_from: Option<List<Network>>,
    /// Address families to capture; without: both (-4, -6).
    pub families: Option<List<Family>>,
    /// Capture what this host itself sends, too (--own-traffic).
    pub own_traffic: Option<bool>,
    /// New flows while no proxy is there to take them (--fail).
    pub fail: Option<Fail>,
}

/// How captured packets reach the proxy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Steer {
    /// Who steers them (--steer).
    pub by: Option<By>,
    /// How programs are attached (--attach).
    pub attach: Option<Attach>,
    /// When a client's TCP handshake is completed (--handshake).
    pub handshake: Option<Handshake>,
    /// Port of the listeners (--on-port).
    pub on_port: Option<Port>,
    /// Addresses of the listeners, one a family (--on-ip).
    pub on_ip: Option<List<Address>>,
    /// Mark of captured packets, VALUE[/MASK] (--tproxy-mark).
    pub tproxy_mark: Option<SteerMark>,
    /// Mark of the proxy's own sockets (--own-mark).
    pub own_mark: Option<OwnMark>,
    /// Routing table for the local route (--table).
    pub table: Option<Table>,
    /// Priority of the routing rules (--rule-priority).
    pub rule_priority: Option<Priority>,
    /// Directory of the pinned maps and programs (--pin).
    pub pin: Option<Directory>,
    /// Use the eBPF build that logs each decision (--bpf-log).
    pub bpf_log: Option<bool>,
}

/// Where connections go, and as whom.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Source {
    /// Whose address servers see (--source).
    pub mode: Option<SourceMode>,
    /// How captured flows reach their destinations, where no rule says otherwise: direct, the URL of a
    /// proxy server, or the name of an upstream; of several the first that works (--upstream).
    pub upstream: Option<List<String>>,
    /// What servers and targets are told of the client, by the PROXY protocol (--send-proxy).
    pub send_proxy: Option<SendProxy>,
}

/// What is logged, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Log {
    /// Least severity of what is logged (-v, -q).
    pub level: Option<Level>,
    /// Form of the log on standard error (--log-format).
    pub format: Option<LogForm>,
    /// A line on standard output for each connection that ends (--access-log).
    pub access: Option<AccessLog>,
}

/// Time-outs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Timeouts {
    /// How long a server may take to accept a connection (--connect-timeout).
    pub connect: Option<Time>,
    /// A TCP connection without a byte either way (--tcp-idle-timeout).
    pub tcp_idle: Option<Time>,
    /// A TCP connection that one side has closed, without a byte from the other (--half-close-timeout).
    pub half_close: Option<Time>,
    /// A UDP flow that was replied to, without a datagram (--udp-timeout).
    pub udp: Option<Time>,
    /// A UDP flow that was not replied to yet (--udp-timeout-unreplied).
    pub udp_unreplied: Option<Time>,
    /// From SIGTERM until connections are cut; "0s": at once (--drain-timeout).
    pub drain: Option<TimeOrZero>,
}

/// Bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Limits {
    /// TCP connections at one time (--max-connections).
    pub max_connections: Option<Count>,
    /// TCP connections and UDP flows of one client address at one time; 0: no bound of its own (--max-per-client).
    pub max_per_client: Option<CountOrZero>,
    /// UDP flows at one time (--max-udp-flows).
    pub max_udp_flows: Option<Count>,
    /// Entries of the flow table (--max-flows).
    pub max_flows: Option<FlowEntries>,
    /// Worker threads; without: one a core (--workers).
    pub workers: Option<Workers>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What is not a flag: it refers to other files, or to other parts of this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// The upstreams.
    pub upstreams: Upstreams,
    /// The rules.
    pub rules: Vec<resolved::Rule>,
}

/// Reads a config file, its rules and the files of networks that they name.
///
/// # Errors
/// [`Failure::Usage`] where one of them cannot be read or has a mistake: one line with
/// file, line, column, key, and what was expected.
pub fn read(path: &Path) -> Result<(File, Resolved), Failure> {
    parse(&content(path)?, path)
}

/// Reads a config file, and nothing that its rules name.
///
/// # Errors
/// As [`read`].
pub fn keys(path: &Path) -> Result<File, Failure> {
    error::Document { path, content: &content(path)? }.deserialize()
}

fn content(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| {
        Failure::usage(format_args!("cannot read the config file {}: {error}", path.display()))
    })
}

/// [`read`], of a file that has this content.
///
/// # Errors
/// As there.
pub fn parse(content: &[u8], path: &Path) -> Result<(File, Resolved), Failure> {
    let document = error::Document { path, content };
    let file: File = document.deserialize()?;
    let directory = path.parent().map_or_else(PathBuf::new, Path::to_owned);
    let resolve = || {
        let upstreams = Upstreams::new(&file.upstreams, &file.groups, &directory)?;
        Ok(Resolved { rules: resolve::rules(&file.rules, &upstreams, &directory)?, upstreams })
    };
    let resolved = resolve().map_err(|mistake| document.failure(mistake))?;
    Ok((file, resolved))
}

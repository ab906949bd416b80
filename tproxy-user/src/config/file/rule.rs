//! A rule, as it is written.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::List;
use super::value::{
    AnyMark, Cgroup, Domain, Dscp, Gid, Interface, Mac, Network, Ports, Protocol, Target, Uid,
};
use crate::config::upstream::SendProxy;

/// What becomes of flows that meet all conditions; each may be one value or a list, of which one is met.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Rule {
    /// Protocols.
    pub protocol: Option<List<Protocol>>,
    /// Source networks.
    pub from: Option<List<Network>>,
    /// Source networks that are not meant, whatever `from` and `from_file` say.
    pub not_from: Option<List<Network>>,
    /// Files of source networks, one a line; relative to the config file.
    pub from_file: Option<List<PathBuf>>,
    /// Source ports.
    pub from_port: Option<List<Ports>>,
    /// Destination networks.
    pub to: Option<List<Network>>,
    /// Destination networks that are not meant, whatever `to` and `to_file` say.
    pub not_to: Option<List<Network>>,
    /// Files of destination networks, one a line; relative to the config file.
    pub to_file: Option<List<PathBuf>>,
    /// Destination ports.
    pub to_port: Option<List<Ports>>,
    /// Interfaces that flows arrive on; globs too.
    pub iface: Option<List<Interface>>,
    /// Link-layer addresses that flows come from.
    pub mac: Option<List<Mac>>,
    /// Differentiated services codepoints.
    pub dscp: Option<List<Dscp>>,
    /// Marks that packets arrive with.
    pub mark: Option<List<AnyMark>>,
    /// Users whose sockets send; of the host's own traffic alone.
    pub uid: Option<List<Uid>>,
    /// Groups of processes whose sockets send; of the host's own traffic alone. Needs Linux 5.9.
    pub gid: Option<List<Gid>>,
    /// Control groups whose sockets send; of the host's own traffic alone.
    pub cgroup: Option<List<Cgroup>>,
    /// Names that flows are for: by TLS and QUIC server name, HTTP host, or DNS answers seen.
    pub domain: Option<List<Domain>>,
    /// Files of names, one a line; relative to the config file.
    pub domain_file: Option<List<PathBuf>>,
    /// What becomes of them.
    pub action: Action,
    /// Where they are diverted to; with the action `divert` alone.
    pub target: Option<Target>,
    /// What the target is told of the client, by the PROXY protocol: off, v1, v2; with the action `divert` alone.
    pub send_proxy: Option<SendProxy>,
    /// The upstream that they are sent through, by its name; with the action `proxy` alone.
    pub upstream: Option<String>,
}

/// What becomes of flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// They are relayed to their destination.
    #[default]
    Proxy,
    /// They are relayed to `target` instead.
    Divert,
    /// The kernel forwards them.
    Pass,
    /// They are refused: TCP by a reset, UDP by an ICMP error.
    Reject,
    /// They are thrown away.
    Drop,
}

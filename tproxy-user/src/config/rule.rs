//! Rules over flows. The first that matches decides.

mod print;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;

use super::Mark;
use super::upstream::{SendProxy, Upstream};
use crate::policy;
use crate::policy::domains::Pattern;
use crate::policy::ranges::Ranges;

/// One rule: flows that meet all its conditions are treated so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which flows.
    pub conditions: Conditions,
    /// What becomes of them.
    pub action: Action,
}

/// What a rule asks of a flow's first packet. A condition that is empty is met by all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Protocol numbers, TCP and UDP.
    pub protocols: Vec<u8>,
    /// Source addresses.
    pub from: Addresses,
    /// Destination addresses.
    pub to: Addresses,
    /// Source ports, as inclusive ranges.
    pub from_ports: Vec<(u16, u16)>,
    /// Destination ports, as inclusive ranges.
    pub to_ports: Vec<(u16, u16)>,
    /// Names or globs of the interfaces that it arrives on; the host's own traffic arrives on none.
    pub interfaces: Vec<String>,
    /// Link-layer addresses that it comes from.
    pub macs: Vec<[u8; 6]>,
    /// Values of the differentiated services field, below 64 (RFC 2474).
    pub dscps: Vec<u8>,
    /// The mark that it has when it arrives.
    pub marks: Vec<Mark>,
    /// Users that own the sending socket, as inclusive ranges; the host's own traffic alone.
    pub uids: Vec<(u32, u32)>,
    /// Groups of the processes that made it, as inclusive ranges; likewise.
    pub gids: Vec<(u32, u32)>,
    /// Control groups that the sending socket is in, below `/sys/fs/cgroup` and without
    /// slashes at either end; the host's own traffic alone.
    pub cgroups: Vec<String>,
    /// Names that it is for.
    pub domains: Domains,
}

/// Names: those of `listed` and `files`; no condition where both are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domains {
    /// Patterns of the rule itself.
    pub listed: Vec<Pattern>,
    /// Files of patterns.
    pub files: Vec<NameFile>,
    /// Sets of names that are meant, by their numbers in `all`: see
    /// [`share`](policy::domains::Domains::share).
    pub sets: Arc<Ranges>,
    /// The names of all rules.
    pub all: Arc<policy::domains::Domains>,
}

impl Domains {
    /// Whether no name is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.files.is_empty()
    }

    /// All patterns.
    pub fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        self.listed.iter().chain(self.files.iter().flat_map(|file| &*file.patterns))
    }
}

/// A file of names, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameFile {
    /// Where it is.
    pub path: PathBuf,
    /// By which its content is told from another: the first digits of `sha256sum`.
    pub digest: String,
    /// Its names.
    pub patterns: Arc<[Pattern]>,
}

/// A set of addresses: those of `nets` and `files`, all where both are empty, but those of `not`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Networks of it.
    pub nets: Vec<IpNet>,
    /// Files of networks of it.
    pub files: Vec<PrefixFile>,
    /// Networks that are not of it, whatever the others say.
    pub not: Vec<IpNet>,
}

/// A file of networks, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixFile {
    /// Where it is.
    pub path: PathBuf,
    /// By which its content is told from another: the first digits of `sha256sum`.
    pub digest: String,
    /// How many networks it has.
    pub count: usize,
    /// Its IPv4 addresses, as numbers.
    pub v4: Arc<Ranges>,
    /// Its IPv6 addresses.
    pub v6: Arc<Ranges>,
}

/// Where a flow is diverted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diversion {
    /// The address.
    pub target: SocketAddr,
    /// What it is told of the client; `None`: what all are.
    pub send_proxy: Option<SendProxy>,
}

impl From<SocketAddr> for Diversion {
    fn from(target: SocketAddr) -> Self {
        Self { target, send_proxy: None }
    }
}

/// What becomes of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is relayed to its destination, by this upstream; `None`: by the default one.
    Proxy(Option<Upstream>),
    /// It is relayed to this target instead; replies come from its destination nonetheless.
    Divert(Diversion),
    /// The kernel forwards it.
    Pass,
    /// It is refused: TCP by a reset, UDP by an ICMP error (Linux 5.9).
    Reject,
    /// It is thrown away.
    Drop,
}

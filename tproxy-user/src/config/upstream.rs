//! Ways to reach destinations.

mod credentials;
mod proxy;
mod tls;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use credentials::{Credentials, Secret};
pub use proxy::{Host, Protocol, Proxy, Udp};
pub use tls::Tls;

/// A way to reach destinations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Upstream {
    /// Straight.
    #[default]
    Direct,
    /// Through a proxy server.
    Proxy(Arc<Proxy>),
    /// By one of several others.
    Group(Arc<Group>),
}

/// Upstreams of which one is chosen for each flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What rules, logs and `status` call it.
    pub name: Arc<str>,
    /// At least one; none is a group.
    pub members: Vec<Upstream>,
    /// Which of those that work.
    pub policy: Policy,
}

/// How a member is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The first that works.
    #[default]
    Failover,
    /// Each in turn.
    RoundRobin,
    /// The one that was connected to the fastest.
    LeastLatency,
    /// The same for all flows of a client's address.
    SourceHash,
}

/// How it is found out whether a proxy server works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// From one check to the next.
    pub interval: Duration,
    /// The longest that one takes.
    pub timeout: Duration,
    /// After so many failures in a row it does not work.
    pub fall: u32,
    /// After so many successes in a row it works again.
    pub rise: u32,
    /// What is tried.
    pub by: CheckBy,
}

/// What a check tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckBy {
    /// A connection to the server.
    Connect,
    /// What is said there before a request: method and password of SOCKS5; of HTTP, `OPTIONS *`.
    Handshake,
    /// A connection through the server to this address.
    Request(SocketAddr),
}

impl Default for Check {
    fn default() -> Self {
        let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(3));
        Self { interval, timeout, fall: 3, rise: 2, by: CheckBy::Handshake }
    }
}

/// What a server is told of the client by the PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SendProxy {
    /// Nothing.
    #[default]
    Off,
    /// In a line of text, at the beginning of TCP connections.
    V1,
    /// In binary form, at the beginning of TCP connections and before each datagram.
    V2,
}

impl Upstream {
    /// What rules, logs and `status` call it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::Proxy(proxy) => &proxy.name,
            Self::Group(group) => &group.name,
        }
    }

    /// The servers that it may need, those of chains as well.
    #[must_use]
    pub fn servers(&self) -> Vec<&Proxy> {
        match self {
            Self::Direct => Vec::new(),
            Self::Proxy(proxy) => {
                std::iter::successors(Some(&**proxy), |proxy| proxy.via.as_deref()).collect()
            }
            Self::Group(group) => group.members.iter().flat_map(Self::servers).collect(),
        }
    }

    /// Those of them that this host itself connects to: the first of each chain.
    pub fn nearest(&self) -> impl Iterator<Item = &Proxy> {
        self.servers().into_iter().filter(|proxy| proxy.via.is_none())
    }

    /// Whether a server of these is given by a name; the last of a chain finds the others by their names.
    #[must_use]
    pub fn has_name(&self) -> bool {
        self.nearest().any(|proxy| matches!(proxy.host, Host::Name(_)))
    }

    /// Whether the kernel is to forward UDP flows, because it cannot carry them.
    #[must_use]
    pub fn passes_udp(&self) -> bool {
        match self {
            Self::Direct => false,
            Self::Proxy(proxy) => !proxy.may_carry_udp() && proxy.udp == Udp::Pass,
            Self::Group(group) => group.members.iter().all(Self::passes_udp),
        }
    }
}

/// The name of an upstream.
///
/// # Errors
/// What was expected.
pub fn name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if text.is_empty() || text.len() > 64 || !text.bytes().all(fits) {
        return Err(
            "expected direct, a URL such as socks5://10.0.0.2:1080, or the name of an [[upstream]]: up to 64 letters, digits, '-', '_' and '.'"
                .to_owned(),
        );
    }
    Ok(text.to_owned())
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failover => "failover",
            Self::RoundRobin => "round-robin",
            Self::LeastLatency => "least-latency",
            Self::SourceHash => "source-hash",
        })
    }
}

impl fmt::Display for SendProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str(self.name()),
            Self::Proxy(proxy) => proxy.fmt(f),
            Self::Group(group) => {
                let members: Vec<_> = group.members.iter().map(Self::name).collect();
                write!(f, "{} ({} of {})", group.name, group.policy, members.join(", "))
            }
        }
    }
}

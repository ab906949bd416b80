//! What becomes of flows by rules, as their clients and servers see it.

use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer;
use xtask::lab::proxy::{Launch, Proxy};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{at, needs_proxy};
use crate::matching::{Reflectors, Way, judge, reflectors, unused};

/// The config file of a lab's proxy.
pub(crate) struct ConfigFile(pub(crate) PathBuf);

impl ConfigFile {
    pub(crate) fn new(lab: &Lab, content: &str) -> Result<Self> {
        let file = Self(lab.dir().join("tproxy.toml"));
        file.write(content)?;
        Ok(file)
    }

    /// Replaces it at once, as editors do.
    pub(crate) fn write(&self, content: &str) -> Result<()> {
        replace(&self.0, content)
    }

    pub(crate) fn launch<'lab>(&self, lab: &'lab Lab, flags: &str) -> Launch<'lab> {
        Launch::new(lab, &format!("--config {} {flags}", self.0.display()))
    }
}

/// Replaces a file by one with other content.
pub(crate) fn replace(path: &std::path::Path, content: &str) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, content).and_then(|()| fs::rename(&new, path)).context("cannot write a file")
}

/// Starts a proxy that captures `lan` and has these rules.
pub(crate) fn start_with_rules(lab: &Lab, flags: &str, rules: &str) -> Result<(Proxy, ConfigFile)> {
    needs_proxy()?;
    let config = ConfigFile::new(lab, rules)?;
    let proxy = config.launch(lab, &format!("--iface lan {flags}")).start()?;
    Ok((proxy, config))
}

/// The `n`th networks "anywhere" of both families, as a list of the config file.
pub(crate) fn nets(n: u8) -> String {
    format!("{:?}", Family::ALL.map(|family| family.anywhere_net(n)))
}

/// The `n`th address of the `net`th network "anywhere".
pub(crate) fn within(family: Family, net: u8, n: u8) -> IpAddr {
    family.anywhere(u16::from_be_bytes([net, n]))
}

/// What becomes of a flow, as its client and the server see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server sees the client's address and port.
    Passed,
    /// The server sees the client's address, and a port of the proxy's.
    Proxied,
    /// The client is told at once that nobody listens.
    Rejected,
    /// Nobody answers.
    Dropped,
}
use Fate::{Dropped, Passed, Proxied, Rejected};

impl Fate {
    /// The action of the rule.
    pub(crate) const fn action(self) -> &'static str {
        match self {
            Passed => "pass",
            Proxied => "proxy",
            Rejected => "reject",
            Dropped => "drop",
        }
    }

    /// How long a client waits that expects it: no longer than needed for silence.
    pub(super) fn wait(self) -> Duration {
        if self == Dropped { Duration::from_millis(500) } else { patience(Duration::from_secs(5)) }
    }

    /// What it says that a reflector on the server has seen this, or that there was an error.
    pub(super) fn of(seen: io::Result<String>, from: SocketAddr) -> Result<Self> {
        match seen {
            Ok(seen) => Ok(match judge(seen.parse()?, from)? {
                Way::Forwarded => Passed,
                Way::Proxied => Proxied,
            }),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => Ok(Rejected),
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Ok(Dropped),
                _ => Err(error.into()),
            },
        }
    }
}

/// What becomes of a connection, and how long that takes.
pub(crate) fn tcp_fate(
    namespace: &Namespace,
    from: SocketAddr,
    to: SocketAddr,
    wait: Duration,
) -> Result<(Fate, Duration)> {
    let (seen, took) = namespace.enter(|| {
        let started = Instant::now();
        let seen = peer::try_connect(Some(from), to, wait / pace::slowdown()).and_then(|mut stream| {
            let mut seen = String::new();
            stream.read_to_string(&mut seen).map(|_| seen)
        });
        (seen, started.elapsed())
    })?;
    Ok((Fate::of(seen, from)?, took))
}

/// The same of a datagram.
pub(crate) fn udp_fate(
    namespace: &Namespace,
    from: SocketAddr,
    to: SocketAddr,
    wait: Duration,
) -> Result<(Fate, Duration)> {
    let socket = peer::udp(namespace, from)?;
    socket.set_read_timeout(Some(wait))?;
    socket.connect(to)?;
    let started = Instant::now();
    let mut buffer = [0; 100];
    let seen = socket
        .send(b"who am I?")
        .and_then(|_| peer::receive(&socket, &mut buffer))
        .map(|(length, _)| String::from_utf8_lossy(&buffer[..length]).into_owned());
    Ok((Fate::of(seen, from)?, started.elapsed()))
}

/// A client and what becomes of its flows.
pub(crate) struct Client<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) address: IpAddr,
}

impl<'a> Client<'a> {
    pub(crate) fn of(lab: &'a Lab, family: Family) -> Self {
        Self { namespace: &lab.client, address: family.client() }
    }

    pub(crate) fn guest(lab: &'a Lab, family: Family) -> Self {
        Self { namespace: &lab.guest, address: family.guest() }
    }

    /// Makes sure of the fate of a connection; from where it was.
    pub(crate) fn expect_tcp(&self, to: SocketAddr, expected: Fate) -> Result<SocketAddr> {
        let from = unused(self.address);
        let found = tcp_fate(self.namespace, from, to, expected.wait())?;
        expect(&format!("a connection from {from} to {to}"), found, expected).map(|()| from)
    }

    /// Makes sure of the fate of a datagram; from where it was.
    pub(crate) fn expect_udp(&self, to: SocketAddr, expected: Fate) -> Result<SocketAddr> {
        let from = unused(self.address);
        let found = udp_fate(self.namespace, from, to, expected.wait())?;
        expect(&format!("a datagram from {from} to {to}"), found, expected).map(|()| from)
    }

    /// Makes sure of both.
    pub(crate) fn expect(&self, to: SocketAddr, expected: Fate) -> Result<()> {
        self.expect_tcp(to, expected)?;
        self.expect_udp(to, expected).map(drop)
    }

    /// Makes sure of both, and that the flow table tells of them.
    pub(super) fn expect_listed(
        &self,
        proxy: &Proxy,
        to: SocketAddr,
        expected: Fate,
        rule: Option<u16>,
    ) -> Result<()> {
        for (protocol, from) in
            [("tcp", self.expect_tcp(to, expected)?), ("udp", self.expect_udp(to, expected)?)]
        {
            let flow = proxy.flow(protocol, &from.to_string(), &to.to_string())?;
            ensure!(
                flow.action == expected.action() && flow.rule == serde_json::json!(rule),
                "expected action {} by rule {rule:?}: {flow:#?}",
                expected.action()
            );
            let replies = match expected {
                Passed | Proxied => flow.packets_down > 0,
                // The reset.
                Rejected => flow.packets_down == u64::from(protocol == "tcp"),
                Dropped => flow.packets_down == 0,
            };
            ensure!(flow.packets_up > 0 && replies, "the counters of a flow are wrong: {flow:#?}");
        }
        Ok(())
    }
}

pub(super) fn expect(what: &str, (found, took): (Fate, Duration), expected: Fate) -> Result<()> {
    ensure!(found == expected, "{what} was {found:?} after {took:?}, expected {expected:?}");
    ensure!(
        expected == Dropped || took < patience(Duration::from_secs(1)),
        "{what} was {found:?}, but only after {took:?}"
    );
    Ok(())
}

pub(super) const PORT: u16 = 7070;

/// Reflectors on the first address of these networks, one family.
pub(crate) fn reflectors_in(lab: &Lab, family: Family, networks: &[u8]) -> Result<Vec<Reflectors>> {
    let targets: Vec<_> = networks.iter().map(|net| target(family, *net)).collect();
    reflectors(&lab.server, &targets)
}

/// Reflectors for both families.
pub(crate) fn all_reflectors(lab: &Lab, networks: &[u8]) -> Result<[Vec<Reflectors>; 2]> {
    Ok([reflectors_in(lab, Family::V4, networks)?, reflectors_in(lab, Family::V6, networks)?])
}

/// Where the reflectors of a network are.
pub(crate) fn target(family: Family, net: u8) -> SocketAddr {
    at(within(family, net, 1), PORT)
}

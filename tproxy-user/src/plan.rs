//! What `run` will set up: configuration + host → plan. Pure and printable.

pub mod prefixes;
mod print;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tproxy_common::abi::LpmKey;

use crate::cli::is_glob;
use crate::config::rule::Conditions;
use crate::config::upstream::{Host as Server, Upstream};
use crate::config::{Config, Handshake, Key, Mark, Scope, SourceMode, Steer, rule};
use crate::failure::Failure;
use crate::interfaces::{Host, Interface};
use crate::sysctl;

/// What an interface is to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Clients are behind it.
    Capture,
    /// Servers are behind it: return traffic of `source = client`, and the host's own traffic.
    Uplink,
    /// `lo`, where the host's own traffic comes back in.
    Loopback,
}

/// An interface that gets programs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PlannedInterface {
    /// Name.
    pub name: String,
    /// ifindex.
    pub index: u32,
    /// What it is.
    pub role: Role,
}

/// A routing rule: `ip rule add iif IIF fwmark MARK lookup TABLE priority PRIORITY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// IPv6 (else IPv4).
    pub v6: bool,
    /// Interface that packets come in on.
    pub iif: String,
    /// Mark that they carry.
    pub mark: Mark,
    /// Table that routes them.
    pub table: u32,
    /// Its place among the rules.
    pub priority: u32,
}

/// A local route: `ip route add local default dev lo table TABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalRoute {
    /// IPv6 (else IPv4).
    pub v6: bool,
    /// Table that it is in.
    pub table: u32,
}

/// A listening socket; one such for every worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedSocket {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Address and port of the first worker's.
    pub address: SocketAddr,
}

/// A kernel setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Name, as by `sysctl`.
    pub name: &'static str,
    /// Value while the proxy runs.
    pub value: &'static str,
}

/// The plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// IPv4 is captured.
    pub ipv4: bool,
    /// IPv6 is captured: asked for, and enabled on this host.
    pub ipv6: bool,
    /// Interfaces that get programs, by index.
    pub interfaces: Vec<PlannedInterface>,
    /// When TCP handshakes are completed.
    pub handshake: Handshake,
    /// Routing rules.
    pub rules: Vec<Rule>,
    /// Local routes.
    pub routes: Vec<LocalRoute>,
    /// Kernel settings.
    pub sysctls: Vec<Sysctl>,
    /// The group of who makes a socket is noted at it: rules ask for it.
    pub notes_groups: bool,
    /// Keys of the `LOCAL` map.
    pub local: Vec<LpmKey>,
    /// Which flows are captured.
    pub scope: Scope,
    /// What becomes of them.
    pub policy: Arc<[rule::Rule]>,
    /// All interfaces, index and name, by which rules may tell flows apart.
    pub names: Vec<(u32, String)>,
    /// Listening sockets of each worker.
    pub sockets: Vec<PlannedSocket>,
    /// Workers.
    pub workers: u32,
    /// How flows reach their destinations, where no rule says otherwise.
    pub upstream: Upstream,
    /// What all of it was made of.
    pub keys: Vec<Key>,
    /// `--iface` names (not globs) of which there is no interface now.
    pub missing: Vec<String>,
    /// `--iface` names that cannot be captured as the host is now, and why.
    pub refused: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Makes the plan for a host as it is now.
    ///
    /// A named interface that is not there only lands in [`Plan::missing`], and
    /// one that cannot be captured in [`Plan::refused`]: at run time an interface
    /// may go and come back, or become the port of a bridge for a while. At the
    /// start, see [`Plan::require_interfaces`].
    ///
    /// # Errors
    /// [`Failure::Usage`] for a bad glob, [`Failure::Unsupported`] where only IPv6 is wanted of a host without.
    pub fn new(config: &Config, host: &Host) -> Result<Self, Failure> {
        let steering = config.steering.by == Steer::Ebpf;
        let (ipv4, ipv6) = (config.capture.scope.v4, config.capture.scope.v6 && host.ipv6);
        if !ipv4 && !ipv6 {
            return Err(Failure::unsupported(
                "-6: this host has no IPv6 (kernel built or booted without, or net.ipv6.conf.lo.disable_ipv6=1)",
            ));
        }
        let mut plan = Self {
            ipv4,
            ipv6,
            interfaces: Vec::new(),
            handshake: config.steering.handshake,
            rules: Vec::new(),
            routes: Vec::new(),
            sysctls: Vec::new(),
            notes_groups: false,
            local: host.local.iter().map(prefixes::key).collect(),
            scope: Scope { v6: ipv6, ..config.capture.scope.clone() },
            policy: Arc::clone(&config.capture.rules),
            names: host
                .interfaces
                .iter()
                .map(|interface| (interface.index, interface.name.clone()))
                .collect(),
            sockets: sockets(config, ipv4, ipv6),
            workers: config.workers,
            upstream: config.upstream.clone(),
            keys: config.keys(),
            missing: Vec::new(),
            refused: Vec::new(),
            warnings: Vec::new(),
        };
        if steering {
            plan.add_interfaces(config, host)?;
            plan.add_routing(config);
            plan.notes_groups =
                config.capture.own_traffic && plan.policy.iter().any(|rule| !rule.conditions.gids.is_empty());
            plan.warn_of_idle_rules(config);
            plan.warn_of_servers_here(config, host);
        }
        Ok(plan)
    }

    /// Refuses to start without an interface that the user named.
    ///
    /// # Errors
    /// [`Failure::Usage`], saying why, or naming the interfaces there are.
    pub fn require_interfaces(&self, host: &Host) -> Result<(), Failure> {
        if let Some(refused) = self.refused.first() {
            return Err(Failure::usage(refused));
        }
        let Some(missing) = self.missing.first() else {
            return Ok(());
        };
        let names: Vec<_> =
            host.interfaces.iter().filter(|interface| !interface.loopback).map(|i| &*i.name).collect();
        let there_are = if names.is_empty() {
            "there is none but lo".to_owned()
        } else {
            format!("there are: {}", names.join(", "))
        };
        Err(Failure::usage(format_args!("--iface {missing}: no such interface; {there_are}")))
    }

    fn add_interfaces(&mut self, config: &Config, host: &Host) -> Result<(), Failure> {
        let mut roles = BTreeMap::<u32, (&str, Role)>::new();
        for name in &config.capture.interfaces {
            if let Some(refused) = refuse(name, host) {
                self.refused.push(refused);
                continue;
            }
            let found = captured(name, host)?;
            if found.is_empty() && is_glob(name) {
                self.warnings.push(format!("--iface '{name}': no interface matches yet"));
            } else if found.is_empty() {
                self.missing.push(name.clone());
            }
            for interface in found {
                if !interface.up {
                    self.warnings.push(format!("--iface {}: the interface is down", interface.name));
                }
                roles.insert(interface.index, (&interface.name, Role::Capture));
            }
        }
        // With the proxy's own address as the source, replies come to it anyway.
        if config.source != SourceMode::Proxy || config.capture.own_traffic {
            for interface in host.interfaces.iter().filter(|interface| faces_upstream(interface, host)) {
                roles.entry(interface.index).or_insert((&interface.name, Role::Uplink));
            }
        }
        if config.capture.own_traffic {
            for interface in host.interfaces.iter().filter(|interface| interface.loopback) {
                roles.insert(interface.index, (&interface.name, Role::Loopback));
            }
        }
        self.interfaces = roles
            .into_iter()
            .map(|(index, (name, role))| PlannedInterface { name: name.to_owned(), index, role })
            .collect();
        Ok(())
    }

    /// Rules that ask for what no captured flow has.
    fn warn_of_idle_rules(&mut self, config: &Config) {
        let capture = &config.capture;
        for (rule, number) in capture.rules.iter().zip(1..) {
            let Conditions { uids, gids, cgroups, interfaces, macs, .. } = &rule.conditions;
            let asks_who_sends = !uids.is_empty() || !gids.is_empty() || !cgroups.is_empty();
            let asks_how_it_arrives = !interfaces.is_empty() || !macs.is_empty();
            if asks_who_sends && !capture.own_traffic {
                self.warnings.push(format!(
                    "rule {number} never matches: it asks who on this host sends, whose traffic is not captured; set capture.own_traffic or leave the rule out"
                ));
            }
            if asks_how_it_arrives && capture.interfaces.is_empty() {
                self.warnings.push(format!(
                    "rule {number} never matches: it asks how a flow arrives, and this host's own traffic, which alone is captured, does not; name capture.interfaces or leave the rule out"
                ));
            }
        }
    }

    /// Proxy servers whose own connections would come back to them: on this host, with its own
    /// traffic captured, and no rule that knows who sends.
    fn warn_of_servers_here(&mut self, config: &Config, host: &Host) {
        let rules = &config.capture.rules;
        let knows_who_sends = rules.iter().any(|rule| {
            let Conditions { uids, gids, cgroups, marks, .. } = &rule.conditions;
            !(uids.is_empty() && gids.is_empty() && cgroups.is_empty() && marks.is_empty())
        });
        if !config.capture.own_traffic || knows_who_sends {
            return;
        }
        let here = |ip: IpAddr| host.local.iter().any(|network| network.contains(&ip));
        let servers: BTreeSet<String> = config
            .upstreams()
            .flat_map(Upstream::nearest)
            .filter(|proxy| matches!(proxy.host, Server::Address(ip) if here(ip)))
            .map(ToString::to_string)
            .collect();
        for server in servers {
            self.warnings.push(format!(
                "the upstream {server} is on this host, whose own traffic is captured: what it sends comes back to it, unless it is left out (--not-to) or a rule lets it pass, such as [[rule]] uid = \"its user\" action = \"pass\""
            ));
        }
    }

    fn add_routing(&mut self, config: &Config) {
        let steering = &config.steering;
        // The proxy's own mark beside the other on the host's own packets keeps
        // this rule from matching where src_valid_mark=1 looks up the reverse path.
        let own = steering.own_mark;
        let loopback_mark = Mark { value: steering.mark.value | own, mask: steering.mark.mask | own };
        let families = [(false, self.ipv4), (true, self.ipv6)];
        for v6 in families.iter().filter(|(_, wanted)| *wanted).map(|(v6, _)| *v6) {
            self.routes.push(LocalRoute { v6, table: steering.table });
            for interface in &self.interfaces {
                let mark = match interface.role {
                    Role::Capture => steering.mark,
                    Role::Uplink if config.source != SourceMode::Proxy => steering.mark,
                    Role::Uplink => continue,
                    Role::Loopback => loopback_mark,
                };
                self.rules.push(Rule {
                    v6,
                    iif: interface.name.clone(),
                    mark,
                    table: steering.table,
                    priority: steering.rule_priority,
                });
            }
        }
        if config.capture.own_traffic && self.ipv4 {
            self.sysctls.push(Sysctl { name: sysctl::ACCEPT_LOCAL, value: "1" });
        }
    }
}

/// The interfaces that one `--iface` names.
fn captured<'a>(name: &str, host: &'a Host) -> Result<Vec<&'a Interface>, Failure> {
    if is_glob(name) {
        let pattern = glob::Pattern::new(name).map_err(|error| {
            Failure::usage(format_args!("--iface '{name}': expected a glob such as 'wg*': {error}"))
        })?;
        let matches = |interface: &&Interface| {
            pattern.matches(&interface.name)
                && !interface.loopback
                && !interface.is_made_by_tproxy()
                && host.bridge_of(interface).is_none()
        };
        return Ok(host.interfaces.iter().filter(matches).collect());
    }
    Ok(host.interfaces.iter().filter(|interface| interface.name == name).collect())
}

/// Why the interface of this very name cannot be captured.
fn refuse(name: &str, host: &Host) -> Option<String> {
    let interface = host.interfaces.iter().find(|interface| interface.name == name)?;
    if interface.loopback {
        return Some(format!(
            "--iface {name}: a loopback device cannot be captured; for what this host itself sends there is --own-traffic"
        ));
    }
    if interface.is_made_by_tproxy() {
        return Some(format!(
            "--iface {name}: a tproxy-user made this device for its own use (--handshake faithful)"
        ));
    }
    let bridge = host.bridge_of(interface)?;
    Some(format!(
        "--iface {name}: it is a port of the {} {}, which is where its packets are routed; name that: --iface {}",
        bridge.kind, bridge.name, bridge.name
    ))
}

/// Whether servers may be behind an interface.
fn faces_upstream(interface: &Interface, host: &Host) -> bool {
    interface.up
        && !interface.loopback
        && !interface.is_made_by_tproxy()
        // Packets pass through the slaves of a VRF, which count by themselves.
        && interface.kind != "vrf"
        && host.bridge_of(interface).is_none()
        && (interface.routed || !interface.addresses.is_empty())
}

fn sockets(config: &Config, ipv4: bool, ipv6: bool) -> Vec<PlannedSocket> {
    let mut sockets = Vec::new();
    for (protocol, captured) in [("tcp", config.capture.scope.tcp), ("udp", config.capture.scope.udp)] {
        for (v6, captured) in [(false, captured && ipv4), (true, captured && ipv6)] {
            if captured {
                let address = SocketAddr::new(config.steering.on_ip(v6), config.steering.on_port);
                sockets.push(PlannedSocket { protocol, address });
            }
        }
    }
    sockets
}

#[cfg(test)]
mod tests;

//! The plan as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use serde_json::{Value, json};
use tproxy_common::abi::LpmKey;

use crate::config::{Handshake, Scope};
use crate::tun;

use super::{LocalRoute, Plan, PlannedSocket, Role, Rule, Sysctl, prefixes};

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { v6, iif, mark, table, priority } = self;
        let family = if *v6 { "ip -6" } else { "ip -4" };
        write!(f, "{family} rule add priority {priority} iif {iif} fwmark {mark} lookup {table}")
    }
}

impl fmt::Display for LocalRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.v6 { "ip -6" } else { "ip -4" };
        write!(f, "{family} route add local default dev lo table {}", self.table)
    }
}

impl fmt::Display for PlannedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, self.address)
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.name, self.value)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capture => "capture",
            Self::Uplink => "uplink",
            Self::Loopback => "loopback",
        })
    }
}

fn prefix(key: &LpmKey) -> String {
    prefixes::net(key).map_or_else(|| format!("{key:?}"), |net| net.to_string())
}

fn section(f: &mut fmt::Formatter<'_>, title: &str, lines: impl IntoIterator<Item = String>) -> fmt::Result {
    writeln!(f, "{title}:")?;
    let mut empty = true;
    for line in lines {
        writeln!(f, "  {line}")?;
        empty = false;
    }
    if empty { writeln!(f, "  none") } else { Ok(()) }
}

/// The respects in which flows are selected.
fn selection(scope: &Scope) -> [(&'static str, Vec<String>); 7] {
    let chosen = |all: [(bool, &str); 2]| {
        all.into_iter().filter(|(chosen, _)| *chosen).map(|(_, name)| name.to_owned()).collect()
    };
    let port = |(first, last): &(u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    let nets = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect();
    [
        ("families", chosen([(scope.v4, "ipv4"), (scope.v6, "ipv6")])),
        ("protocols", chosen([(scope.tcp, "tcp"), (scope.udp, "udp")])),
        ("dport", scope.ports.iter().map(port).collect()),
        ("from", nets(&scope.from)),
        ("not_from", nets(&scope.not_from)),
        ("to", nets(&scope.to)),
        ("not_to", nets(&scope.not_to)),
    ]
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interfaces = self.interfaces.iter();
        section(f, "Interfaces", interfaces.map(|i| format!("{} (index {}): {}", i.name, i.index, i.role)))?;
        let handshakes = match self.handshake {
            Handshake::Eager => "eager: completed at once".to_owned(),
            Handshake::Faithful => format!(
                "faithful: completed once the server has answered; by a tun device {}N with {} queues",
                tun::PREFIX,
                self.workers
            ),
        };
        section(f, "TCP handshakes", [handshakes])?;
        section(f, "Rules", self.rules.iter().map(Rule::to_string))?;
        section(f, "Routes", self.routes.iter().map(LocalRoute::to_string))?;
        section(f, "Settings", self.sysctls.iter().map(Sysctl::to_string))?;
        if self.notes_groups {
            let noted = "by the program tproxy_group at the root of the control groups".to_owned();
            section(f, "Groups of this host's sockets", [noted])?;
        }
        let title = format!("Sockets of each of {} workers (the first has the port shown)", self.workers);
        section(f, &title, self.sockets.iter().map(PlannedSocket::to_string))?;
        let selected = selection(&self.scope).into_iter().filter(|(_, values)| !values.is_empty());
        section(
            f,
            "Captured flows (all that meet each of these)",
            selected.map(|(respect, values)| format!("{}: {}", respect.replace('_', " "), values.join(", "))),
        )?;
        let keys = self.keys.iter().filter(|(_, value)| !value.is_empty());
        section(f, "Keys of the configuration", keys.map(|(key, value)| format!("{key}: {value}")))?;
        let rules = (1..).zip(&*self.policy).map(|(number, rule)| format!("{number}. {rule}"));
        let otherwise = (!self.policy.is_empty()).then(|| "otherwise: proxy".to_owned());
        section(f, "What becomes of them (by the first rule that matches)", rules.chain(otherwise))?;
        section(f, "Map LOCAL (never captured)", self.local.iter().map(prefix))
    }
}

impl Plan {
    /// The plan for `check --json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "interfaces": self.interfaces,
            "handshake": self.handshake,
            "rules": self.rules.iter().map(|rule| json!({
                "family": if rule.v6 { "ipv6" } else { "ipv4" },
                "iif": rule.iif,
                "fwmark": rule.mark.to_string(),
                "table": rule.table,
                "priority": rule.priority,
            })).collect::<Vec<_>>(),
            "routes": self.routes.iter().map(|route| json!({
                "family": if route.v6 { "ipv6" } else { "ipv4" },
                "type": "local",
                "destination": "default",
                "dev": "lo",
                "table": route.table,
            })).collect::<Vec<_>>(),
            "sysctls": self.sysctls.iter().map(|s| (s.name, s.value)).collect::<BTreeMap<_, _>>(),
            "notes_groups": self.notes_groups,
            "workers": self.workers,
            "sockets": self.sockets.iter().map(|socket| json!({
                "protocol": socket.protocol,
                "address": socket.address.to_string(),
            })).collect::<Vec<_>>(),
            "config": self.keys.iter().cloned().collect::<BTreeMap<_, _>>(),
            "captured": selection(&self.scope).into_iter().collect::<BTreeMap<_, _>>(),
            "policy": self.policy.iter().map(|rule| json!({
                "conditions": rule.conditions.to_string(),
                "action": rule.action.to_string(),
            })).collect::<Vec<_>>(),
            "maps": {
                "LOCAL": self.local.iter().map(prefix).collect::<Vec<_>>(),
            },
            "warnings": self.warnings,
        })
    }
}

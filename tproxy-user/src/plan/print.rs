//! The plan as text and as JSON.

use std::fmt;

use serde_json::{Value, json};
use tproxy_common::abi::LpmKey;

use crate::config::Handshake;
use crate::tun;

use super::{LocalRoute, Plan, PlannedSocket, PortSet, Role, Rule, Sysctl, prefixes};

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

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges().into_iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last { write!(f, "{comma}{first}")? } else { write!(f, "{comma}{first}-{last}")? }
        }
        Ok(())
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

fn table(entries: &[(LpmKey, u8)]) -> impl Iterator<Item = String> {
    entries.iter().map(|(key, value)| {
        format!("{} {}", prefix(key), if *value == 1 { "captured" } else { "not captured" })
    })
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
        let title = format!("Sockets of each of {} workers (the first has the port shown)", self.workers);
        section(f, &title, self.sockets.iter().map(PlannedSocket::to_string))?;
        section(f, "Map PORTS", [self.ports.to_string()])?;
        section(f, "Map SOURCES", table(&self.sources))?;
        section(f, "Map DESTINATIONS", table(&self.destinations))?;
        section(f, "Map LOCAL (never captured)", self.local.iter().map(prefix))
    }
}

impl Plan {
    /// The plan for `check --json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let table = |entries: &[(LpmKey, u8)]| -> Vec<Value> {
            entries
                .iter()
                .map(|(key, value)| json!({"prefix": prefix(key), "captured": *value == 1}))
                .collect()
        };
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
            "sysctls": self.sysctls.iter().map(|s| (s.name, s.value)).collect::<std::collections::BTreeMap<_, _>>(),
            "workers": self.workers,
            "sockets": self.sockets.iter().map(|socket| json!({
                "protocol": socket.protocol,
                "address": socket.address.to_string(),
            })).collect::<Vec<_>>(),
            "maps": {
                "PORTS": self.ports.to_string(),
                "SOURCES": table(&self.sources),
                "DESTINATIONS": table(&self.destinations),
                "LOCAL": self.local.iter().map(prefix).collect::<Vec<_>>(),
            },
            "warnings": self.warnings,
        })
    }
}

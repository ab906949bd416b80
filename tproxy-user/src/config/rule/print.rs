//! Rules in words.

use std::fmt;

use tproxy_common::abi::{TCP, UDP};

use super::{Action, Addresses, Conditions, Diversion, Domains, NameFile, PrefixFile, Rule};

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.conditions, self.action)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Proxy(None) => f.write_str("proxy"),
            Self::Proxy(Some(upstream)) => write!(f, "proxy by {upstream}"),
            Self::Divert(Diversion { target, send_proxy: None }) => write!(f, "divert to {target}"),
            Self::Divert(Diversion { target, send_proxy: Some(version) }) => {
                write!(f, "divert to {target}, send_proxy {version}")
            }
            Self::Pass => f.write_str("pass"),
            Self::Reject => f.write_str("reject"),
            Self::Drop => f.write_str("drop"),
        }
    }
}

impl fmt::Display for Conditions {
    /// Each condition with its key; `everything` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = |ports: &[(u16, u16)]| ports.iter().map(|range| span(*range)).collect();
        let conditions: [(&str, Vec<String>); 15] = [
            ("protocol", self.protocols.iter().map(|protocol| name(*protocol)).collect()),
            ("from", included(&self.from)),
            ("not_from", self.from.not.iter().map(ToString::to_string).collect()),
            ("from_port", ports(&self.from_ports)),
            ("to", included(&self.to)),
            ("not_to", self.to.not.iter().map(ToString::to_string).collect()),
            ("to_port", ports(&self.to_ports)),
            ("iface", self.interfaces.clone()),
            ("mac", self.macs.iter().map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")).collect()),
            ("dscp", self.dscps.iter().map(ToString::to_string).collect()),
            ("mark", self.marks.iter().map(ToString::to_string).collect()),
            ("uid", self.uids.iter().map(|range| span(*range)).collect()),
            ("gid", self.gids.iter().map(|range| span(*range)).collect()),
            ("cgroup", self.cgroups.clone()),
            ("domain", names(&self.domains)),
        ];
        let mut separator = "";
        for (key, values) in conditions.iter().filter(|(_, values)| !values.is_empty()) {
            write!(f, "{separator}{key} {}", values.join(","))?;
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("everything") } else { Ok(()) }
    }
}

fn name(protocol: u8) -> String {
    match protocol {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        other => other.to_string(),
    }
}

fn span<T: PartialEq + fmt::Display>((first, last): (T, T)) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

fn included(addresses: &Addresses) -> Vec<String> {
    let file = |file: &PrefixFile| {
        format!("{} ({} networks, SHA-256 {}…)", file.path.display(), file.count, file.digest)
    };
    let files = addresses.files.iter().map(file);
    addresses.nets.iter().map(ToString::to_string).chain(files).collect()
}

fn names(domains: &Domains) -> Vec<String> {
    let file = |file: &NameFile| {
        format!("{} ({} names, SHA-256 {}…)", file.path.display(), file.patterns.len(), file.digest)
    };
    let files = domains.files.iter().map(file);
    domains.listed.iter().map(ToString::to_string).chain(files).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_say_what_they_ask_for() {
        let conditions = Conditions {
            protocols: vec![TCP, 132],
            to: Addresses {
                nets: vec!["10.0.0.0/8".parse().expect("a network")],
                not: vec!["10.1.0.0/16".parse().expect("a network")],
                ..Addresses::default()
            },
            to_ports: vec![(80, 80), (1000, 2000)],
            macs: vec![[2, 0, 0, 0, 0, 255]],
            uids: vec![(0, 0)],
            gids: vec![(5, 5), (1000, 1999)],
            ..Conditions::default()
        };
        let target: std::net::SocketAddr = "[::1]:53".parse().expect("an address");
        assert_eq!(
            Rule { conditions, action: Action::Divert(target.into()) }.to_string(),
            "protocol tcp,132, to 10.0.0.0/8, not_to 10.1.0.0/16, to_port 80,1000-2000, \
             mac 02:00:00:00:00:ff, uid 0, gid 5,1000-1999: divert to [::1]:53"
        );
        assert_eq!(
            Rule { conditions: Conditions::default(), action: Action::Pass }.to_string(),
            "everything: pass"
        );
    }
}

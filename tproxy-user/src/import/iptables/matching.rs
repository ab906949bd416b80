//! Matches of iptables: one option after the other.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::policy::ranges::Ranges;

use super::super::condition::{Conditions, Dimension};
use super::super::model::Matches;
use super::super::value::{self, Side};
use super::rule::Words;

/// Matches whose options are read here.
const MODULES: [&str; 15] = [
    "addrtype",
    "comment",
    "connmark",
    "conntrack",
    "dscp",
    "iprange",
    "mac",
    "mark",
    "multiport",
    "owner",
    "socket",
    "state",
    "tcp",
    "udp",
    "pkttype",
];

/// The matches of a rule, as far as they are read.
pub(super) struct Matching {
    pub(super) matches: Matches,
    v6: bool,
    /// The match whose options come.
    module: String,
}

impl Matching {
    /// Of a table of one family.
    pub(super) fn new(v6: bool) -> Self {
        Self { matches: Matches::default(), v6, module: String::new() }
    }

    /// Reads one option with its arguments.
    pub(super) fn option(&mut self, option: &str, not: bool, words: &mut Words<'_>) -> Result<(), String> {
        let mut argument = || words.argument(option);
        let matches = &mut self.matches;
        match option {
            "-p" | "--protocol" => matches.number(Dimension::Protocol, value::protocol(argument()?), not),
            "-s" | "--source" => self.networks(Side::From, argument()?, not)?,
            "-d" | "--destination" => self.networks(Side::To, argument()?, not)?,
            "--src-range" => self.range(Side::From, argument()?, not)?,
            "--dst-range" => self.range(Side::To, argument()?, not)?,
            "-i" | "--in-interface" => {
                let name = argument()?;
                let pattern = name.strip_suffix('+').map_or_else(|| name.to_owned(), |name| format!("{name}*"));
                matches.require_or_not(Conditions::on(vec![pattern]), not);
            }
            "-o" | "--out-interface" => value::outgoing(matches, argument()?, not),
            "-m" | "--match" => self.module(argument()?),
            "-f" | "--fragment" => matches.constant(not),
            "--sport" | "--source-port" | "--sports" | "--source-ports" => {
                matches.number(Dimension::FromPort, ports(argument()?)?, not);
            }
            "--dport" | "--destination-port" | "--dports" | "--destination-ports" => {
                matches.number(Dimension::ToPort, ports(argument()?)?, not);
            }
            "--ports" => {
                let ports = ports(argument()?)?;
                let either = [Side::From, Side::To].map(|side| Conditions::of(side.port(), ports.clone()));
                if not {
                    matches.unless.extend(either);
                } else {
                    matches.require(&either);
                }
            }
            "--syn" => matches.constant(!not),
            "--tcp-flags" => {
                let (mask, set) = (list(argument()?), list(argument()?));
                value::flags(matches, &mask, &set, not);
            }
            "--mark" if self.module == "connmark" => {
                value::connection_mark(matches, value::mark(argument()?)?, not);
            }
            "--mark" => match value::mark(argument()?)? {
                Some(mark) => {
                    matches.require_or_not(Conditions::marked(mark), not);
                }
                None => matches.constant(not),
            },
            "--uid-owner" => value::require_users(matches, argument()?, not),
            "--gid-owner" => value::require_groups(matches, argument()?, not),
            "--ctstate" | "--state" => value::state(matches, &list(argument()?), not),
            "--ctdir" => matches.constant((argument()? == "ORIGINAL") != not),
            "--dst-type" => value::destination_type(matches, &list(argument()?), not),
            "--src-type" => value::source_type(matches, &list(argument()?), not),
            "--pkt-type" => matches.constant((argument()? == "unicast") != not),
            "--dscp" | "--dscp-class" => matches.number(Dimension::Dscp, value::dscp(argument()?)?, not),
            "--mac-source" => matches.number(Dimension::Mac, value::mac(argument()?)?, not),
            // The members of a set are not in the output of iptables-save.
            "--match-set" => matches.cannot(format!(
                "the members of ipset {} are not in this input: put them in a file and name it in a rule by to_file or from_file",
                argument()?
            )),
            "--comment" => drop(argument()?),
            "--transparent" | "--nowildcard" | "--restore-skmark" | "--limit-iface-in" | "--limit-iface-out" => {}
            _ => {
                matches.cannot(format!("no condition is like {option} of match {}", self.module));
                words.skip_arguments();
            }
        }
        Ok(())
    }

    fn module(&mut self, name: &str) {
        name.clone_into(&mut self.module);
        match name {
            // A flow that is captured has no socket yet.
            "socket" => self.matches.constant(false),
            "set" => {}
            _ if MODULES.contains(&name) => {}
            _ => self.matches.cannot(format!("no condition is like match {name}")),
        }
    }

    fn networks(&mut self, side: Side, text: &str, not: bool) -> Result<(), String> {
        let mut ranges = Vec::new();
        for text in text.split(',') {
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            let net = net.map_err(|_| format!("{text}: expected a network or an address"))?;
            let (v6, range) = value::addresses(net);
            self.same_family(v6, text)?;
            ranges.push(range);
        }
        self.matches.number(side.address(self.v6), Ranges::new(ranges), not);
        Ok(())
    }

    fn range(&mut self, side: Side, text: &str, not: bool) -> Result<(), String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let address = |text: &str| {
            let address: IpAddr = text.parse().map_err(|_| format!("{text}: expected an address"))?;
            self.same_family(address.is_ipv6(), text)?;
            Ok::<_, String>(value::addresses(address.into()).1.0)
        };
        let (first, last) = (address(first)?, address(last)?);
        if first > last {
            return Err(format!("{text}: the range is backwards"));
        }
        self.matches.number(side.address(self.v6), Ranges::new(vec![(first, last)]), not);
        Ok(())
    }

    fn same_family(&self, v6: bool, text: &str) -> Result<(), String> {
        let expected = if self.v6 { "IPv6" } else { "IPv4" };
        if v6 == self.v6 { Ok(()) } else { Err(format!("{text} in a table of {expected}")) }
    }
}

fn list(text: &str) -> Vec<&str> {
    text.split(',').collect()
}

/// `80`, `80,443`, `1000:2000`, `:1023`, `1024:`.
fn ports(text: &str) -> Result<Ranges, String> {
    let one = |text: &str, open: u16| if text.is_empty() { Ok(open) } else { text.parse() };
    let range = |text: &str| {
        let (first, last) = match text.split_once(':') {
            Some((first, last)) => (one(first, 0)?, one(last, u16::MAX)?),
            None => (text.parse()?, text.parse()?),
        };
        Ok::<_, std::num::ParseIntError>((u128::from(first), u128::from(last)))
    };
    let ranges: Vec<_> = text
        .split(',')
        .map(range)
        .collect::<Result<_, _>>()
        .map_err(|_| format!("{text}: expected ports, such as 53,80,1000:2000"))?;
    match ranges.iter().find(|(first, last)| first > last) {
        Some((first, last)) => Err(format!("{first}:{last}: the range is backwards")),
        None => Ok(Ranges::new(ranges)),
    }
}

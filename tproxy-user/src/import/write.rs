//! What was settled → the text of a configuration.

use std::fmt::{Display, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use tproxy_common::abi::{TCP, UDP};

use crate::config::rule::Action;
use crate::policy::ranges::Ranges;

use super::condition::{Conditions, Dimension};
use super::model::Source;
use super::settle::{Decided, Settled};
use super::value::Side;

/// Places that the comment of a rule names.
const PLACES: usize = 4;

/// Writes it; `comments` come first.
#[must_use]
pub(crate) fn write(settled: &Settled, sources: &[Source], comments: &[String]) -> String {
    let mut text = String::new();
    for comment in comments.iter().chain(&settled.notes) {
        line(&mut text, format_args!("# {}", printable(comment)));
    }
    capture(&mut text, settled);
    steer(&mut text, settled);
    for rule in &settled.rules {
        self::rule(&mut text, rule, settled.families, sources);
    }
    text
}

fn line(text: &mut String, line: impl Display) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

/// As a comment or a terminal may have it: one line, without control characters.
pub(crate) fn printable(comment: &str) -> String {
    comment.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn capture(text: &mut String, settled: &Settled) {
    line(text, "\n[capture]");
    if settled.interfaces == ["*"] {
        line(text, "# The rules name no interface. Better name those that clients are behind.");
    }
    if !settled.interfaces.is_empty() {
        line(text, format_args!("interfaces = {}", strings(&settled.interfaces)));
    }
    let protocols: Vec<_> = protocols(&settled.protocols);
    if protocols.len() == 1 {
        line(text, format_args!("protocols = {}", strings(&protocols)));
    }
    if let [v4, v6] = settled.families
        && v4 != v6
    {
        line(text, format_args!("families = {}", strings(&[if v4 { "ipv4" } else { "ipv6" }])));
    }
    line(text, format_args!("own_traffic = {}", settled.own_traffic));
    line(text, "# As with the rules: without a proxy no connection.");
    line(text, "fail = \"closed\"");
}

fn steer(text: &mut String, settled: &Settled) {
    let Settled { mark, own_mark, on_port, .. } = settled;
    if mark.is_none() && own_mark.is_none() && on_port.is_none() {
        return;
    }
    line(text, "\n[steer]");
    if let Some(mark) = mark {
        line(text, format_args!("tproxy_mark = \"{mark}\""));
    }
    if let Some(own_mark) = own_mark {
        line(text, format_args!("own_mark = {own_mark:#x}"));
    }
    if let Some(on_port) = on_port {
        line(text, format_args!("on_port = {on_port}"));
    }
}

fn rule(text: &mut String, rule: &Decided, families: [bool; 2], sources: &[Source]) {
    let conditions = &rule.conditions;
    text.push('\n');
    let places: Vec<_> = rule.sources.iter().map(|source| &*sources[*source].place).take(PLACES).collect();
    let more = if rule.sources.len() > PLACES { " and others" } else { "" };
    if !places.is_empty() {
        line(text, format_args!("# {}{more}", printable(&places.join(", "))));
    }
    line(text, "[[rule]]");
    if let Some(set) = conditions.get(Dimension::Protocol) {
        for protocol in protocols(set) {
            line(text, format_args!("protocol = {}", quoted(protocol)));
        }
    }
    let [from, to] = [Side::From, Side::To].map(|side| Networks::of(conditions, families, side));
    // That it is of one family is said once.
    let (from_said, to_said) = (from.all_of_families, to.all_of_families && !from.all_of_families);
    for (side, name, networks, said) in [(Side::From, "from", from, from_said), (Side::To, "to", to, to_said)]
    {
        if !said {
            networks.write(text, name);
        }
        if let Some(ports) = conditions.get(side.port()) {
            line(text, format_args!("{name}_port = {}", numbers(ports)));
        }
    }
    if let Some(interfaces) = &conditions.interfaces {
        line(text, format_args!("iface = {}", strings(interfaces)));
    }
    if let Some(set) = conditions.get(Dimension::Mac) {
        let macs =
            set.as_slice().iter().flat_map(|(first, last)| *first..=*last).map(mac).collect::<Vec<_>>();
        line(text, format_args!("mac = {}", strings(&macs)));
    }
    if let Some(set) = conditions.get(Dimension::Dscp) {
        line(text, format_args!("dscp = {}", numbers(set)));
    }
    if let Some(mark) = conditions.mark {
        line(text, format_args!("mark = {}", strings(&[mark.to_string()])));
    }
    for (key, names, ids) in [
        ("uid", &conditions.users, conditions.get(Dimension::Uid)),
        ("gid", &conditions.groups, conditions.get(Dimension::Gid)),
    ] {
        match (names, ids) {
            (Some(names), _) => line(text, format_args!("{key} = {}", strings(names))),
            (None, Some(set)) => line(text, format_args!("{key} = {}", numbers(set))),
            (None, None) => {}
        }
    }
    let action = match &rule.action {
        Action::Proxy(_) => "proxy",
        Action::Divert(_) => "divert",
        Action::Pass => "pass",
        Action::Reject => "reject",
        Action::Drop => "drop",
    };
    line(text, format_args!("action = \"{action}\""));
    if let Action::Divert(to) = &rule.action {
        line(text, format_args!("target = \"{}\"", to.target));
    }
}

/// What a rule says of an address: networks, or what they leave out, whichever is shorter.
struct Networks {
    inside: Vec<IpNet>,
    outside: Vec<IpNet>,
    /// All addresses of each family that is meant at all.
    all_of_families: bool,
}

impl Networks {
    fn of(conditions: &Conditions, families: [bool; 2], side: Side) -> Self {
        let mut networks = Self { inside: Vec::new(), outside: Vec::new(), all_of_families: true };
        for v6 in [false, true].into_iter().filter(|v6| families[usize::from(*v6)]) {
            let dimension = side.address(v6);
            let all = dimension.all();
            let set = conditions.get(dimension).unwrap_or(&all);
            networks.all_of_families &= *set == all || set.is_empty();
            let (inside, outside) = (subnets(set, v6), subnets(&set.complement(dimension.most()), v6));
            if inside.len() <= outside.len() || set.is_empty() {
                networks.inside.extend(inside);
            } else {
                networks.inside.extend(subnets(&all, v6));
                networks.outside.extend(outside);
            }
        }
        // Where all but a few are meant, the few are enough.
        let captured = families.iter().filter(|captured| **captured).count();
        if networks.inside.len() == captured && networks.inside.iter().all(|net| net.prefix_len() == 0) {
            networks.inside.clear();
        }
        networks
    }

    fn write(&self, text: &mut String, name: &str) {
        for (key, nets) in [(name.to_owned(), &self.inside), (format!("not_{name}"), &self.outside)] {
            if !nets.is_empty() {
                line(text, format_args!("{key} = {}", strings(nets)));
            }
        }
    }
}

/// The fewest networks that are a set.
fn subnets(set: &Ranges, v6: bool) -> Vec<IpNet> {
    let of_range = |(first, last): &(u128, u128)| -> Vec<IpNet> {
        if v6 {
            Ipv6Subnets::new(Ipv6Addr::from(*first), Ipv6Addr::from(*last), 0).map(IpNet::V6).collect()
        } else {
            let address = |number: u128| Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX));
            Ipv4Subnets::new(address(*first), address(*last), 0).map(IpNet::V4).collect()
        }
    };
    set.as_slice().iter().flat_map(of_range).collect()
}

fn protocols(set: &Ranges) -> Vec<&'static str> {
    [(TCP, "tcp"), (UDP, "udp")]
        .into_iter()
        .filter(|(number, _)| set.contains((*number).into()))
        .map(|(_, name)| name)
        .collect()
}

fn mac(number: u128) -> String {
    let bytes = &number.to_be_bytes()[10..];
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Numbers, and ranges as `"1000-2000"`.
fn numbers(set: &Ranges) -> String {
    let numbers = set.as_slice().iter().map(|(first, last)| {
        if first == last { first.to_string() } else { quoted(&format!("{first}-{last}")) }
    });
    list(&numbers.collect::<Vec<_>>())
}

fn strings(values: &[impl Display]) -> String {
    list(&values.iter().map(|value| quoted(&value.to_string())).collect::<Vec<_>>())
}

fn list(values: &[String]) -> String {
    format!("[{}]", values.join(", "))
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

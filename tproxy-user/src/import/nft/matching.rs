//! Matches of nft: what is compared, how, and with what.

use serde_json::Value;

use crate::config::Mark;
use crate::nft::{network, number};
use crate::policy::ranges::Ranges;

use super::super::condition::{Conditions, Dimension};
use super::super::model::Matches;
use super::super::value::{self, Side};
use super::rule::Scope;

/// Reads a `match`.
pub(super) fn require(scope: &Scope<'_>, matches: &mut Matches, content: &Value) {
    let (left, right) = (&content["left"], &content["right"]);
    let operator = content["op"].as_str().unwrap_or("==");
    match operator {
        "==" | "in" | "!=" => {
            let elements = scope.elements(right);
            equal(scope, matches, left, elements, operator == "!=");
        }
        "<" | ">" | "<=" | ">=" => compare(matches, left, operator, right),
        _ => matches.cannot(unknown(content)),
    }
}

fn unknown(content: &Value) -> String {
    format!("no condition is like {content}")
}

/// Something is one of these elements, or is none.
pub(super) fn equal(scope: &Scope<'_>, matches: &mut Matches, left: &Value, elements: &[Value], not: bool) {
    // Of a set with time-outs or counters: what it has now.
    let elements: Vec<_> = elements
        .iter()
        .map(
            |element| {
                if element["elem"].is_object() { element["elem"]["val"].clone() } else { element.clone() }
            },
        )
        .collect();
    if let Some(parts) = left["concat"].as_array() {
        return concatenation(scope, matches, parts, &elements, not);
    }
    let names: Vec<_> = elements.iter().filter_map(Value::as_str).collect();
    let of_names = match left["meta"]["key"].as_str() {
        Some("skuid") => Some(Conditions::sent_by as fn(Vec<String>) -> Conditions),
        Some("skgid") => Some(Conditions::sent_by_groups as fn(Vec<String>) -> Conditions),
        _ => None,
    };
    if let Some(conditions) = of_names.filter(|_| !names.is_empty()) {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        return matches.require_or_not(conditions(names), not);
    }
    if let Some((dimension, families)) = dimension(left) {
        matches.require(&families);
        let numbers = elements.iter().map(|element| numbers(dimension, element)).collect::<Option<Vec<_>>>();
        return match numbers {
            Some(numbers) => matches.number(dimension, Ranges::new(numbers.concat()), not),
            None => matches.cannot(unknown(left)),
        };
    }
    if let Some(masked) = mark_of(left) {
        return mark(matches, masked, &elements, not);
    }
    let (meta, ct) = (left["meta"]["key"].as_str(), left["ct"]["key"].as_str());
    let fib = left["fib"]["flags"].to_string();
    match (meta, ct) {
        (Some("iifname" | "iif"), _) => {
            let interfaces = names.iter().map(|name| (*name).to_owned()).collect();
            matches.require_or_not(Conditions::on(interfaces), not);
        }
        (Some("oifname" | "oif"), _) if names.len() == 1 => value::outgoing(matches, names[0], not),
        (Some("nfproto" | "protocol"), _) => {
            let has = |v6: bool| {
                names
                    .iter()
                    .any(|name| matches!((*name, v6), ("ipv4" | "ip", false) | ("ipv6" | "ip6", true)))
            };
            let families = [false, true].into_iter().filter(|v6| has(*v6) != not);
            matches.require(&families.map(Conditions::family).collect::<Vec<_>>());
        }
        (Some("pkttype"), _) => matches.constant((names == ["unicast"] || names == ["host"]) != not),
        (_, Some("state")) => value::state(matches, &names, not),
        (_, Some("direction")) => matches.constant((names == ["original"]) != not),
        (_, Some("mark")) => {
            let zero = elements.iter().any(|element| number(element) == Some(0));
            matches.constant(zero != not);
        }
        // A flow that is captured has no socket yet.
        _ if left["socket"].is_object() => matches.constant(false),
        _ if left["fib"]["result"] == "type" && fib.contains("daddr") => {
            value::destination_type(matches, &names, not);
        }
        _ if left["fib"]["result"] == "type" && fib.contains("saddr") => {
            value::source_type(matches, &names, not);
        }
        _ if left["&"][0]["payload"]["field"] == "flags" => {
            let mask: Vec<_> = scope.elements(&left["&"][1]).iter().filter_map(Value::as_str).collect();
            value::flags(matches, &mask, &names, not);
        }
        _ => matches.cannot(unknown(left)),
    }
}

/// `ip daddr . tcp dport { 192.0.2.1 . 53, … }`: an alternative for each element.
fn concatenation(scope: &Scope<'_>, matches: &mut Matches, parts: &[Value], elements: &[Value], not: bool) {
    let mut alternatives = Vec::new();
    for element in elements {
        let mut of_element = Matches::default();
        let values = element["concat"].as_array().map_or(&[][..], Vec::as_slice);
        for (part, value) in parts.iter().zip(values) {
            equal(scope, &mut of_element, part, std::slice::from_ref(value), false);
        }
        if let Some(why) = of_element.obstacle {
            return matches.cannot(why);
        }
        alternatives.extend(of_element.any);
    }
    if not { matches.unless.extend(alternatives) } else { matches.require(&alternatives) }
}

/// `tcp dport > 1024`.
fn compare(matches: &mut Matches, left: &Value, operator: &str, right: &Value) {
    let Some(((dimension, families), right)) = dimension(left).zip(number(right)) else {
        return matches.cannot(unknown(left));
    };
    let (right, most) = (u128::from(right), dimension.most());
    let range = match operator {
        "<" => right.checked_sub(1).map(|last| (0, last)),
        "<=" => Some((0, right)),
        ">=" => Some((right, most)),
        _ => Some((right + 1, most)),
    };
    matches.require(&families);
    let range = range.filter(|(first, last)| first <= last && *last <= most);
    matches.number(dimension, Ranges::new(range.into_iter().collect()), false);
}

/// The dimension that an expression is of, and the packets that have it.
fn dimension(left: &Value) -> Option<(Dimension, Vec<Conditions>)> {
    let (protocol, field) = (left["payload"]["protocol"].as_str(), left["payload"]["field"].as_str());
    let of_family = |v6: bool| vec![Conditions::family(v6)];
    let of_protocol = |name: &str| vec![Conditions::of(Dimension::Protocol, value::protocol(name))];
    Some(match (protocol, field, left["meta"]["key"].as_str()) {
        (Some(ip @ ("ip" | "ip6")), Some("saddr"), _) => {
            (Side::From.address(ip == "ip6"), of_family(ip == "ip6"))
        }
        (Some(ip @ ("ip" | "ip6")), Some("daddr"), _) => {
            (Side::To.address(ip == "ip6"), of_family(ip == "ip6"))
        }
        (Some(ip @ ("ip" | "ip6")), Some("dscp"), _) => (Dimension::Dscp, of_family(ip == "ip6")),
        (Some(ip @ ("ip" | "ip6")), Some("protocol" | "nexthdr"), _) => {
            (Dimension::Protocol, of_family(ip == "ip6"))
        }
        (Some("th"), Some("sport"), _) => (Dimension::FromPort, vec![Conditions::default()]),
        (Some("th"), Some("dport"), _) => (Dimension::ToPort, vec![Conditions::default()]),
        (Some(name), Some("sport"), _) => (Dimension::FromPort, of_protocol(name)),
        (Some(name), Some("dport"), _) => (Dimension::ToPort, of_protocol(name)),
        (Some("ether"), Some("saddr"), _) => (Dimension::Mac, vec![Conditions::default()]),
        (_, _, Some("l4proto")) => (Dimension::Protocol, vec![Conditions::default()]),
        (_, _, Some("skuid")) => (Dimension::Uid, vec![Conditions::default()]),
        (_, _, Some("skgid")) => (Dimension::Gid, vec![Conditions::default()]),
        _ => return None,
    })
}

/// The numbers of an element.
fn numbers(dimension: Dimension, element: &Value) -> Option<Vec<(u128, u128)>> {
    if let Some([first, last]) = element["range"].as_array().map(Vec::as_slice) {
        let ends = (*numbers(dimension, first)?.first()?, *numbers(dimension, last)?.first()?);
        let (first, last) = (ends.0.0, ends.1.1);
        // A configuration has link-layer addresses one by one.
        let writable = dimension != Dimension::Mac || last.saturating_sub(first) < 1000;
        return (first <= last && writable).then(|| vec![(first, last)]);
    }
    let word = element.as_str().map_or_else(|| element.to_string(), str::to_owned);
    let of_set = |set: Ranges| set.as_slice().to_vec();
    match dimension {
        Dimension::From4 | Dimension::To4 | Dimension::From6 | Dimension::To6 => {
            let v6 = matches!(dimension, Dimension::From6 | Dimension::To6);
            let (family, range) = value::addresses(network(element)?);
            (family == v6).then(|| vec![range])
        }
        Dimension::Protocol => Some(of_set(value::protocol(&word))),
        Dimension::Dscp => value::dscp(&word).ok().map(of_set),
        Dimension::Mac => value::mac(&word).ok().map(of_set),
        Dimension::FromPort | Dimension::ToPort | Dimension::Uid | Dimension::Gid => {
            let number = u128::from(number(element)?);
            (number <= dimension.most()).then(|| vec![(number, number)])
        }
    }
}

/// The bits of the mark that an expression takes.
fn mark_of(left: &Value) -> Option<u32> {
    if left["meta"]["key"] == "mark" {
        return Some(u32::MAX);
    }
    let [masked, bits] = left["&"].as_array()?.as_slice() else { return None };
    (masked["meta"]["key"] == "mark").then(|| number(bits)).flatten()
}

fn mark(matches: &mut Matches, mask: u32, elements: &[Value], not: bool) {
    let mut marks = Vec::new();
    for element in elements {
        let Some(value) = number(element) else { return matches.cannot(unknown(element)) };
        if value & !mask == 0 {
            marks.push(Conditions::marked(Mark { value, mask }));
        }
    }
    if not { matches.unless.extend(marks) } else { matches.require(&marks) }
}

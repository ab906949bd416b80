//! Rules and routes as netlink messages, and as `ip` prints them.

use std::fmt::Write as _;

use nix::net::if_::if_indextoname;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use super::PROTOCOL;
use crate::config::Mark;
use crate::interfaces::{LOOPBACK_INDEX, destination, table_of};
use crate::netlink::family;
use crate::plan::{LocalRoute, Rule};

/// [`PROTOCOL`], as messages have it.
pub(super) fn route_protocol() -> RouteProtocol {
    PROTOCOL.into()
}

/// Value of a message's one-byte table field: 0 where the attribute has it.
fn table_byte(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC)
}

/// The message that adds a rule, and that deletes just this one.
pub(super) fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.v6);
    message.header.action = RuleAction::ToTable;
    message.header.table = table_byte(rule.table);
    message.attributes = vec![
        RuleAttribute::Iifname(rule.iif.clone()),
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark.value),
        RuleAttribute::FwMask(rule.mark.mask),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(route_protocol()),
    ];
    message
}

/// The parts of a rule that decide about conflicts.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) iif: Option<String>,
    pub(super) mark: Option<Mark>,
    pub(super) table: u32,
    pub(super) priority: u32,
    pub(super) ours: bool,
    pub(super) inverted: bool,
}

/// Takes a message apart.
pub(super) fn parts(message: &RuleMessage) -> Parts {
    let mut parts = Parts {
        table: message.header.table.into(),
        inverted: message.header.flags.contains(RuleFlags::Invert),
        ..Parts::default()
    };
    let (mut value, mut mask) = (0, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Iifname(name) => parts.iif = Some(name.clone()),
            RuleAttribute::FwMark(bits) => value = *bits,
            RuleAttribute::FwMask(bits) => mask = Some(*bits),
            RuleAttribute::Table(table) => parts.table = *table,
            RuleAttribute::Priority(priority) => parts.priority = *priority,
            RuleAttribute::Protocol(protocol) => parts.ours = *protocol == route_protocol(),
            _ => {}
        }
    }
    // The kernel tells a mask exactly where marks are compared.
    parts.mark = mask.filter(|mask| *mask != 0).map(|mask| Mark { value: value & mask, mask });
    parts
}

/// A rule of our form, whoever made it.
pub(super) fn rule(message: &RuleMessage) -> Option<Rule> {
    let Parts { iif, mark, table, priority, .. } = parts(message);
    Some(Rule { v6: message.header.family == family(true), iif: iif?, mark: mark?, table, priority })
}

/// A rule that we made.
pub(super) fn ours_of(message: &RuleMessage) -> Option<Rule> {
    if parts(message).ours { rule(message) } else { None }
}

/// The message that adds a local route.
pub(super) fn route_message(route: LocalRoute) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.v6);
    message.header.table = table_byte(route.table);
    message.header.protocol = route_protocol();
    message.header.kind = RouteType::Local;
    message.header.scope = if route.v6 { RouteScope::Universe } else { RouteScope::Host };
    message.attributes = vec![RouteAttribute::Table(route.table), RouteAttribute::Oif(LOOPBACK_INDEX)];
    message
}

/// `local default dev lo`, if that is what a message says.
pub(super) fn local_route(message: &RouteMessage) -> Option<LocalRoute> {
    let over_lo = message.attributes.contains(&RouteAttribute::Oif(LOOPBACK_INDEX));
    let is_default = message.header.destination_prefix_length == 0;
    (message.header.kind == RouteType::Local && is_default && over_lo)
        .then(|| LocalRoute { v6: message.header.address_family == family(true), table: table_of(message) })
}

fn table_name(table: u32) -> String {
    match table {
        253 => "default".to_owned(),
        254 => "main".to_owned(),
        255 => "local".to_owned(),
        other => other.to_string(),
    }
}

/// A rule as `ip rule` prints it.
pub(super) fn describe_rule(message: &RuleMessage) -> String {
    let Parts { mark, table, priority, inverted, .. } = parts(message);
    let (mut source, mut target) = ("all".to_owned(), String::new());
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => source = format!("{address}/{}", message.header.src_len),
            RuleAttribute::Destination(address) => {
                target = format!(" to {address}/{}", message.header.dst_len);
            }
            _ => {}
        }
    }
    let not = if inverted { "not " } else { "" };
    let mut text = format!("{priority}: {not}from {source}{target}");
    if let Some(mark) = mark {
        let full = mark.mask == u32::MAX;
        text = text + " fwmark " + &if full { format!("{:#x}", mark.value) } else { mark.to_string() };
    }
    for attribute in &message.attributes {
        // Writing to a string cannot fail.
        let _ = match attribute {
            RuleAttribute::Iifname(name) => write!(text, " iif {name}"),
            RuleAttribute::Oifname(name) => write!(text, " oif {name}"),
            _ => Ok(()),
        };
    }
    match message.header.action {
        RuleAction::ToTable => text + " lookup " + &table_name(table),
        action => text + " " + &format!("{action:?}").to_lowercase(),
    }
}

/// A route as `ip route` prints it.
pub(super) fn describe_route(message: &RouteMessage) -> String {
    let mut text = match message.header.kind {
        RouteType::Unicast => String::new(),
        kind => format!("{kind:?} ").to_lowercase(),
    };
    match destination(message).filter(|net| net.prefix_len() > 0) {
        Some(net) => text.push_str(&net.to_string()),
        None => text.push_str("default"),
    }
    for attribute in &message.attributes {
        // Writing to a string cannot fail.
        let _ = match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => write!(text, " via {gateway}"),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => write!(text, " via {gateway}"),
            RouteAttribute::Oif(index) => {
                let name = if_indextoname(*index).ok().and_then(|name| name.into_string().ok());
                write!(text, " dev {}", name.unwrap_or_else(|| format!("if{index}")))
            }
            _ => Ok(()),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(v6: bool) -> Rule {
        Rule { v6, iif: "eth0".to_owned(), mark: Mark { value: 1, mask: 3 }, table: 1000, priority: 7 }
    }

    #[test]
    fn rules_come_back_from_messages() {
        for v6 in [false, true] {
            assert_eq!(ours_of(&rule_message(&example(v6))), Some(example(v6)));
        }
        let mut foreign = rule_message(&example(false));
        foreign.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
        assert_eq!(ours_of(&foreign), None);
        assert_eq!(describe_rule(&foreign), "7: from all fwmark 0x1/0x3 iif eth0 lookup 1000");
    }

    #[test]
    fn routes_come_back_from_messages() {
        for (v6, table) in [(false, 100), (true, 4000)] {
            let route = LocalRoute { v6, table };
            assert_eq!(local_route(&route_message(route)), Some(route));
        }
        let mut other = route_message(LocalRoute { v6: false, table: 100 });
        other.header.kind = RouteType::Unicast;
        assert_eq!(local_route(&other), None);
        assert_eq!(describe_route(&other), "default dev lo");
    }
}

//! A naive reading of rules, and rules and packets to read. Shared by the tests of the
//! compiled image and of the kernel program that decides by it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use proptest::prelude::*;
use tproxy_common::abi::{Family, Verdict, mapped};
use tproxy_common::policy::Known;
use tproxy_user::policy::compile::{Condition, Rule, RuleSet, Selector};
use tproxy_user::policy::facts::Packet;
use tproxy_user::policy::ranges::Ranges;

/// What rules may ask for: as many masks and depths as there may be.
const SELECTORS: [Selector; 18] = [
    Selector::Source4,
    Selector::Source6,
    Selector::Destination4,
    Selector::Destination6,
    Selector::SourcePort,
    Selector::DestinationPort,
    Selector::Protocol,
    Selector::Interface,
    Selector::Mac,
    Selector::Dscp,
    Selector::Mark { mask: 0x0000_001f },
    Selector::Mark { mask: 0xffff_fff0 },
    Selector::Uid,
    Selector::Gid,
    Selector::Cgroup { depth: 0 },
    Selector::Cgroup { depth: 1 },
    Selector::Cgroup { depth: 3 },
    Selector::Domain,
];

/// What a rule sees of a packet, value by value: `None` where the packet has no such value.
fn value(packet: &Packet, selector: Selector) -> Option<u128> {
    let addr = |addr: &[u8; 16], family| {
        (packet.family == family).then(|| match family {
            Family::V4 => u128::from(u32::from_be_bytes([addr[12], addr[13], addr[14], addr[15]])),
            Family::V6 => u128::from_be_bytes(*addr),
        })
    };
    match selector {
        Selector::Source4 => addr(&packet.source, Family::V4),
        Selector::Source6 => addr(&packet.source, Family::V6),
        Selector::Destination4 => addr(&packet.destination, Family::V4),
        Selector::Destination6 => addr(&packet.destination, Family::V6),
        Selector::SourcePort => ports(packet).map(|(source, _)| source.into()),
        Selector::DestinationPort => ports(packet).map(|(_, destination)| destination.into()),
        Selector::Protocol => Some(packet.protocol.into()),
        Selector::Interface => packet.interface.map(Into::into),
        Selector::Mac => packet.mac.map(Into::into),
        Selector::Dscp => Some(packet.dscp.into()),
        Selector::Mark { mask } => Some((packet.mark & mask).into()),
        Selector::Uid => packet.uid.map(Into::into),
        Selector::Gid => packet.gid.map(Into::into),
        Selector::Cgroup { depth } => packet.cgroups.get(depth as usize).copied().map(Into::into),
        Selector::Domain => match packet.domain {
            Known::Is(set) => Some(set.into()),
            Known::Absent | Known::Unknown => None,
        },
    }
}

fn ports(packet: &Packet) -> Option<(u16, u16)> {
    match packet.ports {
        Known::Is(ports) => Some(ports),
        Known::Absent | Known::Unknown => None,
    }
}

/// First match, rule by rule and condition by condition.
pub(crate) fn naive(set: &RuleSet, packet: &Packet) -> (u32, u32) {
    let meets = |condition: &Condition| {
        let of_family = match condition.selector {
            Selector::Source4 | Selector::Destination4 => packet.family == Family::V4,
            Selector::Source6 | Selector::Destination6 => packet.family == Family::V6,
            Selector::SourcePort | Selector::DestinationPort => packet.ports != Known::Unknown,
            Selector::Domain => packet.domain != Known::Unknown,
            _ => true,
        };
        !of_family
            || value(packet, condition.selector).is_some_and(|value| {
                condition.values.as_slice().iter().any(|range| (range.0..=range.1).contains(&value))
            })
    };
    set.rules
        .iter()
        .zip(0..)
        .find(|(rule, _)| rule.conditions.iter().all(meets))
        .map_or((set.otherwise, u32::try_from(set.rules.len()).expect("few")), |(rule, number)| {
            (rule.verdict, number)
        })
}

/// Numbers of a value: few, so that rules and packets meet, at both ends of what
/// packets have.
fn number(selector: Selector) -> BoxedStrategy<u128> {
    let (least, most): (u128, u128) = match selector {
        // 10.0.0.0 to 223.255.255.255, and 2001:db8:: to fdff:…:ffff.
        Selector::Source4 | Selector::Destination4 => (0x0a00_0000, 0xdfff_ffff),
        Selector::Source6 | Selector::Destination6 => (0x2001_0db8 << 96, (0xfe00 << 112) - 1),
        Selector::SourcePort | Selector::DestinationPort => (0, 0xffff),
        Selector::Protocol => (0, 0xff),
        Selector::Interface | Selector::Mark { .. } | Selector::Uid | Selector::Gid | Selector::Domain => {
            (0, 0xffff_ffff)
        }
        Selector::Mac => (0, 0xffff_ffff_ffff),
        Selector::Dscp => (0, 0x3f),
        Selector::Cgroup { .. } => (0, u64::MAX.into()),
    };
    prop_oneof![
        4 => (0_u128..24).prop_map(move |above| least + above),
        2 => (0_u128..24).prop_map(move |below| most - below),
        1 => least..=most,
    ]
    .boxed()
}

fn condition(selector: Selector) -> impl Strategy<Value = Condition> {
    let range = (number(selector), number(selector)).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let one = number(selector).prop_map(|number| (number, number));
    prop::collection::vec(prop_oneof![range, one], 0..5)
        .prop_map(move |ranges| Condition { selector, values: Arc::new(Ranges::new(ranges)) })
}

fn rule(conditions: RangeInclusive<usize>) -> impl Strategy<Value = Rule> {
    let selectors = prop::sample::subsequence(SELECTORS.to_vec(), conditions);
    let conditions =
        selectors.prop_flat_map(|selectors| selectors.into_iter().map(condition).collect::<Vec<_>>());
    (conditions, verdict()).prop_map(|(conditions, verdict)| Rule { conditions, verdict })
}

fn verdict() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![Verdict::Pass as u32, Verdict::Proxy as u32])
}

/// Rules with so many conditions each.
pub(crate) fn rule_set(most: usize, conditions: RangeInclusive<usize>) -> impl Strategy<Value = RuleSet> {
    (prop::collection::vec(rule(conditions), 0..=most), verdict())
        .prop_map(|(rules, otherwise)| RuleSet { rules, otherwise })
}

prop_compose! {
    pub(crate) fn packet()(
        v4 in any::<bool>(),
        source4 in number(Selector::Source4), source6 in number(Selector::Source6),
        destination4 in number(Selector::Destination4), destination6 in number(Selector::Destination6),
        ports in prop_oneof![
            8 => (number(Selector::SourcePort), number(Selector::DestinationPort))
                .prop_map(|(source, destination)| Known::Is((port(source), port(destination)))),
            1 => Just(Known::Absent),
            1 => Just(Known::Unknown),
        ],
        protocol in number(Selector::Protocol),
        interface in prop::option::of(number(Selector::Interface)),
        mac in prop::option::of(number(Selector::Mac)),
        dscp in number(Selector::Dscp),
        mark in number(Selector::Mark { mask: u32::MAX }),
        uid in prop::option::of(number(Selector::Uid)),
        gid in prop::option::of(number(Selector::Gid)),
        cgroups in prop::collection::vec(number(Selector::Cgroup { depth: 0 }), 0..6),
        domain in prop_oneof![
            8 => number(Selector::Domain).prop_map(|set| Known::Is(word(set))),
            1 => Just(Known::Absent),
            1 => Just(Known::Unknown),
        ],
    ) -> Packet {
        let (family, source, destination) = if v4 {
            (Family::V4, mapped(word(source4).to_be_bytes()), mapped(word(destination4).to_be_bytes()))
        } else {
            (Family::V6, source6.to_be_bytes(), destination6.to_be_bytes())
        };
        Packet {
            family, source, destination, ports,
            protocol: byte(protocol),
            interface: interface.map(word),
            mac: mac.map(long),
            dscp: byte(dscp),
            mark: word(mark),
            uid: uid.map(word),
            gid: gid.map(word),
            cgroups: cgroups.into_iter().map(long).collect(),
            domain,
        }
    }
}

fn byte(number: u128) -> u8 {
    u8::try_from(number).expect("8 bits")
}

fn port(number: u128) -> u16 {
    u16::try_from(number).expect("16 bits")
}

fn word(number: u128) -> u32 {
    u32::try_from(number).expect("32 bits")
}

fn long(number: u128) -> u64 {
    u64::try_from(number).expect("64 bits")
}

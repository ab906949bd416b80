//! A naive reading of rules, and rules and packets to read. Shared by the tests of the
//! compiled image and of the kernel program that decides by it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use proptest::prelude::*;
use tproxy_common::abi::{Family, Verdict, mapped};
use tproxy_common::policy::{Dimension, Known};
use tproxy_user::policy::compile::{Condition, Rule, RuleSet};
use tproxy_user::policy::facts::Packet;
use tproxy_user::policy::ranges::Ranges;

/// What a rule sees of a packet, dimension by dimension: `None` where the packet has no such value.
fn value(packet: &Packet, dimension: Dimension) -> Option<u128> {
    let addr = |addr: &[u8; 16], family| {
        (packet.family == family).then(|| match family {
            Family::V4 => u128::from(u32::from_be_bytes([addr[12], addr[13], addr[14], addr[15]])),
            Family::V6 => u128::from_be_bytes(*addr),
        })
    };
    match dimension {
        Dimension::Source4 => addr(&packet.source, Family::V4),
        Dimension::Source6 => addr(&packet.source, Family::V6),
        Dimension::Destination4 => addr(&packet.destination, Family::V4),
        Dimension::Destination6 => addr(&packet.destination, Family::V6),
        Dimension::SourcePort => ports(packet).map(|(source, _)| source.into()),
        Dimension::DestinationPort => ports(packet).map(|(_, destination)| destination.into()),
        Dimension::Protocol => Some(packet.protocol.into()),
        Dimension::Interface => packet.interface.map(Into::into),
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
        let of_family = match condition.dimension {
            Dimension::Source4 | Dimension::Destination4 => packet.family == Family::V4,
            Dimension::Source6 | Dimension::Destination6 => packet.family == Family::V6,
            Dimension::SourcePort | Dimension::DestinationPort => packet.ports != Known::Unknown,
            _ => true,
        };
        !of_family
            || value(packet, condition.dimension).is_some_and(|value| {
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

/// Numbers of a dimension: few, so that rules and packets meet, at both ends of what
/// packets have.
fn number(dimension: Dimension) -> BoxedStrategy<u128> {
    let (least, most): (u128, u128) = match dimension {
        // 10.0.0.0 to 223.255.255.255, and 2001:db8:: to fdff:…:ffff.
        Dimension::Source4 | Dimension::Destination4 => (0x0a00_0000, 0xdfff_ffff),
        Dimension::Source6 | Dimension::Destination6 => (0x2001_0db8 << 96, (0xfe00 << 112) - 1),
        Dimension::SourcePort | Dimension::DestinationPort => (0, 0xffff),
        Dimension::Protocol => (0, 0xff),
        Dimension::Interface => (0, 0xffff_ffff),
    };
    prop_oneof![
        4 => (0_u128..24).prop_map(move |above| least + above),
        2 => (0_u128..24).prop_map(move |below| most - below),
        1 => least..=most,
    ]
    .boxed()
}

fn condition(dimension: Dimension) -> impl Strategy<Value = Condition> {
    let range = (number(dimension), number(dimension)).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let one = number(dimension).prop_map(|number| (number, number));
    prop::collection::vec(prop_oneof![range, one], 0..5)
        .prop_map(move |ranges| Condition { dimension, values: Arc::new(Ranges::new(ranges)) })
}

fn rule(conditions: RangeInclusive<usize>) -> impl Strategy<Value = Rule> {
    let dimensions = prop::sample::subsequence(Dimension::ALL.to_vec(), conditions);
    let conditions =
        dimensions.prop_flat_map(|dimensions| dimensions.into_iter().map(condition).collect::<Vec<_>>());
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
        source4 in number(Dimension::Source4), source6 in number(Dimension::Source6),
        destination4 in number(Dimension::Destination4), destination6 in number(Dimension::Destination6),
        ports in prop_oneof![
            8 => (number(Dimension::SourcePort), number(Dimension::DestinationPort))
                .prop_map(|(source, destination)| Known::Is((port(source), port(destination)))),
            1 => Just(Known::Absent),
            1 => Just(Known::Unknown),
        ],
        protocol in number(Dimension::Protocol),
        interface in prop::option::of(number(Dimension::Interface)),
    ) -> Packet {
        let (family, source, destination) = if v4 {
            (Family::V4, mapped(word(source4).to_be_bytes()), mapped(word(destination4).to_be_bytes()))
        } else {
            (Family::V6, source6.to_be_bytes(), destination6.to_be_bytes())
        };
        Packet {
            family, source, destination, ports,
            protocol: u8::try_from(protocol).expect("8 bits"),
            interface: interface.map(word),
        }
    }
}

fn port(number: u128) -> u16 {
    u16::try_from(number).expect("16 bits")
}

fn word(number: u128) -> u32 {
    u32::try_from(number).expect("32 bits")
}

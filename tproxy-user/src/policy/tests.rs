//! The compiled image against a naive reading of the rules.

use std::sync::Arc;

use proptest::prelude::*;
use tproxy_common::abi::{Family, mapped};
use tproxy_common::policy::{Dimension, Known, LINE, MAX_RULES};

use super::compile::{Condition, Rule, RuleSet, TooManyRules, compile};
use super::facts::{Memory, Packet};
use super::model::{naive, packet, rule_set};
use super::ranges::Ranges;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn few_rules_decide_as_if_read_one_by_one(set in rule_set(12, 0..=4), packets in prop::collection::vec(packet(), 1..8)) {
        let image = Memory(compile(&set).expect("few rules"));
        for packet in packets {
            prop_assert_eq!(image.decide(&packet), naive(&set, &packet), "{:?}", packet);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn many_rules_decide_as_if_read_one_by_one(set in rule_set(MAX_RULES, 4..=7), packets in prop::collection::vec(packet(), 1..64)) {
        let image = Memory(compile(&set).expect("as many rules as there may be"));
        for packet in packets {
            prop_assert_eq!(image.decide(&packet), naive(&set, &packet), "{:?}", packet);
        }
    }
}

/// Numbers of intervals at which a line or a level is just full, and some around each.
#[test]
fn every_interval_is_found() {
    for dimension in [Dimension::Source4, Dimension::Destination6, Dimension::DestinationPort] {
        let fan_out = LINE / dimension.width();
        let full = [fan_out, fan_out * fan_out, fan_out * fan_out * fan_out, fan_out * (fan_out + 1)];
        // Two ends an interval.
        let counts = full.into_iter().flat_map(|ends| [ends / 2 - 1, ends / 2, ends / 2 + 1]);
        for count in counts.chain([0, 1, 2, fan_out * fan_out * 8 + 5]) {
            find_intervals(dimension, count as u128);
        }
    }
}

/// Looks on both sides of every end of so many intervals, spread over all that packets have.
fn find_intervals(dimension: Dimension, count: u128) {
    let bits = if dimension == Dimension::DestinationPort { 16 } else { 32 * dimension.width() };
    let most = u128::MAX >> (128 - bits);
    let step = most / (count + 1);
    if step < 4 {
        return;
    }
    let ranges: Vec<_> = (0..count).map(|at| (at * step + 1, at * step + step / 2)).collect();
    let values = Arc::new(Ranges::new(ranges.clone()));
    let rule = Rule { conditions: vec![Condition { dimension, values }], verdict: 1 };
    let image = Memory(compile(&RuleSet { rules: vec![rule], otherwise: 0 }).expect("one rule"));
    let verdict = |value| image.decide(&packet_with(dimension, value).expect("a value of packets")).0;
    for (first, last) in ranges {
        for (value, expected) in [(first - 1, 0), (first, 1), (last, 1), (last + 1, 0)] {
            assert_eq!(
                verdict(value),
                expected,
                "{dimension:?}: {value} of {:?}, {count} of them",
                (first, last)
            );
        }
    }
    assert_eq!(verdict(most), 0);
}

/// A packet with this value; `None` where none can have it.
fn packet_with(dimension: Dimension, value: u128) -> Option<Packet> {
    let mut packet = Packet {
        family: Family::V4,
        source: mapped([0; 4]),
        destination: mapped([0; 4]),
        ports: Known::Is((0, 0)),
        protocol: 6,
        interface: None,
    };
    let small = u32::try_from(value).ok();
    match dimension {
        Dimension::Source4 => packet.source = mapped(small?.to_be_bytes()),
        Dimension::Destination4 => packet.destination = mapped(small?.to_be_bytes()),
        Dimension::Source6 => (packet.family, packet.source) = (Family::V6, value.to_be_bytes()),
        Dimension::Destination6 => (packet.family, packet.destination) = (Family::V6, value.to_be_bytes()),
        Dimension::SourcePort => packet.ports = Known::Is((u16::try_from(value).ok()?, 0)),
        Dimension::DestinationPort => packet.ports = Known::Is((0, u16::try_from(value).ok()?)),
        Dimension::Protocol => packet.protocol = u8::try_from(value).ok()?,
        Dimension::Interface => packet.interface = Some(small?),
    }
    Some(packet)
}

#[test]
fn without_rules_the_default_decides() {
    let set = RuleSet { rules: Vec::new(), otherwise: 7777 };
    let packet = packet_with(Dimension::Protocol, 17).expect("UDP");
    assert_eq!(Memory(compile(&set).expect("no rule")).decide(&packet), (7777, 0));
}

#[test]
fn the_last_of_all_rules_decides_where_no_other_matches() {
    let port = |port: u128| Condition {
        dimension: Dimension::DestinationPort,
        values: Arc::new(Ranges::new(vec![(port, port)])),
    };
    let rules = (0..MAX_RULES).map(|number| Rule {
        conditions: vec![port(number as u128)],
        verdict: u32::try_from(number).expect("few"),
    });
    let image = Memory(compile(&RuleSet { rules: rules.collect(), otherwise: 7777 }).expect("all that fit"));
    let last = u32::try_from(MAX_RULES - 1).expect("few");
    for (port, expected) in [(0, (0, 0)), (last, (last, last)), (last + 1, (7777, last + 1))] {
        let packet = packet_with(Dimension::DestinationPort, port.into()).expect("a port");
        assert_eq!(image.decide(&packet), expected);
    }
}

#[test]
fn more_rules_than_fit_are_refused() {
    let rule = Rule { conditions: Vec::new(), verdict: 0 };
    let set = RuleSet { rules: vec![rule; MAX_RULES + 1], otherwise: 0 };
    assert_eq!(compile(&set), Err(TooManyRules(MAX_RULES + 1)));
}

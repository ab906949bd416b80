//! The compiled image against a naive reading of the rules.

use std::sync::Arc;

use proptest::prelude::*;
use tproxy_common::abi::{Family, mapped};
use tproxy_common::policy::{Dimension, Known, MAX_RULES};

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

    /// Trees of every height, and values at both sides of every end.
    #[test]
    fn every_interval_is_found(
        (dimension, count) in (prop::sample::select(Dimension::ALL.to_vec()), 0_usize..70_000)
    ) {
        let most = u128::MAX >> (128 - 32 * dimension.width());
        let step = most / (count as u128 + 1);
        prop_assume!(step > 2);
        let ranges: Vec<_> = (0..count as u128).map(|at| (at * step + 1, at * step + step / 2)).collect();
        let values = Arc::new(Ranges::new(ranges.clone()));
        let rule = Rule { conditions: vec![Condition { dimension, values }], verdict: 1 };
        let set = RuleSet { rules: vec![rule], otherwise: 0 };
        let image = Memory(compile(&set).expect("one rule"));
        for (first, last) in ranges.into_iter().step_by(count / 50 + 1) {
            for (value, verdict) in [(first - 1, 0), (first, 1), (last, 1), (last + 1, 0)] {
                if let Some(packet) = packet_with(dimension, value) {
                    prop_assert_eq!(image.decide(&packet).0, verdict, "{} of {:?}", value, (first, last));
                }
            }
        }
    }
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
fn more_rules_than_fit_are_refused() {
    let rule = Rule { conditions: Vec::new(), verdict: 0 };
    let set = RuleSet { rules: vec![rule; MAX_RULES + 1], otherwise: 0 };
    assert_eq!(compile(&set), Err(TooManyRules(MAX_RULES + 1)));
}

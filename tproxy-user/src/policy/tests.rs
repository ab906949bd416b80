//! The compiled image against a naive reading of the rules.

use std::sync::Arc;

use proptest::prelude::*;
use tproxy_common::abi::{Family, TCP, UDP, mapped};
use tproxy_common::policy::{Known, LINE, MAX_RULES, layout};

use super::compile::{Condition, Rule, RuleSet, Selector, Unfit, compile};
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
    for (selector, words) in [
        (Selector::Source4, 1),
        (Selector::Destination6, 4),
        (Selector::DestinationPort, 1),
        (Selector::Mac, 4),
        (Selector::Dscp, 1),
        (Selector::Mark { mask: u32::MAX }, 1),
        (Selector::Uid, 1),
        (Selector::Gid, 1),
        (Selector::Cgroup { depth: 2 }, 4),
        (Selector::Domain, 1),
    ] {
        let fan_out = LINE / words;
        // Of few values, spread over all, a short leaf holds one alone.
        let leaf = if words == 1 { layout::SHORT_LEAF } else { layout::LONG_LEAF };
        let leaves = [1, fan_out, fan_out * fan_out, fan_out * (fan_out + 1)];
        let full = leaves.into_iter().flat_map(|leaves| [leaves, leaves * leaf]);
        // Two ends an interval, and the end of all values.
        let counts = full.flat_map(|ends| [(ends / 2).saturating_sub(1), ends / 2, ends / 2 + 1]);
        for count in counts.chain([0, 1, 2, fan_out * fan_out * 8 + 5]) {
            find_intervals(selector, count as u128);
        }
    }
}

/// Looks on both sides of every end of so many intervals, spread over all that packets have.
fn find_intervals(selector: Selector, count: u128) {
    let most = (0..=128).rev().map(|bits| u128::MAX.checked_shr(128 - bits).unwrap_or(0));
    let most = most.into_iter().find(|most| packet_with(selector, *most).is_some()).expect("some value");
    let step = most / (count + 1);
    if step < 4 {
        return;
    }
    let ranges: Vec<_> = (0..count).map(|at| (at * step + 1, at * step + step / 2)).collect();
    let values = Arc::new(Ranges::new(ranges.clone()));
    let rule = Rule { conditions: vec![Condition { selector, values }], verdict: 1 };
    let image = Memory(compile(&RuleSet { rules: vec![rule], otherwise: 0 }).expect("one rule"));
    let verdict = |value| image.decide(&packet_with(selector, value).expect("a value of packets")).0;
    for (first, last) in ranges {
        for (value, expected) in [(first - 1, 0), (first, 1), (last, 1), (last + 1, 0)] {
            assert_eq!(
                verdict(value),
                expected,
                "{selector:?}: {value} of {:?}, {count} of them",
                (first, last)
            );
        }
    }
    assert_eq!(verdict(most), 0);
}

/// A packet with this value; `None` where none can have it.
fn packet_with(selector: Selector, value: u128) -> Option<Packet> {
    let mut packet = Packet { protocol: 6, ports: Known::Is((0, 0)), ..Packet::EMPTY };
    let small = u32::try_from(value).ok();
    match selector {
        Selector::Source4 => packet.source = mapped(small?.to_be_bytes()),
        Selector::Destination4 => packet.destination = mapped(small?.to_be_bytes()),
        Selector::Source6 => (packet.family, packet.source) = (Family::V6, value.to_be_bytes()),
        Selector::Destination6 => (packet.family, packet.destination) = (Family::V6, value.to_be_bytes()),
        Selector::SourcePort => packet.ports = Known::Is((u16::try_from(value).ok()?, 0)),
        Selector::DestinationPort => packet.ports = Known::Is((0, u16::try_from(value).ok()?)),
        Selector::Protocol => packet.protocol = u8::try_from(value).ok()?,
        Selector::Interface => packet.interface = Some(small?),
        Selector::Mac => packet.mac = Some(u64::try_from(value).ok().filter(|mac| *mac < 1 << 48)?),
        Selector::Dscp => packet.dscp = u8::try_from(value).ok().filter(|dscp| *dscp < 64)?,
        Selector::Mark { .. } => packet.mark = small?,
        Selector::Uid => packet.uid = Some(small?),
        Selector::Gid => packet.gid = Some(small?),
        Selector::Cgroup { depth } => {
            packet.cgroups = vec![0; usize::try_from(depth).ok()?];
            packet.cgroups.push(u64::try_from(value).ok()?);
        }
        Selector::Domain => packet.domain = Known::Is(small?),
    }
    Some(packet)
}

/// Each rule matches the addresses that have one bit: every combination is another class.
#[test]
fn more_overlaps_than_fit_are_refused() {
    let rules = |bits: u32| {
        let with = move |bit: u32| (0..1_u128 << bits).filter(move |address| address >> bit & 1 == 1);
        let rule = move |bit| {
            let values = Arc::new(Ranges::new(with(bit).map(|address| (address, address)).collect()));
            Rule { conditions: vec![Condition { selector: Selector::Destination4, values }], verdict: bit }
        };
        RuleSet { rules: (0..bits).map(rule).collect(), otherwise: 99 }
    };
    // A class is left for packets of which nothing is known, as for those that have all bits.
    let image = Memory(compile(&rules(16)).expect("65,536 classes"));
    for (address, verdict) in [(0_u32, 99), (1, 0), (0xa000, 13), (0xffff, 0), (0x1_0001, 99)] {
        let destination = mapped(address.to_be_bytes());
        assert_eq!(image.decide(&Packet { destination, ..Packet::EMPTY }).0, verdict, "{address:#x}");
    }
    assert_eq!(compile(&rules(17)), Err(Unfit::Overlaps));
}

#[test]
fn without_rules_the_default_decides() {
    let set = RuleSet { rules: Vec::new(), otherwise: 7777 };
    let packet = packet_with(Selector::Protocol, 17).expect("UDP");
    assert_eq!(Memory(compile(&set).expect("no rule")).decide(&packet), (7777, 0));
}

#[test]
fn what_the_family_and_the_protocol_decide_is_settled() {
    let ask = |selector, first: u128, last: u128| Condition {
        selector,
        values: Arc::new(Ranges::new(vec![(first, last)])),
    };
    let only = |protocol: u8| ask(Selector::Protocol, protocol.into(), protocol.into());
    let dns = ask(Selector::DestinationPort, 53, 53);
    let every_port = ask(Selector::DestinationPort, 0, u16::MAX.into());
    let over_v4 = [
        ask(Selector::Source4, 0, u32::MAX.into()),
        Condition { selector: Selector::Source6, values: Arc::default() },
    ];
    let depends = layout::UNSETTLED;
    for (rules, expected) in [
        (vec![], [0; 4]),
        (vec![vec![only(TCP)]], [0, 1, 0, 1]),
        (vec![vec![only(UDP)], vec![]], [1, 0, 1, 0]),
        (vec![vec![only(UDP), dns.clone()], vec![only(TCP)]], [1, depends, 1, depends]),
        (vec![over_v4.to_vec(), vec![only(TCP)]], [0, 0, 1, 2]),
        (vec![vec![dns], vec![]], [depends; 4]),
        // A fragment has none.
        (vec![vec![every_port]], [depends; 4]),
        (vec![vec![ask(Selector::Source4, 0, 5)]], [depends, depends, 0, 0]),
    ] {
        let rules = rules.into_iter().map(|conditions| Rule { conditions, verdict: 1 }).collect();
        let image = compile(&RuleSet { rules, otherwise: 2 }).expect("few rules");
        assert_eq!(image[0][layout::SETTLED..][..4], expected);
    }
}

#[test]
fn the_last_of_all_rules_decides_where_no_other_matches() {
    let port = |port: u128| Condition {
        selector: Selector::DestinationPort,
        values: Arc::new(Ranges::new(vec![(port, port)])),
    };
    let rules = (0..MAX_RULES).map(|number| Rule {
        conditions: vec![port(number as u128)],
        verdict: u32::try_from(number).expect("few"),
    });
    let image = Memory(compile(&RuleSet { rules: rules.collect(), otherwise: 7777 }).expect("all that fit"));
    let last = u32::try_from(MAX_RULES - 1).expect("few");
    for (port, expected) in [(0, (0, 0)), (last, (last, last)), (last + 1, (7777, last + 1))] {
        let packet = packet_with(Selector::DestinationPort, port.into()).expect("a port");
        assert_eq!(image.decide(&packet), expected);
    }
}

#[test]
fn more_rules_than_fit_are_refused() {
    let rule = Rule { conditions: Vec::new(), verdict: 0 };
    let set = RuleSet { rules: vec![rule; MAX_RULES + 1], otherwise: 0 };
    assert_eq!(compile(&set), Err(Unfit::Rules(MAX_RULES + 1)));
}

/// A rule that wants each of these to be 1.
fn ones(selectors: &[Selector]) -> Rule {
    let values = Arc::new(Ranges::new(vec![(1, 1)]));
    let condition = |selector: &Selector| Condition { selector: *selector, values: values.clone() };
    Rule { conditions: selectors.iter().map(condition).collect(), verdict: 1 }
}

#[test]
fn each_mask_has_a_dimension_of_its_own() {
    let [low, high] = [0x0f, 0xf1].map(|mask| Selector::Mark { mask });
    let mut set = RuleSet { rules: vec![ones(&[high, low])], otherwise: 0 };
    let image = Memory(compile(&set).expect("two masks"));
    for (mark, expected) in [(1, 1), (0x101, 1), (0x11, 0), (3, 0), (0, 0)] {
        assert_eq!(image.decide(&Packet { mark, ..Packet::EMPTY }).0, expected, "{mark:#x}");
    }
    // The same mask again is none more.
    set.rules.push(ones(&[low]));
    assert!(compile(&set).is_ok());
    set.rules.push(ones(&[Selector::Mark { mask: 1 }]));
    assert_eq!(compile(&set), Err(Unfit::Masks(3)));
}

#[test]
fn a_socket_is_in_a_control_group_and_in_those_above_it() {
    let at = |depth| Selector::Cgroup { depth };
    let mut set = RuleSet { rules: vec![ones(&[at(3), at(1)]), ones(&[at(2)])], otherwise: 0 };
    let image = Memory(compile(&set).expect("three depths"));
    for (cgroups, expected) in
        [(vec![7, 1, 7, 1, 9], (1, 0)), (vec![1, 1, 1], (1, 1)), (vec![1, 1], (0, 2)), (vec![], (0, 2))]
    {
        assert_eq!(image.decide(&Packet { cgroups, ..Packet::EMPTY }), expected);
    }
    set.rules.push(ones(&[at(0)]));
    assert_eq!(compile(&set), Err(Unfit::Depths(4)));
}

//! What the flags select of the packets that arrive, as rules: what is outside passes.

use std::sync::Arc;

use ipnet::IpNet;
use tproxy_common::abi::{TCP, UDP, Verdict};

use crate::config::Scope;

use super::compile::{Condition, Rule, RuleSet, Selector};
use super::ranges::Ranges;
use super::rules::range;

impl Scope {
    /// The rules, one for each respect in which a packet may not be selected.
    #[must_use]
    pub fn rules(&self) -> RuleSet {
        let mut rules = Vec::new();
        let mut pass = |conditions: Vec<(Selector, Ranges)>| {
            if conditions.iter().any(|(_, values)| *values != Ranges::default()) {
                let condition = |(selector, values)| Condition { selector, values: Arc::new(values) };
                let conditions = conditions.into_iter().map(condition).collect();
                rules.push(Rule { conditions, verdict: Verdict::Pass as u32 });
            }
        };
        let everything =
            |unwanted: bool, most: u128| Ranges::new(if unwanted { vec![(0, most)] } else { Vec::new() });
        pass(vec![
            (Selector::Source4, everything(!self.v4, u32::MAX.into())),
            (Selector::Source6, everything(!self.v6, u128::MAX)),
        ]);
        let protocols = [(self.tcp, TCP), (self.udp, UDP)].into_iter().filter(|(selected, _)| !selected);
        pass(vec![(
            Selector::Protocol,
            Ranges::new(protocols.map(|(_, protocol)| (protocol.into(), protocol.into())).collect()),
        )]);
        if !self.ports.is_empty() {
            let ports = self.ports.iter().map(|(first, last)| ((*first).into(), (*last).into())).collect();
            pass(vec![(Selector::DestinationPort, Ranges::new(ports).complement(u16::MAX.into()))]);
        }
        pass(unselected([Selector::Source4, Selector::Source6], &self.from, &self.not_from));
        pass(unselected([Selector::Destination4, Selector::Destination6], &self.to, &self.not_to));
        RuleSet { rules, otherwise: Verdict::Proxy as u32 }
    }
}

/// The addresses that a selection leaves out, by family.
fn unselected(selectors: [Selector; 2], selected: &[IpNet], excluded: &[IpNet]) -> Vec<(Selector, Ranges)> {
    let of_family = |nets: &[IpNet], v4: bool| -> Vec<(u128, u128)> {
        nets.iter().filter(|net| matches!(net, IpNet::V4(_)) == v4).map(range).collect()
    };
    let everywhere = selected.is_empty();
    [(true, u128::from(u32::MAX)), (false, u128::MAX)]
        .into_iter()
        .zip(selectors)
        .map(|((v4, most), selector)| {
            let mut selected = of_family(selected, v4);
            if everywhere {
                selected.push((0, most));
            }
            (selector, Ranges::new(selected).complement(most).union(Ranges::new(of_family(excluded, v4))))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;
    use tproxy_common::abi::{Family, mapped};
    use tproxy_common::policy::Known;

    use super::*;
    use crate::policy::compile::compile;
    use crate::policy::facts::{Memory, Packet};

    fn naive(scope: &Scope, (source, destination): (IpAddr, IpAddr), protocol: u8, port: u16) -> bool {
        let within = |nets: &[IpNet], address: IpAddr| nets.iter().any(|net| net.contains(&address));
        let selected = |included: &[IpNet], excluded: &[IpNet], address| {
            (included.is_empty() || within(included, address)) && !within(excluded, address)
        };
        (if source.is_ipv4() { scope.v4 } else { scope.v6 })
            && (if protocol == TCP { scope.tcp } else { scope.udp })
            && (scope.ports.is_empty()
                || scope.ports.iter().any(|(first, last)| (*first..=*last).contains(&port)))
            && selected(&scope.from, &scope.not_from, source)
            && selected(&scope.to, &scope.not_to, destination)
    }

    /// Addresses with few bits, so that networks and addresses often meet; of IPv6 also
    /// such as IPv4 ones would be mapped to.
    fn address(v4: bool) -> BoxedStrategy<IpAddr> {
        if v4 {
            (0u32..16, 0u32..4).prop_map(|(high, low)| IpAddr::V4((high << 28 | low).into())).boxed()
        } else {
            prop_oneof![
                (0u128..16, 0u128..4).prop_map(|(high, low)| IpAddr::V6((high << 124 | low).into())),
                (0u128..4).prop_map(|low| IpAddr::V6((0xffff_0000_0000 | low).into())),
            ]
            .boxed()
        }
    }

    fn networks() -> impl Strategy<Value = Vec<IpNet>> {
        let network = (any::<bool>(), 0u8..=128).prop_flat_map(|(v4, len)| {
            address(v4).prop_map(move |address| {
                let len = if v4 { len % 33 } else { len };
                IpNet::new(address, len).expect("a length").trunc()
            })
        });
        prop::collection::vec(network, 0..5)
    }

    prop_compose! {
        fn scope()(
            families in (prop::bool::weighted(0.9), prop::bool::weighted(0.9)),
            protocols in (prop::bool::weighted(0.9), prop::bool::weighted(0.9)),
            ports in prop::collection::vec((0u16..8, 0u16..8), 0..3),
            from in networks(), not_from in networks(), to in networks(), not_to in networks(),
        ) -> Scope {
            let ports = ports.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect();
            Scope {
                v4: families.0, v6: families.1, tcp: protocols.0, udp: protocols.1,
                ports, from, not_from, to, not_to,
            }
        }
    }

    fn packet() -> impl Strategy<Value = (IpAddr, IpAddr, u8, u16)> {
        any::<bool>()
            .prop_flat_map(|v4| (address(v4), address(v4), prop::sample::select(vec![TCP, UDP]), 0u16..10))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn the_rules_are_the_selection(scope in scope(), packets in prop::collection::vec(packet(), 1..20)) {
            let rules = Memory(compile(&scope.rules()).expect("few rules"));
            for (source, destination, protocol, port) in packets {
                let family = if source.is_ipv4() { Family::V4 } else { Family::V6 };
                let addr = |address| match address {
                    IpAddr::V4(v4) => mapped(v4.octets()),
                    IpAddr::V6(v6) => v6.octets(),
                };
                let ports = Known::Is((1, port));
                let seen = Packet {
                    family, source: addr(source), destination: addr(destination), ports, protocol,
                    ..Packet::EMPTY
                };
                let selected = naive(&scope, (source, destination), protocol, port);
                prop_assert_eq!(rules.decide(&seen).0 == Verdict::Proxy as u32, selected, "{:?}", seen);
            }
        }
    }
}

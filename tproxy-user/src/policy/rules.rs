//! The rules of the configuration as the image's rules: names become numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use tproxy_common::abi::{Decision, UDP, Verdict};

use crate::config::Scope;
use crate::config::rule::{Action, Addresses, Conditions, Rule as Configured};
use crate::config::upstream::Upstream;

use super::compile::{Condition, Rule, RuleSet, Selector};
use super::names::Names;
use super::ranges::Ranges;
use super::targets::{Targets, TooManyTargets};

/// What is configured: which flows are captured, by what they reach their destinations, and rules.
#[derive(Clone, Copy, Debug)]
pub struct Written<'a> {
    /// Which flows.
    pub scope: &'a Scope,
    /// The upstream of those that no rule says otherwise of.
    pub upstream: &'a Upstream,
    /// Rules, of which the first has the number 1.
    pub rules: &'a [Configured],
}

/// The rules behind the selection: rule 1 is the first that is written. It is to be done again
/// when [`Names`] change.
///
/// # Errors
///
/// [`TooManyTargets`].
pub fn rule_set(written: Written<'_>, names: &Names, targets: &Targets) -> Result<RuleSet, TooManyTargets> {
    let mut set = written.scope.rules();
    for (number, rule) in (1..).zip(written.rules) {
        let (verdict, target) = match &rule.action {
            Action::Proxy(None) => (Verdict::Proxy, 0),
            Action::Proxy(Some(upstream)) => (Verdict::Proxy, targets.of_upstream(upstream)?),
            Action::Divert(target) => (Verdict::Divert, targets.of_address(*target)?),
            Action::Pass => (Verdict::Pass, 0),
            Action::Reject => (Verdict::Reject, 0),
            Action::Drop => (Verdict::Drop, 0),
        };
        let verdict = Decision::of(verdict as u8, number, target).word();
        let conditions = alternatives(&rule.conditions, names);
        let upstream = match &rule.action {
            Action::Proxy(upstream) => Some(upstream.as_ref().unwrap_or(written.upstream)),
            _ => None,
        };
        if upstream.is_some_and(Upstream::passes_udp) {
            let verdict = Decision::of(Verdict::Pass as u8, number, 0).word();
            let of_udp = conditions.iter().filter_map(|conditions| of_udp(conditions));
            set.rules.extend(of_udp.map(|conditions| Rule { conditions, verdict }));
        }
        set.rules.extend(conditions.into_iter().map(|conditions| Rule { conditions, verdict }));
    }
    if written.upstream.passes_udp() {
        let verdict = Decision::by_default(Verdict::Pass).word();
        set.rules.extend(of_udp(&[]).map(|conditions| Rule { conditions, verdict }));
    }
    Ok(tell_of_names(set))
}

/// The same conditions, of UDP flows alone; `None`: they are of others.
fn of_udp(conditions: &[Condition]) -> Option<Vec<Condition>> {
    let is_protocol = |condition: &&Condition| condition.selector == Selector::Protocol;
    if conditions.iter().find(is_protocol).is_some_and(|protocols| !protocols.values.contains(UDP.into())) {
        return None;
    }
    let udp = Condition { selector: Selector::Protocol, values: collect(std::iter::once(single(UDP))) };
    let others = conditions.iter().filter(|condition| !is_protocol(condition)).cloned();
    Some(others.chain([udp]).collect())
}

/// Marks what stands behind rules that ask for names: only that may depend on one.
fn tell_of_names(mut set: RuleSet) -> RuleSet {
    let mut behind = false;
    for rule in &mut set.rules {
        if behind {
            rule.verdict = Decision::from_word(rule.verdict).behind_names().word();
        }
        behind |= rule.conditions.iter().any(|condition| condition.selector == Selector::Domain);
    }
    if behind {
        set.otherwise = Decision::from_word(set.otherwise).behind_names().word();
    }
    set
}

/// A packet that meets one of these meets the conditions of a rule: values of one key may
/// belong to several selectors, each of which is a rule of its own.
fn alternatives(of: &Conditions, names: &Names) -> Vec<Vec<Condition>> {
    let common = common(of, names);
    let marks = by_selector(
        of.marks.iter().map(|mark| (Selector::Mark { mask: mark.mask }, Some(single(mark.value)))),
    );
    let cgroups = by_selector(of.cgroups.iter().map(|name| {
        let depth = u32::try_from(name.split('/').count()).unwrap_or(u32::MAX);
        (Selector::Cgroup { depth }, names.cgroup(name).map(single))
    }));
    let mut alternatives = vec![common];
    for choices in [marks, cgroups].into_iter().filter(|choices| !choices.is_empty()) {
        alternatives = alternatives
            .iter()
            .flat_map(|conditions| {
                choices.iter().map(|choice| [conditions, std::slice::from_ref(choice)].concat())
            })
            .collect();
    }
    alternatives
}

/// Values by what they are compared with; a selector of which no value is there matches nothing.
fn by_selector(values: impl Iterator<Item = (Selector, Option<(u128, u128)>)>) -> Vec<Condition> {
    let mut selectors = BTreeMap::<Selector, Vec<_>>::new();
    for (selector, value) in values {
        selectors.entry(selector).or_default().extend(value);
    }
    selectors
        .into_iter()
        .map(|(selector, values)| Condition { selector, values: collect(values.into_iter()) })
        .collect()
}

fn common(of: &Conditions, names: &Names) -> Vec<Condition> {
    let mut conditions = Vec::new();
    let mut require = |selector, values| conditions.push(Condition { selector, values });
    for (addresses, v4, v6) in [
        (&of.from, Selector::Source4, Selector::Source6),
        (&of.to, Selector::Destination4, Selector::Destination6),
    ] {
        if *addresses != Addresses::default() {
            require(v4, family(addresses, true));
            require(v6, family(addresses, false));
        }
    }
    let ports = |(first, last): &(u16, u16)| ((*first).into(), (*last).into());
    let ids = |(first, last): &(u32, u32)| ((*first).into(), (*last).into());
    for (asked, selector, values) in [
        (!of.protocols.is_empty(), Selector::Protocol, collect(of.protocols.iter().map(|p| single(*p)))),
        (!of.from_ports.is_empty(), Selector::SourcePort, collect(of.from_ports.iter().map(ports))),
        (!of.to_ports.is_empty(), Selector::DestinationPort, collect(of.to_ports.iter().map(ports))),
        (
            !of.interfaces.is_empty(),
            Selector::Interface,
            collect(of.interfaces.iter().flat_map(|glob| names.interfaces(glob)).map(single)),
        ),
        (!of.macs.is_empty(), Selector::Mac, collect(of.macs.iter().map(|mac| single(number(*mac))))),
        (!of.dscps.is_empty(), Selector::Dscp, collect(of.dscps.iter().map(|dscp| single(*dscp)))),
        (!of.uids.is_empty(), Selector::Uid, collect(of.uids.iter().map(ids))),
        (!of.gids.is_empty(), Selector::Gid, collect(of.gids.iter().map(ids))),
    ] {
        if asked {
            require(selector, values);
        }
    }
    if !of.domains.is_empty() {
        require(Selector::Domain, Arc::clone(&of.domains.sets));
    }
    conditions
}

/// A link-layer address as a number.
pub(super) fn number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn single(number: impl Into<u128>) -> (u128, u128) {
    let number = number.into();
    (number, number)
}

fn collect(ranges: impl Iterator<Item = (u128, u128)>) -> Arc<Ranges> {
    Arc::new(Ranges::new(ranges.collect()))
}

/// The addresses of one family. A file's, where there is nothing else, stay one set for
/// all rules that name it.
fn family(addresses: &Addresses, v4: bool) -> Arc<Ranges> {
    let of_family = |nets: &[IpNet]| -> Vec<(u128, u128)> {
        nets.iter().filter(|net| matches!(net, IpNet::V4(_)) == v4).map(range).collect()
    };
    let files: Vec<_> = addresses.files.iter().map(|file| if v4 { &file.v4 } else { &file.v6 }).collect();
    if let ([file], true, true) = (&*files, addresses.nets.is_empty(), addresses.not.is_empty()) {
        return Arc::clone(file);
    }
    let most = if v4 { u32::MAX.into() } else { u128::MAX };
    let mut included = of_family(&addresses.nets);
    for file in &files {
        included.extend(file.as_slice());
    }
    if addresses.nets.is_empty() && files.is_empty() {
        included.push((0, most));
    }
    let excluded = Ranges::new(of_family(&addresses.not));
    // Of two sets, what is in the one and not in the other.
    Arc::new(Ranges::new(included).complement(most).union(excluded).complement(most))
}

/// First and last address of a network, as numbers of its family.
pub(super) fn range(net: &IpNet) -> (u128, u128) {
    match net {
        IpNet::V4(net) => (net.network().to_bits().into(), net.broadcast().to_bits().into()),
        IpNet::V6(net) => (net.network().to_bits(), net.broadcast().to_bits()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::path::PathBuf;

    use proptest::prelude::*;
    use tproxy_common::abi::{Family, TCP, UDP, mapped};
    use tproxy_common::policy::Known;

    use super::*;
    use crate::config::Mark;
    use crate::config::rule::PrefixFile;
    use crate::policy::compile::compile;
    use crate::policy::facts::{Memory, Packet};

    const INTERFACES: [(u32, &str); 3] = [(1, "lan0"), (2, "lan1"), (3, "wan")];

    /// What a condition says, read by itself.
    fn meets(of: &Conditions, packet: &Packet) -> bool {
        let any = |list: bool, met: bool| !list || met;
        let is = |first: u16, last: u16, port| (first..=last).contains(&port);
        let Known::Is((from_port, to_port)) = packet.ports else { panic!("no ports") };
        let name = packet.interface.and_then(|index| INTERFACES.iter().find(|(known, _)| *known == index));
        let named = |glob: &String| {
            name.is_some_and(|(_, name)| {
                glob.strip_suffix('*').map_or(glob == name, |start| name.starts_with(start))
            })
        };
        any(!of.protocols.is_empty(), of.protocols.contains(&packet.protocol))
            && within(&of.from, address(packet, &packet.source))
            && within(&of.to, address(packet, &packet.destination))
            && any(!of.from_ports.is_empty(), of.from_ports.iter().any(|(a, b)| is(*a, *b, from_port)))
            && any(!of.to_ports.is_empty(), of.to_ports.iter().any(|(a, b)| is(*a, *b, to_port)))
            && any(!of.interfaces.is_empty(), of.interfaces.iter().any(named))
            && any(!of.macs.is_empty(), of.macs.iter().any(|mac| packet.mac == Some(number(*mac))))
            && any(!of.dscps.is_empty(), of.dscps.contains(&packet.dscp))
            && any(!of.marks.is_empty(), of.marks.iter().any(|mark| mark.matches(packet.mark)))
            && any(!of.uids.is_empty(), among(&of.uids, packet.uid))
            && any(!of.gids.is_empty(), among(&of.gids, packet.gid))
    }

    fn among(of: &[(u32, u32)], id: Option<u32>) -> bool {
        id.is_some_and(|id| of.iter().any(|(first, last)| (*first..=*last).contains(&id)))
    }

    fn within(of: &Addresses, address: IpAddr) -> bool {
        let holds = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
        let number = match address {
            IpAddr::V4(v4) => u128::from(v4.to_bits()),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let in_file = |file: &PrefixFile| {
            if address.is_ipv4() { file.v4.contains(number) } else { file.v6.contains(number) }
        };
        let all = of.nets.is_empty() && of.files.is_empty();
        (all || holds(&of.nets) || of.files.iter().any(in_file)) && !holds(&of.not)
    }

    fn address(packet: &Packet, addr: &[u8; 16]) -> IpAddr {
        match packet.family {
            Family::V4 => [addr[12], addr[13], addr[14], addr[15]].into(),
            Family::V6 => (*addr).into(),
        }
    }

    /// Few values, so that rules and packets meet.
    fn ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0_u32..8).prop_map(|low| IpAddr::V4((0x0a00_0000 + low).into())),
            (0_u128..8).prop_map(|low| IpAddr::V6(((0xfd00 << 112) + low).into())),
        ]
    }

    fn nets() -> impl Strategy<Value = Vec<IpNet>> {
        let net = (ip(), 0_u8..4).prop_map(|(ip, short)| {
            let most = if ip.is_ipv4() { 32 } else { 128 };
            IpNet::new(ip, most - short).expect("a length").trunc()
        });
        prop::collection::vec(net, 0..3)
    }

    fn addresses() -> impl Strategy<Value = Addresses> {
        let files = prop::collection::vec(nets().prop_map(|nets| file(&nets)), 0..2);
        (nets(), files, nets()).prop_map(|(nets, files, not)| Addresses { nets, files, not })
    }

    fn file(nets: &[IpNet]) -> PrefixFile {
        let of = |v4: bool| nets.iter().filter(move |net| net.addr().is_ipv4() == v4).map(range);
        let (v4, v6) = (collect(of(true)), collect(of(false)));
        PrefixFile { path: PathBuf::new(), digest: String::new(), count: nets.len(), v4, v6 }
    }

    fn list<S: Strategy>(of: S) -> impl Strategy<Value = Vec<S::Value>> {
        prop_oneof![2 => Just(0..1_usize), 1 => Just(1..3)].prop_flat_map({
            let of = std::sync::Arc::new(of);
            move |size| prop::collection::vec(std::sync::Arc::clone(&of), size)
        })
    }

    fn span() -> impl Strategy<Value = (u16, u16)> {
        (0_u16..6, 0_u16..6).prop_map(|(a, b)| (a.min(b), a.max(b)))
    }

    prop_compose! {
        fn conditions()(
            protocols in list(prop::sample::select(vec![TCP, UDP])),
            from in addresses(), to in addresses(),
            from_ports in list(span()), to_ports in list(span()),
            interfaces in list(prop::sample::select(vec!["lan*", "wan", "lan1", "eth9"])),
            macs in list((0_u8..3).prop_map(|last| [2, 0, 0, 0, 0, last])),
            dscps in list(0_u8..3),
            marks in list((0_u32..4, prop::sample::select(vec![1, 3])).prop_map(|(value, mask)| {
                Mark { value: value & mask, mask }
            })),
            uids in list(span().prop_map(|(a, b)| (a.into(), b.into()))),
            gids in list(span().prop_map(|(a, b)| (a.into(), b.into()))),
        ) -> Conditions {
            let interfaces = interfaces.into_iter().map(str::to_owned).collect();
            Conditions {
                protocols, from, to, from_ports, to_ports, interfaces, macs, dscps, marks, uids, gids,
                cgroups: Vec::new(), ..Conditions::default()
            }
        }
    }

    prop_compose! {
        fn packet()(
            ends in (ip(), ip()).prop_filter("of one family", |(a, b)| a.is_ipv4() == b.is_ipv4()),
            ports in (0_u16..6, 0_u16..6), protocol in prop::sample::select(vec![TCP, UDP]),
            interface in prop::option::of(1_u32..4), mac in prop::option::of(0x0200_0000_0000_u64..0x0200_0000_0003),
            dscp in 0_u8..3, mark in 0_u32..8, uid in prop::option::of(0_u32..6),
            gid in prop::option::of(0_u32..6),
        ) -> Packet {
            let addr = |ip| match ip {
                IpAddr::V4(v4) => mapped(v4.octets()),
                IpAddr::V6(v6) => v6.octets(),
            };
            Packet {
                family: if ends.0.is_ipv4() { Family::V4 } else { Family::V6 },
                source: addr(ends.0), destination: addr(ends.1), ports: Known::Is(ports),
                protocol, interface, mac, dscp, mark, uid, gid, ..Packet::EMPTY
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn the_first_rule_that_matches_decides(
            rules in prop::collection::vec(conditions(), 0..8), packets in prop::collection::vec(packet(), 1..16),
        ) {
            let interfaces = INTERFACES.map(|(index, name)| (index, name.to_owned()));
            let rules: Vec<_> =
                rules.into_iter().map(|conditions| Configured { conditions, action: Action::Drop }).collect();
            let names = Names::new(&interfaces, &rules);
            let set = rule_set(Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &rules }, &names, &Targets::default()).expect("no targets");
            let image = Memory(compile(&set).expect("few rules"));
            for packet in packets {
                let first = rules.iter().position(|rule| meets(&rule.conditions, &packet));
                let rule = Decision::from_word(image.decide(&packet).0).rule();
                prop_assert_eq!(usize::from(rule), first.map_or(0, |at| at + 1), "{:?}", packet);
            }
        }
    }
}

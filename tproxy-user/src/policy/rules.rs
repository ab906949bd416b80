//! The rules of the configuration as the image's rules: names become numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use tproxy_common::abi::{Decision, Verdict};

use crate::config::Scope;
use crate::config::rule::{Action, Addresses, Conditions, Rule as Configured};

use super::compile::{Condition, Rule, RuleSet, Selector};
use super::names::Names;
use super::ranges::Ranges;
use super::targets::{Targets, TooManyTargets};

/// The rules behind the selection: rule 1 is the first of `rules`. It is to be done again
/// when [`Names`] change.
///
/// # Errors
///
/// [`TooManyTargets`].
pub fn rule_set(
    scope: &Scope,
    rules: &[Configured],
    names: &Names,
    targets: &Targets,
) -> Result<RuleSet, TooManyTargets> {
    let mut set = scope.rules();
    for (number, rule) in (1..).zip(rules) {
        let (verdict, target) = match rule.action {
            Action::Proxy => (Verdict::Proxy, 0),
            Action::Divert(target) => (Verdict::Divert, targets.number(target)?),
            Action::Pass => (Verdict::Pass, 0),
            Action::Reject => (Verdict::Reject, 0),
            Action::Drop => (Verdict::Drop, 0),
        };
        let verdict = Decision::of(verdict as u8, number, target).word();
        let conditions = alternatives(&rule.conditions, names);
        set.rules.extend(conditions.into_iter().map(|conditions| Rule { conditions, verdict }));
    }
    Ok(tell_of_names(set))
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
        (
            !of.uids.is_empty(),
            Selector::Uid,
            collect(of.uids.iter().map(|(first, last)| ((*first).into(), (*last).into()))),
        ),
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

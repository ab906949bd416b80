//! The rules of the configuration as the image's rules: names become numbers.

use std::sync::Arc;

use ipnet::IpNet;
use tproxy_common::abi::{Decision, Verdict};
use tproxy_common::policy::Dimension;

use crate::config::Scope;
use crate::config::rule::{Action, Addresses, Conditions, Rule as Configured};

use super::compile::{Condition, Rule, RuleSet};
use super::ranges::Ranges;
use super::targets::{Targets, TooManyTargets};

/// The rules behind the selection: rule 1 is the first of `rules`.
///
/// `interfaces` are those of the host, index and name. A rule that names one which
/// is not there matches nothing; so this is to be done again when they change.
///
/// # Errors
///
/// [`TooManyTargets`].
pub fn rule_set(
    scope: &Scope,
    rules: &[Configured],
    interfaces: &[(u32, String)],
    targets: &Targets,
) -> Result<RuleSet, TooManyTargets> {
    let mut set = scope.rules();
    for (number, rule) in (1..).zip(rules) {
        let decision = match rule.action {
            Action::Proxy => Decision::of(Verdict::Proxy as u8, number, 0),
            Action::Divert(target) => Decision::of(Verdict::Divert as u8, number, targets.number(target)?),
            Action::Pass => Decision::of(Verdict::Pass as u8, number, 0),
            Action::Reject => Decision::of(Verdict::Reject as u8, number, 0),
            Action::Drop => Decision::of(Verdict::Drop as u8, number, 0),
        };
        set.rules
            .push(Rule { conditions: conditions(&rule.conditions, interfaces), verdict: decision.word() });
    }
    Ok(set)
}

fn conditions(of: &Conditions, interfaces: &[(u32, String)]) -> Vec<Condition> {
    let mut conditions = Vec::new();
    let mut require = |dimension, values| conditions.push(Condition { dimension, values });
    if !of.protocols.is_empty() {
        let protocols = of.protocols.iter().map(|protocol| single(*protocol));
        require(Dimension::Protocol, collect(protocols));
    }
    for (addresses, v4, v6) in [
        (&of.from, Dimension::Source4, Dimension::Source6),
        (&of.to, Dimension::Destination4, Dimension::Destination6),
    ] {
        if *addresses != Addresses::default() {
            require(v4, family(addresses, true));
            require(v6, family(addresses, false));
        }
    }
    for (ports, dimension) in
        [(&of.from_ports, Dimension::SourcePort), (&of.to_ports, Dimension::DestinationPort)]
    {
        if !ports.is_empty() {
            require(dimension, collect(ports.iter().map(|(first, last)| ((*first).into(), (*last).into()))));
        }
    }
    if !of.interfaces.is_empty() {
        let named = interfaces.iter().filter(|(_, name)| of.interfaces.iter().any(|glob| names(glob, name)));
        require(Dimension::Interface, collect(named.map(|(index, _)| single(*index))));
    }
    conditions
}

/// Whether a name or glob of the configuration is that of an interface.
fn names(glob: &str, interface: &str) -> bool {
    glob == interface || glob::Pattern::new(glob).is_ok_and(|pattern| pattern.matches(interface))
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

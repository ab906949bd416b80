//! Flattened rules → what the configuration says.

use std::collections::BTreeSet;

use crate::config::Mark;
use crate::config::rule::Action;
use crate::policy::ranges::Ranges;

use super::condition::{Conditions, Dimension, FAMILIES};
use super::flatten::{Flat, Lost};
use super::ports::Ports;
use super::simplify::{Decides, simplify};

/// A configuration, as far as rules tell it.
#[derive(Clone, Debug)]
pub(crate) struct Settled {
    /// Interfaces, or beginnings of their names with a final `*`.
    pub(crate) interfaces: Vec<String>,
    /// Captured families: IPv4, IPv6.
    pub(crate) families: [bool; 2],
    /// Captured protocols.
    pub(crate) protocols: Ranges,
    /// The host's own traffic is captured, too.
    pub(crate) own_traffic: bool,
    /// The mark of captured packets, where it is told.
    pub(crate) mark: Option<Mark>,
    /// The mark of the proxy's own packets, where it is told or the default will not do.
    pub(crate) own_mark: Option<u32>,
    /// The proxy's port, where it is told.
    pub(crate) on_port: Option<u16>,
    /// The rules.
    pub(crate) rules: Vec<Decided>,
    /// What a reader should know.
    pub(crate) notes: Vec<String>,
}

/// A rule of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decided {
    /// Which flows.
    pub(crate) conditions: Conditions,
    /// What becomes of them.
    pub(crate) action: Action,
    /// What it was made of.
    pub(crate) sources: BTreeSet<usize>,
}

impl Decides for Decided {
    fn conditions(&self) -> &Conditions {
        &self.conditions
    }

    fn agrees(&self, other: &Self) -> bool {
        self.action == other.action
    }

    fn absorb(&mut self, other: Self, conditions: Conditions) {
        self.conditions = conditions;
        self.sources.extend(other.sources);
    }
}

/// Rules for what arrives and for the host's own traffic, as one list.
#[must_use]
pub(crate) fn settle(arriving: &[Flat], own: &[Flat], steering: Option<Mark>, lost: &mut Lost) -> Settled {
    let ports = Ports::of(arriving.iter().chain(own));
    let mut notes: Vec<_> = ports.note().into_iter().collect();
    let mut decide =
        |list: &[Flat]| -> Vec<Decided> { list.iter().flat_map(|flat| ports.decide(flat, lost)).collect() };
    let (mut arriving, mut own) = (decide(arriving), decide(own));
    let mark = steering.filter(|mark| mark.value != 0);
    let mut own_mark = own_mark(&own);
    if let Some(own_mark) = own_mark {
        // tproxy lets its own packets pass by itself, whatever mark they have.
        let of_proxy = |rule: &Decided| {
            rule.action == Action::Pass && rule.conditions.mark.is_some_and(|mark| mark.matches(own_mark))
        };
        arriving.retain(|rule| !of_proxy(rule));
        own.retain(|rule| !of_proxy(rule));
    }
    if let Some(clashing) = own_mark.take_if(|own_mark| !tells_apart(*own_mark, mark)) {
        notes.push(format!(
            "own_mark is not {clashing:#x}, as it was: with this tproxy_mark the proxy's packets would look captured. If other rules know them by {clashing:#x}, choose both anew"
        ));
    }
    let (arriving, own) = (simplify(arriving), simplify(own));
    let takes = |rules: Vec<Decided>| if rules.iter().any(captures) { rules } else { Vec::new() };
    let (arriving, own) = (takes(arriving), takes(own));
    let not_passed = || arriving.iter().chain(&own).filter(|rule| rule.action != Action::Pass);
    let protocols = not_passed().filter_map(|rule| rule.conditions.get(Dimension::Protocol).cloned());
    let mut settled = Settled {
        interfaces: interfaces(&arriving),
        families: [false, true].map(|v6| not_passed().any(|rule| rule.conditions.has_family(v6))),
        protocols: protocols.fold(Ranges::default(), Ranges::union),
        own_traffic: !own.is_empty(),
        mark,
        own_mark: own_mark.or_else(|| another_mark(mark)),
        on_port: ports.proxy(),
        rules: Vec::new(),
        notes,
    };
    settled.rules = settled.one_list(arriving, own);
    settled.add_notes();
    settled
}

fn captures(rule: &Decided) -> bool {
    matches!(rule.action, Action::Proxy(_) | Action::Divert(_))
}

impl Settled {
    fn add_notes(&mut self) {
        if self.rules.iter().any(|rule| matches!(rule.action, Action::Divert(_))) {
            self.notes.push(
                "a divert is never of what goes to this host itself: keep the DNAT and REDIRECT rules of its own addresses"
                    .to_owned(),
            );
        }
        if self.mark.is_some() {
            self.notes.push(
                "tproxy makes routing rules of its own: remove those of the old proxy (ip rule, ip route)"
                    .to_owned(),
            );
        }
    }

    /// Rules for what arrives, then rules for the host's own traffic, which arrives on no interface.
    fn one_list(&self, arriving: Vec<Decided>, own: Vec<Decided>) -> Vec<Decided> {
        let (arriving, own) = (self.within_capture(arriving), self.within_capture(own));
        // A rule over users or groups is for the host's own traffic anyhow.
        let is_own = |rule: &Decided| rule.conditions.ask_who_sends();
        let same = |(this, that): (&Decided, &Decided)| {
            this.conditions == that.conditions && this.action == that.action
        };
        let for_both = || own.iter().filter(|rule| !is_own(rule));
        if arriving.is_empty()
            || (for_both().count() == arriving.len() && for_both().zip(&arriving).all(same))
        {
            return own;
        }
        if own.is_empty() {
            return arriving;
        }
        let of_arrivals = |mut rule: Decided| {
            rule.conditions.interfaces.get_or_insert_with(|| self.interfaces.clone());
            rule
        };
        simplify(arriving.into_iter().map(of_arrivals).chain(own).collect())
    }

    /// Without what the keys of `[capture]` say for all rules.
    fn within_capture(&self, rules: Vec<Decided>) -> Vec<Decided> {
        let narrow = |mut rule: Decided| {
            let mut conditions =
                rule.conditions.and(&Conditions::of(Dimension::Protocol, self.protocols.clone()))?;
            if conditions.get(Dimension::Protocol) == Some(&self.protocols) {
                conditions.lift(Dimension::Protocol);
            }
            for (v6, dimensions) in [false, true].into_iter().zip(FAMILIES) {
                if !self.families[usize::from(v6)] {
                    conditions = conditions.and(&Conditions::family(!v6))?;
                    for dimension in dimensions {
                        conditions.lift(dimension);
                    }
                }
            }
            if conditions.interfaces.is_some() {
                conditions = conditions.and(&Conditions::on(self.interfaces.clone()))?;
                conditions.interfaces.take_if(|interfaces| *interfaces == self.interfaces);
            }
            rule.conditions = conditions;
            Some(rule)
        };
        simplify(rules.into_iter().filter_map(narrow).collect())
    }
}

/// What is captured on: all interfaces where a rule that captures names none.
fn interfaces(rules: &[Decided]) -> Vec<String> {
    let captured = rules.iter().filter(|rule| rule.action != Action::Pass);
    let lists: Option<Vec<_>> = captured.map(|rule| rule.conditions.interfaces.clone()).collect();
    let names: BTreeSet<_> =
        lists.map_or_else(|| ["*".to_owned()].into(), |lists| lists.into_iter().flatten().collect());
    names.into_iter().collect()
}

/// Whether a mark can tell the proxy's own packets from those that it captures, and from the
/// host's own that it captures, which have both marks.
fn tells_apart(own: u32, mark: Option<Mark>) -> bool {
    let mark = mark.unwrap_or(Mark { value: 1, mask: 1 });
    let (has_own, is_had) = (mark.value & own == own, mark.value & !own == 0);
    own != 0 && !mark.matches(own) && !has_own && !is_had
}

/// The mark by which rules let the proxy's own packets pass.
fn own_mark(own: &[Decided]) -> Option<u32> {
    let passes = own.iter().filter(|rule| rule.action == Action::Pass);
    passes.filter_map(|rule| rule.conditions.mark).map(|mark| mark.value).find(|value| *value != 0)
}

/// Another than the default, where that will not do.
fn another_mark(mark: Option<Mark>) -> Option<u32> {
    const DEFAULT: u32 = 2;
    let bits = (1..u32::BITS).map(|bit| 1 << bit);
    bits.into_iter().find(|own| tells_apart(*own, mark)).filter(|own| *own != DEFAULT)
}

//! Rules as both tools have them: chains of rules, jumps, and what is done to packets.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::config::Mark;
use crate::nft::Chain;
use crate::policy::ranges::Ranges;

use super::condition::{Conditions, Dimension};

/// All rules of an input.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ruleset {
    /// Base chains, in the order of their priority.
    pub(crate) bases: Vec<Base>,
    /// Rules of each chain.
    pub(crate) chains: HashMap<Chain, Vec<Rule>>,
    /// What [`Rule::source`] counts.
    pub(crate) sources: Vec<Source>,
}

/// What a rule was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Where it is, such as `line 7`.
    pub(crate) place: String,
    /// What is written there.
    pub(crate) text: String,
    /// The table that it is in.
    pub(crate) table: String,
}

/// When packets come to a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// As they arrive, before they are routed.
    Prerouting,
    /// As this host sends them.
    Output,
}

/// A chain that packets come to by themselves.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    /// Which.
    pub(crate) chain: Chain,
    /// When.
    pub(crate) hook: Hook,
    /// Of chains at one hook the lower comes first.
    pub(crate) priority: i64,
    /// What no rule decides is dropped.
    pub(crate) drops: bool,
    /// The only family of which it sees packets, where there is one.
    pub(crate) v6: Option<bool>,
}

/// One rule.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// Where it is from, in [`Ruleset::sources`].
    pub(crate) source: usize,
    /// When it applies.
    pub(crate) matches: Matches,
    /// How it changes the mark.
    pub(crate) mark: Option<SetMark>,
    /// What it does then.
    pub(crate) verdict: Verdict,
}

/// When a rule applies: one of `any` holds and none of `unless`.
#[derive(Clone, Debug)]
pub(crate) struct Matches {
    /// Alternatives; without one it never applies.
    pub(crate) any: Vec<Conditions>,
    /// Exceptions.
    pub(crate) unless: Vec<Conditions>,
    /// Why it cannot be told when it applies.
    pub(crate) obstacle: Option<String>,
}

/// A change of a mark: the bits of `keep` stay, then those of `flip` are flipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SetMark {
    /// Bits that stay.
    pub(crate) keep: u32,
    /// Bits that are flipped then.
    pub(crate) flip: u32,
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The next rule is asked.
    Continue,
    /// The base chain is left; others of its hook follow.
    Accept,
    /// The packet is thrown away.
    Drop,
    /// The sender is told, too.
    Reject,
    /// The chain that jumped here goes on.
    Return,
    /// Another chain is asked, then the next rule.
    Jump(Chain),
    /// Another chain is asked instead of the rest of this.
    Goto(Chain),
    /// TPROXY, to a port.
    Proxy(Option<u16>),
    /// REDIRECT to a port of this host; `None`: the one that the packet has.
    Redirect(Option<u16>),
    /// DNAT; `None`: the port that the packet has.
    Dnat(IpAddr, Option<u16>),
    /// Something that has no like here: why.
    Other {
        /// Why.
        why: String,
        /// It may be TPROXY, REDIRECT or DNAT.
        captures: bool,
    },
}

impl Ruleset {
    /// The rules of a chain, in their order.
    #[must_use]
    pub(crate) fn rules(&self, chain: &Chain) -> &[Rule] {
        self.chains.get(chain).map_or(&[], Vec::as_slice)
    }
}

impl Verdict {
    /// Whether packets get to a proxy or another target by it.
    #[must_use]
    pub(crate) const fn captures(&self) -> bool {
        matches!(
            self,
            Self::Proxy(_) | Self::Redirect(_) | Self::Dnat(..) | Self::Other { captures: true, .. }
        )
    }
}

impl SetMark {
    /// The bits that it sets and clears.
    #[must_use]
    pub(crate) const fn writes(self) -> Mark {
        let mask = !self.keep | self.flip;
        Mark { value: self.flip & mask, mask }
    }
}

impl Default for Matches {
    /// Always.
    fn default() -> Self {
        Self { any: vec![Conditions::default()], unless: Vec::new(), obstacle: None }
    }
}

impl Matches {
    /// Only where one of these holds, too.
    pub(crate) fn require(&mut self, alternatives: &[Conditions]) {
        self.any =
            self.any.iter().flat_map(|any| alternatives.iter().filter_map(|other| any.and(other))).collect();
    }

    /// A condition that may be negated.
    pub(crate) fn require_or_not(&mut self, conditions: Conditions, negated: bool) {
        if negated {
            self.unless.push(conditions);
        } else {
            self.require(&[conditions]);
        }
    }

    /// A number is in a set, or is not.
    pub(crate) fn number(&mut self, dimension: Dimension, numbers: Ranges, negated: bool) {
        // All but some link-layer addresses are too many to be listed; and of all but some groups
        // are the sockets of which tproxy knows none.
        if matches!(dimension, Dimension::Mac | Dimension::Gid) {
            return self.require_or_not(Conditions::of(dimension, numbers), negated);
        }
        let numbers = if negated { numbers.complement(dimension.most()) } else { numbers };
        self.require(&[Conditions::of(dimension, numbers)]);
    }

    /// Never, or always.
    pub(crate) fn constant(&mut self, holds: bool) {
        if !holds {
            self.any.clear();
        }
    }

    /// It cannot be told.
    pub(crate) fn cannot(&mut self, why: impl Into<String>) {
        self.obstacle.get_or_insert(why.into());
    }
}

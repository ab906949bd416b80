//! Chains with jumps → a list of rules of which the first that matches decides.
//!
//! A chain is read from its end: what is known there is what becomes of packets that no rule
//! takes, and each rule before it puts its own outcome, within its conditions, in front of that.
//! What a RETURN leads to is then as well known as what an ACCEPT does.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use tproxy_common::abi::{TCP, UDP};

use crate::config::Mark;
use crate::nft::Chain;
use crate::policy::ranges::Ranges;

use super::Error;
use super::condition::{Conditions, Dimension};
use super::model::{Base, Hook, Rule, Ruleset, SetMark, Verdict};

/// Steps that are made at most; each is a rule that is read, or one that is written.
const STEPS: usize = 500_000;

/// Jumps and marks within each other; the kernel allows 16 jumps.
const DEPTH: usize = 64;

/// A rule of the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Flat {
    /// Which flows.
    pub(crate) conditions: Conditions,
    /// What becomes of them.
    pub(crate) outcome: Outcome,
    /// What it was made of, in [`Ruleset::sources`].
    pub(crate) sources: Vec<usize>,
}

/// Where a flow ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// It goes on as if there were no rules.
    Pass,
    /// It is thrown away.
    Drop,
    /// Its sender is told, too.
    Reject,
    /// It is proxied, by TPROXY to a port.
    Proxy(Option<u16>),
    /// It gets to a port of this host.
    Redirect(Option<u16>),
    /// It gets to another host.
    Dnat(IpAddr, Option<u16>),
}

/// Whose packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// They arrive on an interface.
    Arriving,
    /// This host's own, which come in at `lo` where their mark says so.
    Own,
}

/// Rules that could not be carried over: why.
pub(crate) type Lost = BTreeMap<usize, String>;

/// The rules for packets of one way. Any packet meets one of them.
///
/// # Errors
/// [`Error::TooComplex`].
pub(crate) fn flatten(
    ruleset: &Ruleset,
    bases: &[&Base],
    way: Way,
    steering: Option<Mark>,
    lost: &mut Lost,
) -> Result<Vec<Flat>, Error> {
    let of = |hook: Hook| bases.iter().copied().filter(move |base| base.hook == hook);
    let (bases, output) = match way {
        Way::Arriving => (of(Hook::Prerouting).collect(), 0),
        Way::Own => (of(Hook::Output).chain(of(Hook::Prerouting)).collect(), of(Hook::Output).count()),
    };
    let (known, lists) = (HashMap::new(), Lists::default());
    let mut walk = Walk { ruleset, bases, output, way, steering, known, lists, left: STEPS, depth: 0, lost };
    let first = walk.base(0, State::default())?;
    // tproxy captures nothing else.
    let captured = Ranges::new(vec![(TCP.into(), TCP.into()), (UDP.into(), UDP.into())]);
    let captured = Conditions::of(Dimension::Protocol, captured);
    let of_captured =
        |flat: &Flat| Some(Flat { conditions: flat.conditions.and(&captured)?, ..flat.clone() });
    Ok(walk.lists.iter(first, END).filter_map(of_captured).collect())
}

/// What rules before have written to the mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    written: u32,
    value: u32,
}

impl State {
    fn after(self, set: Option<SetMark>) -> Self {
        let Some(SetMark { keep, flip }) = set else { return self };
        // A bit that was not written and is flipped is as unknown as before.
        let written = self.written | !keep;
        Self { written, value: (self.value & keep ^ flip) & written }
    }

    /// What a condition over the mark says of the one that a packet came with.
    fn arrival(self, wanted: Mark) -> Option<Mark> {
        if (self.value ^ wanted.value) & wanted.mask & self.written != 0 {
            return None;
        }
        let mask = wanted.mask & !self.written;
        Some(Mark { value: wanted.value & mask, mask })
    }
}

/// The rules from one on to where the chain, and what comes after it, ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Position<'a> {
    base: usize,
    chain: &'a Chain,
    rule: usize,
    back: Option<Rc<Position<'a>>>,
}

struct Walk<'a, 'b> {
    ruleset: &'a Ruleset,
    bases: Vec<&'a Base>,
    /// How many of them see the host's own packets as they are sent.
    output: usize,
    way: Way,
    steering: Option<Mark>,
    known: HashMap<(Position<'a>, State), List>,
    lists: Lists,
    left: usize,
    depth: usize,
    lost: &'b mut Lost,
}

impl<'a> Walk<'a, '_> {
    fn step(&mut self, count: usize) -> Result<(), Error> {
        self.left = self.left.checked_sub(count).ok_or(Error::TooComplex)?;
        Ok(())
    }

    /// From a base chain on.
    fn base(&mut self, index: usize, state: State) -> Result<List, Error> {
        let steered =
            || self.steering.is_some_and(|mark| mark.mask & !state.written == 0 && mark.matches(state.value));
        if index == self.bases.len() || (index == self.output && self.way == Way::Own && !steered()) {
            return Ok(self.lists.always(Outcome::Pass));
        }
        let base = self.bases[index];
        let list = self.from(&Position { base: index, chain: &base.chain, rule: 0, back: None }, state)?;
        let Some(v6) = base.v6 else { return Ok(list) };
        let others = self.base(index + 1, state)?;
        self.before(others, &[Conditions::family(v6)], &[], list, None)
    }

    /// What comes after the end of a chain.
    fn after(&mut self, at: &Position<'a>, state: State) -> Result<List, Error> {
        match &at.back {
            Some(back) => self.from(back, state),
            None if self.bases[at.base].drops => Ok(self.lists.always(Outcome::Drop)),
            None => self.base(at.base + 1, state),
        }
    }

    fn from(&mut self, at: &Position<'a>, state: State) -> Result<List, Error> {
        if let Some(list) = self.known.get(&(at.clone(), state)) {
            return Ok(*list);
        }
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(Error::TooComplex);
        }
        let rules = self.ruleset.rules(at.chain);
        let mut list = self.after(at, state)?;
        for index in (at.rule..rules.len()).rev() {
            self.step(1)?;
            let next = Position { rule: index + 1, ..at.clone() };
            list = self.rule(&rules[index], next, state, list)?;
        }
        self.depth -= 1;
        self.known.insert((at.clone(), state), list);
        Ok(list)
    }

    /// Puts a rule before the list of what comes after it.
    fn rule(&mut self, rule: &'a Rule, next: Position<'a>, state: State, rest: List) -> Result<List, Error> {
        let matches = &rule.matches;
        let to_this_host = matches.any.iter().any(|any| any.to_this_host);
        if to_this_host && matches!(rule.verdict, Verdict::Proxy(_) | Verdict::Redirect(_)) {
            self.lost
                .entry(rule.source)
                .or_insert_with(|| "what goes to this host itself is never captured".to_owned());
        }
        let any: Vec<_> = matches.any.iter().filter_map(|any| self.resolve(any, state)).collect();
        let idle = rule.verdict == Verdict::Continue && rule.mark.is_none();
        if any.is_empty() || idle {
            return Ok(rest);
        }
        if let Some(why) = &matches.obstacle {
            self.lost.entry(rule.source).or_insert_with(|| why.clone());
            return Ok(rest);
        }
        let unless: Vec<_> = matches.unless.iter().filter_map(|unless| self.resolve(unless, state)).collect();
        let then = state.after(rule.mark);
        let taken = match &rule.verdict {
            Verdict::Continue => self.from(&next, then)?,
            Verdict::Accept => self.base(next.base + 1, then)?,
            Verdict::Return => {
                let end = Position { rule: usize::MAX, ..next };
                self.after(&end, then)?
            }
            Verdict::Jump(chain) => {
                self.known.insert((next.clone(), state), rest);
                let (base, back) = (next.base, Some(Rc::new(next)));
                self.from(&Position { base, chain, rule: 0, back }, then)?
            }
            Verdict::Goto(chain) => self.from(&Position { chain, rule: 0, ..next }, then)?,
            Verdict::Drop => self.lists.always(Outcome::Drop),
            Verdict::Reject => self.lists.always(Outcome::Reject),
            Verdict::Proxy(port) => self.lists.always(Outcome::Proxy(*port)),
            Verdict::Redirect(port) => self.lists.always(Outcome::Redirect(*port)),
            Verdict::Dnat(address, port) => self.lists.always(Outcome::Dnat(*address, *port)),
            Verdict::Other { why, .. } => {
                self.lost.entry(rule.source).or_insert_with(|| why.clone());
                return Ok(rest);
            }
        };
        // A jump without conditions says nothing.
        let plain =
            matches!(rule.verdict, Verdict::Jump(_) | Verdict::Goto(_)) && any == [Conditions::default()];
        let source = (!plain).then_some(rule.source);
        self.before(rest, &any, &unless, taken, source)
    }

    /// `taken` where one of `any` holds and none of `unless`, else `rest`.
    fn before(
        &mut self,
        rest: List,
        any: &[Conditions],
        unless: &[Conditions],
        taken: List,
        source: Option<usize>,
    ) -> Result<List, Error> {
        // Where what is taken ends with the rest, that need not be said twice.
        let own: Vec<_> = self.lists.iter(taken, rest).cloned().collect();
        let others: Vec<_> = if own.is_empty() || unless.is_empty() {
            Vec::new()
        } else {
            self.lists.iter(rest, END).cloned().collect()
        };
        self.step(1 + any.len() * (own.len() + others.len() * unless.len()))?;
        let mut list = rest;
        let unless: Vec<_> =
            any.iter().flat_map(|any| unless.iter().filter_map(|unless| unless.and(any))).collect();
        for (flats, within) in [(&own, any), (&others, &*unless)] {
            for (flat, within) in
                within.iter().flat_map(|within| flats.iter().rev().map(move |flat| (flat, within)))
            {
                let Some(conditions) = flat.conditions.and(within) else { continue };
                let mut sources = flat.sources.clone();
                sources.extend(source.filter(|source| !sources.contains(source)));
                list = self.lists.push(Flat { conditions, sources, ..*flat }, list);
            }
        }
        Ok(list)
    }

    /// What conditions say of a packet of this way when it came; `None` where they never hold.
    fn resolve(&self, conditions: &Conditions, state: State) -> Option<Conditions> {
        let own = self.way == Way::Own;
        let mut conditions = conditions.clone();
        if conditions.to_this_host || conditions.own.take().is_some_and(|wanted| wanted != own) {
            return None;
        }
        if let Some(mark) = conditions.mark {
            let mark = state.arrival(mark)?;
            let steering = self.steering.unwrap_or(Mark { value: 0, mask: 0 });
            // Who comes with the mark of what is steered has been steered; nobody else has its bits.
            if mark.value != 0 && mark.matches(steering.value) {
                return None;
            }
            let known = mark.value == 0 && mark.mask & !steering.mask == 0;
            conditions.mark = (!known).then_some(mark);
        }
        let interfaces = conditions.interfaces.take();
        if own {
            let at_lo = |pattern: &String| {
                pattern == "lo"
                    || pattern.strip_suffix('*').is_some_and(|beginning| "lo".starts_with(beginning))
            };
            let of_arrivals = conditions.get(Dimension::Mac).is_some();
            return (!of_arrivals && interfaces.is_none_or(|patterns| patterns.iter().any(at_lo)))
                .then_some(conditions);
        }
        if let Some(mut patterns) = interfaces {
            patterns.retain(|pattern| pattern != "lo");
            conditions.interfaces = Some(patterns).filter(|patterns| !patterns.is_empty());
            conditions.interfaces.as_ref()?;
        }
        (!conditions.ask_who_sends()).then_some(conditions)
    }
}

/// A list in [`Lists`]; two that are equal are the same.
type List = usize;

/// The empty list.
const END: List = usize::MAX;

/// Lists that share what they end with.
#[derive(Debug, Default)]
struct Lists {
    nodes: Vec<Rc<(Flat, List)>>,
    numbers: HashMap<Rc<(Flat, List)>, List>,
}

impl Lists {
    /// A list with one rule more at its beginning.
    fn push(&mut self, flat: Flat, list: List) -> List {
        let node = Rc::new((flat, list));
        let next = self.nodes.len();
        let number = *self.numbers.entry(Rc::clone(&node)).or_insert(next);
        if number == next {
            self.nodes.push(node);
        }
        number
    }

    /// One rule for all.
    fn always(&mut self, outcome: Outcome) -> List {
        self.push(Flat { conditions: Conditions::default(), outcome, sources: Vec::new() }, END)
    }

    /// The rules of a list, up to where it is another.
    fn iter(&self, mut list: List, end: List) -> impl Iterator<Item = &Flat> {
        std::iter::from_fn(move || {
            let node = self.nodes.get(list).filter(|_| list != end)?;
            list = node.1;
            Some(&node.0)
        })
    }
}

//! The way of one packet through the rules of a base chain.

use serde_json::Value;

use super::matching::Truth;
use super::{Certainty, Chain, Effect, Found, Packet, Ruleset};

/// Jumps within jumps that are followed; nft allows 16.
const DEPTH: u32 = 16;

/// Rules and elements of verdict maps that are followed for one packet and one
/// base chain. A rule that is jumped to counts each time.
pub const RULES: u32 = 50_000;

/// How a walk through a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// Left by `return` or at its end.
    Left,
}

/// A packet on its way.
pub(super) struct Walk<'a> {
    rules: &'a Ruleset,
    packet: &'a Packet<'a>,
    base: &'a Chain,
    found: Vec<Found>,
    /// Something that cannot be read may have let the packet pass.
    opaque: bool,
    /// How much of [`RULES`] is left.
    left: u32,
}

impl<'a> Walk<'a> {
    /// At the beginning of a base chain, which may be `opaque` itself.
    pub(super) fn new(rules: &'a Ruleset, packet: &'a Packet<'a>, base: &'a Chain, opaque: bool) -> Self {
        Self { rules, packet, base, found: Vec::new(), opaque, left: RULES }
    }

    /// Goes all the way; `drops` is the policy.
    pub(super) fn through(mut self, drops: bool) -> Vec<Found> {
        let end = self.chain(self.base, true, 0);
        if self.left == 0 {
            self.note(Effect::Unfinished, Certainty::Possible);
        } else if end == End::Drop || (end == End::Left && drops) {
            self.note(Effect::Drop, Certainty::Certain);
        }
        self.found
    }

    fn note(&mut self, effect: Effect, certainty: Certainty) {
        let certainty = match certainty {
            Certainty::Certain if self.opaque => Certainty::Opaque,
            certainty => certainty,
        };
        let found = Found { effect, certainty, chain: self.base.clone() };
        if !self.found.contains(&found) {
            self.found.push(found);
        }
    }

    /// Whether there may be one step more.
    fn step(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }

    fn chain(&mut self, chain: &Chain, sure: bool, depth: u32) -> End {
        if depth > DEPTH {
            return End::Left;
        }
        let ruleset = self.rules;
        for rule in ruleset.rules.get(chain).into_iter().flatten() {
            if !self.step() {
                break;
            }
            if let Some(end) = self.rule(&rule.expressions, chain, sure, depth) {
                return end;
            }
        }
        End::Left
    }

    /// Goes through one rule; `None`: the next one is asked.
    fn rule(&mut self, expressions: &[Value], chain: &Chain, sure: bool, depth: u32) -> Option<End> {
        let mut holds = if sure { Truth::Yes } else { Truth::Maybe };
        // A match that cannot be read at all, as of iptables-nft's extensions.
        let mut opaque = false;
        for (index, expression) in expressions.iter().enumerate() {
            let Some((kind, content)) = expression.as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            match &**kind {
                "match" => match self.packet.matches(content) {
                    Truth::No => return None,
                    Truth::Maybe => holds = Truth::Maybe,
                    Truth::Yes => {}
                },
                "limit" | "quota" => holds = Truth::Maybe,
                "accept" => return self.end(End::Accept, holds, opaque),
                "drop" | "reject" => return self.end(End::Drop, holds, opaque),
                "return" => return (holds == Truth::Yes).then_some(End::Left),
                "jump" | "goto" => {
                    let target = content["target"].as_str().unwrap_or_default();
                    return self.jump(target, kind == "goto", chain, holds, depth);
                }
                "vmap" => return self.verdict_map(content, chain, holds, depth),
                "mangle"
                    if content["key"]["meta"]["key"] == "mark"
                        && !self.packet.keeps_mark(&content["value"]) =>
                {
                    self.note(Effect::MarkLost, certainty(holds));
                }
                "masquerade" | "snat" => return self.nat(Effect::SourceNat, holds),
                "dnat" | "redirect" | "tproxy" | "fwd" => return self.nat(Effect::Rewrite, holds),
                "xt" if is_target(content, index + 1 == expressions.len()) => {
                    return self.target(content["name"].as_str(), holds, opaque);
                }
                "xt" => (holds, opaque) = (Truth::Maybe, true),
                _ => {}
            }
        }
        None
    }

    /// A target of iptables-nft; nft tells its name at most.
    fn target(&mut self, name: Option<&str>, holds: Truth, opaque: bool) -> Option<End> {
        match name {
            Some("ACCEPT") => self.end(End::Accept, holds, opaque),
            Some("DROP" | "REJECT") => self.end(End::Drop, holds, opaque),
            Some("RETURN") => (holds == Truth::Yes).then_some(End::Left),
            Some("MASQUERADE" | "SNAT") => self.nat(Effect::SourceNat, holds),
            Some("DNAT" | "REDIRECT" | "TPROXY") => self.nat(Effect::Rewrite, holds),
            // Which bits it writes is not told.
            Some("MARK" | "CONNMARK") => {
                self.note(Effect::MarkLost, Certainty::Possible);
                None
            }
            Some(_) => None,
            None => {
                self.note(Effect::Untold, certainty(holds));
                None
            }
        }
    }

    fn nat(&mut self, effect: Effect, holds: Truth) -> Option<End> {
        self.note(effect, certainty(holds));
        (holds == Truth::Yes).then_some(End::Accept)
    }

    fn end(&mut self, end: End, holds: Truth, opaque: bool) -> Option<End> {
        if holds == Truth::Yes {
            return Some(end);
        }
        match end {
            End::Drop => self.note(Effect::Drop, Certainty::Possible),
            _ => self.opaque |= opaque,
        }
        None
    }

    fn jump(&mut self, target: &str, goto: bool, from: &Chain, holds: Truth, depth: u32) -> Option<End> {
        let target = Chain { name: target.to_owned(), ..from.clone() };
        let end = self.chain(&target, holds == Truth::Yes, depth + 1);
        match end {
            End::Left if goto && holds == Truth::Yes => Some(End::Left),
            End::Left => None,
            end if holds == Truth::Yes => Some(end),
            _ => None,
        }
    }

    /// `ct state vmap { established : accept, … }`, or `vmap @name`.
    fn verdict_map(&mut self, map: &Value, chain: &Chain, mut holds: Truth, depth: u32) -> Option<End> {
        let ruleset = self.rules;
        let name = map["data"].as_str().map(|name| name.trim_start_matches('@'));
        let elements = match name {
            // Its elements come and go.
            Some(name) => {
                self.opaque = true;
                ruleset.sets.get(&Chain { name: name.to_owned(), ..chain.clone() })
            }
            None => map["data"]["set"].as_array(),
        };
        for entry in elements.into_iter().flatten() {
            if !self.step() {
                return None;
            }
            let (element, verdict) = (&entry[0], &entry[1]);
            let matched =
                self.packet.matches(&serde_json::json!({"op": "==", "left": map["key"], "right": element}));
            if matched == Truth::No {
                continue;
            }
            if matched == Truth::Maybe {
                holds = Truth::Maybe;
            }
            let then = self.rule(std::slice::from_ref(verdict), chain, holds == Truth::Yes, depth);
            if then.is_some() || matched == Truth::Yes {
                return then;
            }
        }
        None
    }
}

/// Whether this is a target, not a match. Where nft (before 1.0.6) tells neither
/// kind nor name it is one at the end of a rule: iptables-nft writes it there.
fn is_target(xt: &Value, last: bool) -> bool {
    match xt["type"].as_str() {
        Some(kind) => kind == "target",
        None => last,
    }
}

fn certainty(holds: Truth) -> Certainty {
    if holds == Truth::Yes { Certainty::Certain } else { Certainty::Possible }
}

//! What the rules of `nft -j list ruleset` do to a packet, as far as that can be
//! told beforehand: a match that depends on more than is known of the packet may
//! hold or not.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::config::Mark;

/// A packet, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<'a> {
    /// IPv6 (else IPv4).
    pub v6: bool,
    /// `tcp` or `udp`.
    pub protocol: &'a str,
    /// Interface it comes in on; empty: it is this host's.
    pub iif: &'a str,
    /// Interface it leaves by; empty: it is delivered here.
    pub oif: &'a str,
    /// Its mark.
    pub mark: u32,
    /// What connection tracking calls it, such as `new`.
    pub state: &'a str,
    /// Networks that its source address may be in; empty: not known.
    pub sources: &'a [IpNet],
}

/// What a rule does to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Drops or rejects it.
    Drop,
    /// Changes its mark so that it is no longer the same in the bits that count.
    MarkLost,
    /// Changes where it goes (`dnat`, `redirect`, `tproxy`).
    Rewrite,
    /// Changes its source (`masquerade`, `snat`).
    SourceNat,
}

/// How sure that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// Every such packet.
    Certain,
    /// All but those that a rule which cannot be read may accept before.
    Opaque,
    /// Some.
    Possible,
}

/// A base chain that does something to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What.
    pub effect: Effect,
    /// How sure.
    pub certainty: Certainty,
    /// The base chain in which that is.
    pub chain: Chain,
}

/// A chain, by the words that nft wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    family: String,
    table: String,
    name: String,
}

impl Chain {
    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("chain {} of table {} {}", self.name, self.family, self.table)
    }

    /// The command that accepts what has a mark, before all other rules, in the
    /// words of the tool that made the chain.
    #[must_use]
    pub fn accept(&self, mark: Mark) -> String {
        let Self { family, table, name } = self;
        let built_in = ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"].contains(&&**name);
        match &**family {
            "ip" | "ip6" if built_in => {
                let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
                format!("{tool} -t {table} -I {name} -m mark --mark {mark} -j ACCEPT")
            }
            _ => {
                let Mark { value, mask } = mark;
                format!(
                    "nft insert rule {family} {table} {name} meta mark and {mask:#x} == {value:#x} accept"
                )
            }
        }
    }

    fn of(value: &Value, name: &str) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Self { family: text("family"), table: text("table"), name: text(name) }
    }
}

#[derive(Clone, Debug)]
struct Base {
    chain: Chain,
    hook: String,
    drops: bool,
}

/// All rules of a network namespace.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    bases: Vec<Base>,
    rules: Vec<(Chain, Vec<Value>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    Yes,
    Maybe,
    No,
}

/// How a walk through a chain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Accept,
    Drop,
    /// Left by `return` or at its end.
    Left,
}

/// Jumps within jumps that are followed; nft allows 16.
const DEPTH: u32 = 16;

impl Ruleset {
    /// Reads what `nft -j list ruleset` printed.
    #[must_use]
    pub fn parse(json: &Value) -> Self {
        let mut ruleset = Self::default();
        for item in json["nftables"].as_array().into_iter().flatten() {
            let (chain, rule) = (&item["chain"], &item["rule"]);
            if let Some(hook) = chain["hook"].as_str() {
                let drops = chain["policy"] == "drop";
                ruleset.bases.push(Base { chain: Chain::of(chain, "name"), hook: hook.to_owned(), drops });
            }
            if let Some(expressions) = rule["expr"].as_array() {
                ruleset.rules.push((Chain::of(rule, "chain"), expressions.clone()));
            }
        }
        ruleset
    }

    /// What the chains of a hook do to a packet.
    #[must_use]
    pub fn follow(&self, hook: &str, packet: &Packet<'_>) -> Vec<Found> {
        let mut found = Vec::new();
        for base in
            self.bases.iter().filter(|base| base.hook == hook && applies(&base.chain.family, packet.v6))
        {
            let mut walk = Walk { rules: self, packet, base: &base.chain, found: &mut found, opaque: false };
            let end = walk.chain(&base.chain, true, 0);
            if end == End::Drop || (end == End::Left && base.drops) {
                let certainty = if walk.opaque { Certainty::Opaque } else { Certainty::Certain };
                walk.note(Effect::Drop, certainty);
            }
        }
        found
    }
}

fn applies(family: &str, v6: bool) -> bool {
    matches!((family, v6), ("inet", _) | ("ip", false) | ("ip6", true))
}

struct Walk<'a, 'b> {
    rules: &'a Ruleset,
    packet: &'a Packet<'a>,
    base: &'a Chain,
    found: &'b mut Vec<Found>,
    /// A rule that cannot be read may have accepted the packet.
    opaque: bool,
}

impl Walk<'_, '_> {
    fn note(&mut self, effect: Effect, certainty: Certainty) {
        self.found.push(Found { effect, certainty, chain: self.base.clone() });
    }

    fn chain(&mut self, chain: &Chain, sure: bool, depth: u32) -> End {
        if depth > DEPTH {
            return End::Left;
        }
        for (_, expressions) in self.rules.rules.iter().filter(|(of, _)| of == chain) {
            if let Some(end) = self.rule(expressions, chain, sure, depth) {
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
        for expression in expressions {
            let Some((kind, content)) = expression.as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            match &**kind {
                "match" => match self.matches(content) {
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
                    if content["key"]["meta"]["key"] == "mark" && !self.keeps_mark(&content["value"]) =>
                {
                    self.note(Effect::MarkLost, certainty(holds));
                }
                "masquerade" | "snat" => return self.nat(Effect::SourceNat, holds),
                "dnat" | "redirect" | "tproxy" => return self.nat(Effect::Rewrite, holds),
                "xt" => match content["name"].as_str() {
                    Some("MASQUERADE" | "SNAT") => return self.nat(Effect::SourceNat, holds),
                    Some("DNAT" | "REDIRECT" | "TPROXY") => return self.nat(Effect::Rewrite, holds),
                    _ => (holds, opaque) = (Truth::Maybe, true),
                },
                _ => {}
            }
        }
        None
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

    /// `ct state vmap { established : accept, … }`.
    fn verdict_map(&mut self, map: &Value, chain: &Chain, mut holds: Truth, depth: u32) -> Option<End> {
        for entry in map["data"]["set"].as_array().into_iter().flatten() {
            let (element, verdict) = (&entry[0], &entry[1]);
            let matched =
                self.matches(&serde_json::json!({"op": "==", "left": map["key"], "right": element}));
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

    fn matches(&self, content: &Value) -> Truth {
        let (left, right) = (&content["left"], &content["right"]);
        let equal = self.equal(left, right);
        match (content["op"].as_str(), equal) {
            (Some("==" | "in"), equal) => equal,
            (Some("!="), Truth::Yes) => Truth::No,
            (Some("!="), Truth::No) => Truth::Yes,
            _ => Truth::Maybe,
        }
    }

    fn equal(&self, left: &Value, right: &Value) -> Truth {
        let packet = self.packet;
        if let Some(mark) = self.mark_of(left) {
            return number(right).map_or(Truth::Maybe, |wanted| truth(mark == wanted));
        }
        let payload = &left["payload"];
        let transport = payload["protocol"].as_str();
        if let Some("tcp" | "udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite") = transport
            && transport != Some(packet.protocol)
        {
            return Truth::No;
        }
        if let Some(version @ ("ip" | "ip6")) = transport
            && (version == "ip6") != packet.v6
        {
            return Truth::No;
        }
        let known =
            match (left["meta"]["key"].as_str(), left["ct"]["key"].as_str(), payload["field"].as_str()) {
                (Some("iifname" | "iif"), ..) => packet.iif,
                (Some("oifname" | "oif"), ..) => packet.oif,
                (Some("l4proto"), ..) | (_, _, Some("protocol" | "nexthdr")) => packet.protocol,
                (Some("nfproto"), ..) => {
                    if packet.v6 {
                        "ipv6"
                    } else {
                        "ipv4"
                    }
                }
                (Some("protocol"), ..) => {
                    if packet.v6 {
                        "ip6"
                    } else {
                        "ip"
                    }
                }
                (_, Some("state"), _) => packet.state,
                (_, _, Some("saddr")) => return self.source(right),
                _ => return Truth::Maybe,
            };
        any(right, |element| match element.as_str() {
            // A set that has a name.
            Some(name) if name.starts_with('@') => Truth::Maybe,
            Some(pattern) => truth(match pattern.strip_suffix('*') {
                Some(prefix) => !known.is_empty() && known.starts_with(prefix),
                None => pattern == known,
            }),
            None => Truth::Maybe,
        })
    }

    /// The bits of the mark that an expression takes.
    fn mark_of(&self, left: &Value) -> Option<u32> {
        if left["meta"]["key"] == "mark" {
            return Some(self.packet.mark);
        }
        let and = left["&"].as_array()?;
        (and.first()?["meta"]["key"] == "mark")
            .then(|| number(and.get(1)?))
            .flatten()
            .map(|mask| self.packet.mark & mask)
    }

    fn source(&self, right: &Value) -> Truth {
        if self.packet.sources.is_empty() {
            return Truth::Maybe;
        }
        any(right, |element| {
            let Some(net) = network(element) else { return Truth::Maybe };
            let of_family = self.packet.sources.iter().filter(|own| own.addr().is_ipv6() == self.packet.v6);
            let inside = of_family.clone().all(|own| net.contains(own));
            let touched = of_family.clone().any(|own| net.contains(own) || own.contains(&net));
            match (of_family.count() > 0, inside, touched) {
                (true, true, _) => Truth::Yes,
                (true, _, false) => Truth::No,
                _ => Truth::Maybe,
            }
        })
    }

    /// Whether the bits of the mark stay when this is written to it.
    fn keeps_mark(&self, value: &Value) -> bool {
        let mark = self.packet.mark;
        if let Some(new) = number(value) {
            return new & mark == mark;
        }
        let of = |operation: &str| {
            let operands = value[operation].as_array()?;
            (operands.first()?["meta"]["key"] == "mark").then(|| number(operands.get(1)?)).flatten()
        };
        value["meta"]["key"] == "mark"
            || of("|").is_some()
            || of("&").is_some_and(|kept| kept & mark == mark)
            || of("^").is_some_and(|turned| turned & mark == 0)
    }
}

fn certainty(holds: Truth) -> Certainty {
    if holds == Truth::Yes { Certainty::Certain } else { Certainty::Possible }
}

fn truth(yes: bool) -> Truth {
    if yes { Truth::Yes } else { Truth::No }
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// The best of all elements of a set or list, or of a single value.
fn any(right: &Value, one: impl Fn(&Value) -> Truth) -> Truth {
    let elements = right["set"].as_array().or_else(|| right.as_array());
    let Some(elements) = elements else { return one(right) };
    let truths: Vec<_> = elements.iter().map(one).collect();
    [Truth::Yes, Truth::Maybe].into_iter().find(|truth| truths.contains(truth)).unwrap_or(Truth::No)
}

fn network(element: &Value) -> Option<IpNet> {
    let prefix = &element["prefix"];
    let length = prefix["len"].as_u64().and_then(|length| u8::try_from(length).ok());
    match (element.as_str(), prefix["addr"].as_str(), length) {
        (Some(address), ..) => address.parse::<IpAddr>().ok().map(IpNet::from),
        (_, Some(address), Some(length)) => IpNet::new(address.parse().ok()?, length).ok(),
        _ => None,
    }
}

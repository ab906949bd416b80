//! One rule of nft, statement by statement → [`Rule`].

use std::collections::HashMap;

use serde_json::Value;

use crate::nft::{self, Chain, number};

use super::super::condition::Conditions;
use super::super::model::{Matches, Rule, SetMark, Verdict};
use super::matching;

/// What statements of a rule are about, and where named sets are.
pub(super) struct Scope<'a> {
    pub(super) chain: &'a Chain,
    pub(super) sets: &'a HashMap<Chain, Vec<Value>>,
}

impl Scope<'_> {
    /// Elements of a set, of a list, or of a set that is named; of a single value, itself.
    pub(super) fn elements<'a>(&'a self, value: &'a Value) -> &'a [Value] {
        if let Some(name) = value.as_str().and_then(|text| text.strip_prefix('@')) {
            let set = Chain { name: name.to_owned(), ..self.chain.clone() };
            // An empty set is listed without elements.
            return self.sets.get(&set).map_or(&[], Vec::as_slice);
        }
        let listed = value["set"].as_array().or_else(|| value.as_array());
        listed.map_or(std::slice::from_ref(value), Vec::as_slice)
    }
}

/// Reads a rule: one, or one for each element of a verdict map.
pub(super) fn parse(
    rule: &nft::Rule,
    source: usize,
    chain: &Chain,
    sets: &HashMap<Chain, Vec<Value>>,
) -> Vec<Rule> {
    let scope = Scope { chain, sets };
    let mut read = Rule { source, matches: Matches::default(), mark: None, verdict: Verdict::Continue };
    for expression in &rule.expressions {
        let Some((kind, content)) = expression.as_object().and_then(|object| object.iter().next()) else {
            read.matches.cannot(format!("it is not known what {expression} means"));
            continue;
        };
        if kind == "vmap" {
            return verdict_map(&scope, &read, content);
        }
        statement(&scope, &mut read, kind, content);
    }
    vec![read]
}

fn statement(scope: &Scope<'_>, rule: &mut Rule, kind: &str, content: &Value) {
    match kind {
        "match" => matching::require(scope, &mut rule.matches, content),
        "mangle" => mangle(rule, content),
        // TPROXY is settled, the packet goes on to be accepted.
        "accept" if rule.verdict.captures() => {}
        "limit" | "quota" | "ct count" | "connlimit" | "osf" => {
            rule.matches.cannot(format!("no condition is like {kind}"));
        }
        "xt" => extension(rule, content),
        _ => {
            // As in `tproxy ip to 127.0.0.1`, of a table of both families.
            if let Some(family @ ("ip" | "ip6")) = content["family"].as_str() {
                rule.matches.require(&[Conditions::family(family == "ip6")]);
            }
            if let Some(verdict) = verdict(scope, kind, content) {
                rule.verdict = verdict;
            }
        }
    }
}

/// What decides; `None` for what does nothing to where a packet goes.
fn verdict(scope: &Scope<'_>, kind: &str, content: &Value) -> Option<Verdict> {
    let target =
        || Chain { name: content["target"].as_str().unwrap_or_default().to_owned(), ..scope.chain.clone() };
    let port = || number(&content["port"]).and_then(|port| u16::try_from(port).ok());
    let several = || Verdict::Other {
        why: format!("a divert has one target that does not depend on the packet ({content})"),
        captures: true,
    };
    Some(match kind {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "reject" => Verdict::Reject,
        "return" => Verdict::Return,
        "jump" => Verdict::Jump(target()),
        "goto" => Verdict::Goto(target()),
        "tproxy" => Verdict::Proxy(port()),
        "redirect" if content["port"].is_null() => Verdict::Redirect(None),
        "redirect" => port().map_or_else(several, |port| Verdict::Redirect(Some(port))),
        "dnat" => match content["addr"].as_str().and_then(|address| address.parse().ok()) {
            Some(address) if content["port"].is_null() => Verdict::Dnat(address, None),
            Some(address) => port().map_or_else(several, |port| Verdict::Dnat(address, Some(port))),
            None => several(),
        },
        "queue" | "fwd" | "synproxy" => {
            Verdict::Other { why: format!("nothing here is like {kind}"), captures: false }
        }
        _ => return None,
    })
}

/// Writes to the mark; other fields do nothing to where a packet goes.
fn mangle(rule: &mut Rule, content: &Value) {
    if content["key"]["meta"]["key"] != "mark" {
        return;
    }
    let value = &content["value"];
    let change = |operation: &str, change: &dyn Fn(u32) -> SetMark| {
        let [old, operand] = value[operation].as_array()?.as_slice() else { return None };
        let operand = number(operand)?;
        (old["meta"]["key"] == "mark").then(|| change(operand))
    };
    let set = number(value)
        .map(|value| SetMark { keep: 0, flip: value })
        .or_else(|| change("|", &|bits| SetMark { keep: !bits, flip: bits }))
        .or_else(|| change("&", &|bits| SetMark { keep: bits, flip: 0 }))
        .or_else(|| change("^", &|bits| SetMark { keep: u32::MAX, flip: bits }));
    // The mark of the connection is kept for its later packets, which go the way of the first anyhow.
    let of_connection = value.to_string().contains(r#"{"ct":{"key":"mark"}}"#);
    match set {
        Some(set) => rule.mark = Some(set),
        None if of_connection => {}
        None => rule.matches.cannot(format!("it cannot be told what mark it sets ({value})")),
    }
}

/// A match or target of iptables, of which nft tells the name at most.
fn extension(rule: &mut Rule, content: &Value) {
    let name = content["name"].as_str().unwrap_or("of iptables");
    if content["type"] == "match" {
        return rule
            .matches
            .cannot(format!("nft does not tell what match {name} says: import what iptables-save prints"));
    }
    rule.verdict = Verdict::Other {
        why: format!("nft does not tell what target {name} does: import what iptables-save prints"),
        captures: matches!(name, "TPROXY" | "REDIRECT" | "DNAT" | "of iptables"),
    };
}

/// `tcp dport vmap { 80 : accept, 81 : jump other }`: a rule for each element.
fn verdict_map(scope: &Scope<'_>, rule: &Rule, map: &Value) -> Vec<Rule> {
    let elements = scope.elements(&map["data"]);
    let of_element = |element: &Value| {
        let mut rule = rule.clone();
        let (key, then) = (&element[0], &element[1]);
        matching::equal(scope, &mut rule.matches, &map["key"], std::slice::from_ref(key), false);
        if let Some((kind, content)) = then.as_object().and_then(|object| object.iter().next()) {
            statement(scope, &mut rule, kind, content);
        }
        rule
    };
    elements.iter().map(of_element).collect()
}

//! Rules as `nft -j list ruleset` prints them.

use serde_json::{Value, json};

use super::{Level, chain, judged, matching, rule};

/// A rule of iptables-nft: matches, a counter, a target or verdict.
fn iptables(chain: &str, matches: &[Value], then: Value) -> Value {
    let counter = json!({"counter": {"packets": 0, "bytes": 0}});
    rule(chain, &json!([matches, &[counter, then]].concat()))
}

fn xt(kind: &str, name: &str) -> Value {
    json!({"xt": {"type": kind, "name": name}})
}

const WARN: [(Level, &str); 1] = [(Level::Warn, "packet-filter")];
const FAIL: [(Level, &str); 1] = [(Level::Fail, "packet-filter")];

fn input(rules: &[Value]) -> Vec<(Level, &'static str)> {
    judged("--iface lan", &[&[chain("input", "accept")], rules].concat())
}

#[test]
fn targets_of_iptables_are_verdicts() {
    let one = |matches: &[Value], target: &str| input(&[iptables("input", matches, xt("target", target))]);
    assert_eq!(one(&[], "REJECT"), FAIL);
    assert_eq!(one(&[], "DROP"), FAIL);
    assert_eq!(one(&[], "LOG"), []);
    // For some ports or states it is meant so.
    assert_eq!(one(&[xt("match", "conntrack")], "REJECT"), []);
    let rejects = iptables("input", &[], xt("target", "REJECT"));
    for passes in ["ACCEPT", "RETURN"] {
        let before = iptables("input", &[], xt("target", passes));
        assert_eq!(input(&[before, rejects.clone()]), [], "{passes}");
    }
    // As the default rules of Red Hat's iptables.
    let established = iptables("input", &[xt("match", "conntrack")], json!({"accept": null}));
    assert_eq!(input(&[established, rejects]), WARN);
}

#[test]
fn a_target_without_name_is_not_passed_over() {
    let untold = |hook: &str, matches: &[Value]| {
        judged("--iface lan", &[chain(hook, "accept"), iptables(hook, matches, json!({"xt": null}))])
    };
    assert_eq!(untold("input", &[]), WARN);
    assert_eq!(untold("prerouting", &[json!({"xt": null})]), WARN);
    assert_eq!(untold("input", &[json!({"xt": null})]), []);
    assert_eq!(untold("postrouting", &[]), [], "MASQUERADE does no harm by default");
}

#[test]
fn marks_that_iptables_sets_may_take_ours() {
    for target in ["MARK", "CONNMARK"] {
        for matches in [&[][..], &[xt("match", "set")]] {
            let set = iptables("prerouting", matches, xt("target", target));
            assert_eq!(judged("--iface lan", &[chain("prerouting", "accept"), set]), [(Level::Warn, "mark")]);
        }
        let mark = matching(&json!({"meta": {"key": "mark"}}), &json!(1));
        let spared = iptables("prerouting", &[mark], json!({"accept": null}));
        let set = iptables("prerouting", &[], xt("target", target));
        assert_eq!(judged("--iface lan", &[chain("prerouting", "accept"), spared, set]), []);
    }
}

#[test]
fn named_verdict_maps_are_never_certain() {
    let looks_up = |policy: &str, elements: Value| {
        let map = json!({"map": {"family": "inet", "table": "t", "name": "m", "type": "ifname",
            "map": "verdict", "elem": elements}});
        let vmap = json!([{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@m"}}]);
        judged("--iface lan", &[chain("input", policy), map, rule("input", &vmap)])
    };
    assert_eq!(looks_up("accept", json!([["lan", {"drop": null}]])), WARN);
    assert_eq!(looks_up("accept", json!([["eth7", {"drop": null}]])), []);
    assert_eq!(
        looks_up(
            "drop",
            json!([["lan", {"accept": null}], ["wan", {"accept": null}], ["lan.7", {"accept": null}]])
        ),
        []
    );
    assert_eq!(looks_up("drop", json!([["lan2", {"accept": null}]])), WARN);
}

#[test]
fn chains_of_devices_see_what_tc_has_marked() {
    let at = |family: &str, dev: &Value, expressions: Value| {
        let base = json!({"chain": {"family": family, "table": "t", "name": "c", "type": "filter",
            "hook": "ingress", "prio": 0, "policy": "accept", "dev": dev}});
        let rule = json!({"rule": {"family": family, "table": "t", "chain": "c", "expr": expressions}});
        judged("--iface lan", &[base, rule])
    };
    let drop = json!([{"drop": null}]);
    for family in ["netdev", "inet"] {
        assert_eq!(at(family, &json!("lan"), drop.clone()), FAIL);
        assert_eq!(at(family, &json!(["eth7", "la*"]), drop.clone()), FAIL);
        assert_eq!(at(family, &json!("eth7"), drop.clone()), []);
        // nft 1.0.6 does not print it.
        assert_eq!(at(family, &Value::Null, drop.clone()), WARN);
    }
    let mark = |to: u32| json!([{"mangle": {"key": {"meta": {"key": "mark"}}, "value": to}}]);
    assert_eq!(at("netdev", &json!("lan"), mark(16)), [(Level::Fail, "mark")]);
    assert_eq!(at("netdev", &json!("lan"), mark(17)), []);
    let forward = json!([{"fwd": {"dev": "eth7"}}]);
    assert_eq!(at("netdev", &json!("lan"), forward), [(Level::Fail, "dnat")]);
    // Connection tracking has not seen it there.
    let state = |is: &str| {
        let state = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": is}});
        json!([state, {"drop": null}])
    };
    assert_eq!(at("inet", &json!("lan"), state("new")), []);
    assert_eq!(at("inet", &json!("lan"), state("invalid")), FAIL);
}

#[test]
fn work_is_bounded() {
    // Each chain jumps to the next ten times: 10^8 rules.
    let mut items = vec![chain("input", "accept")];
    let names: Vec<_> = std::iter::once("input".to_owned()).chain((1..9).map(|n| format!("c{n}"))).collect();
    for pair in names.windows(2) {
        let jump = rule(&pair[0], &json!([{"jump": {"target": pair[1]}}]));
        items.extend(std::iter::repeat_n(jump, 10));
    }
    items.push(rule("input", &json!([{"drop": null}])));
    assert_eq!(judged("--iface lan", &items), WARN);
}

#[test]
fn answers_to_a_syn_are_no_part_of_a_connection() {
    let invalid = json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}});
    let drops = [chain("output", "accept"), rule("output", &json!([invalid, {"drop": null}]))];
    assert_eq!(judged("--iface lan --handshake faithful", &drops), [(Level::Warn, "handshake")]);
    assert_eq!(judged("--iface lan", &drops), []);
    let own = matching(&json!({"meta": {"key": "mark"}}), &json!(2));
    let mended = [&drops[..1], &[rule("output", &json!([own, {"accept": null}]))], &drops[1..]].concat();
    assert_eq!(judged("--iface lan --handshake faithful", &mended), []);
}

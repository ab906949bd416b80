mod rules;

use std::collections::BTreeSet;

use clap::Parser as _;
use serde_json::{Value, json};

use super::facts::{BpfFs, Facts, Hooks, TunDriver};
use super::nft::Ruleset;
use super::*;
use crate::cli::{Cli, resolve};
use crate::config::Kernel;
use crate::interfaces::{Host, Interface, LinkDetail};
use crate::plan::Plan;

/// A gateway on which all is well, but for what `change` makes of it.
fn facts(flags: &str, change: impl FnOnce(&mut Facts)) -> Facts {
    let argv = std::iter::once("tproxy-user").chain(flags.split_whitespace());
    let config = resolve::config(&Cli::try_parse_from(argv).expect("flags").run).expect("valid");
    let interface = |index, name: &str| Interface {
        index,
        name: name.to_owned(),
        up: true,
        addresses: vec![[10, 0, 0, 1].into()],
        ..Interface::default()
    };
    let lo = Interface { loopback: true, ..interface(1, "lo") };
    let host = Host {
        interfaces: vec![lo, interface(2, "lan"), interface(3, "wan"), interface(4, "lan.7")],
        local: Vec::new(),
        ipv6: true,
    };
    let mut facts = Facts {
        plan: Plan::new(&config, &host).expect("plan"),
        config,
        host,
        links: Vec::new(),
        kernel: Some(Kernel { major: 6, minor: 12 }),
        capabilities: u64::MAX,
        open_files: 1 << 20,
        memlock: None,
        btf: true,
        jit: Some("1".to_owned()),
        bpffs: BpfFs::Mounted,
        control_groups: true,
        tun: TunDriver::Usable,
        taken: Vec::new(),
        free_port: 15002,
        running: None,
        left: Vec::new(),
        conflict: None,
        alternative: None,
        earlier: Vec::new(),
        hooks: vec![Hooks { interface: "lan".to_owned(), tcx: Some(Vec::new()), ..Hooks::default() }],
        forwards: (true, true),
        without_ipv6: Vec::new(),
        accept_local: ("0".to_owned(), true),
        bridge_filter: false,
        clients: vec!["10.0.0.0/24".parse().expect("network"), "fd00::/64".parse().expect("network")],
        nft: Ok(Ruleset::default()),
        legacy: Vec::new(),
        conntrack: Some((10, 1000)),
    };
    change(&mut facts);
    facts
}

/// The findings that are not `ok`, as level and id.
fn unwell(facts: &Facts) -> Vec<(Level, &'static str)> {
    let found: BTreeSet<_> = diagnose(facts)
        .into_iter()
        .filter(|finding| finding.level != Level::Ok)
        .map(|finding| (finding.level, finding.id))
        .collect();
    found.into_iter().collect()
}

#[test]
fn a_healthy_gateway_has_only_ok() {
    for flags in ["--iface lan", "--own-traffic", "--steer none", "--iface lan --source proxy -4"] {
        assert_eq!(unwell(&facts(flags, |_| {})), [], "{flags}");
    }
}

#[test]
fn each_cause_has_its_finding() {
    use Level::{Fail, Warn};
    type Case = (&'static str, fn(&mut Facts), Level, &'static str);
    let cases: [Case; 20] = [
        ("--iface lan", |f| f.memlock = Some(65536), Level::Ok, ""),
        (
            "--iface lan",
            |f| {
                (f.memlock, f.kernel, f.capabilities) =
                    (Some(65536), Some(Kernel { major: 5, minor: 10 }), !(1 << 24));
            },
            Fail,
            "memlock",
        ),
        ("--iface lan", |f| f.jit = Some("0".to_owned()), Warn, "jit"),
        ("--iface lan", |f| f.bpffs = BpfFs::Mountable, Warn, "bpf-file-system"),
        ("--iface lan", |f| f.control_groups = false, Level::Ok, ""),
        ("--iface lan", |f| (f.plan.notes_groups, f.control_groups) = (true, false), Fail, "control-groups"),
        (
            "--iface lan",
            |f| (f.plan.notes_groups, f.kernel) = (true, Some(Kernel { major: 5, minor: 8 })),
            Fail,
            "kernel",
        ),
        ("--iface lan", |f| f.hooks[0].xdp = true, Warn, "xdp"),
        ("--iface lan", |f| f.hooks[0].tcx = None, Warn, "tc-programs"),
        ("--iface lan", |f| f.conntrack = Some((950, 1000)), Warn, "conntrack"),
        ("--iface lan", |f| f.legacy = vec!["filter".to_owned()], Warn, "iptables-legacy"),
        ("--iface lan", |f| f.nft = Err("nft: not found".to_owned()), Warn, "packet-filter"),
        ("--own-traffic", |f| f.accept_local.1 = false, Fail, "own-traffic"),
        (
            "--iface lan",
            |f| f.links = vec![LinkDetail { index: 4, parent: Some(2), vlan: true, xdp: false }],
            Warn,
            "vlan",
        ),
        ("--iface tun*", |_| {}, Warn, "interface"),
        (
            "--iface lan --handshake faithful",
            |f| f.kernel = Some(Kernel { major: 5, minor: 7 }),
            Fail,
            "kernel",
        ),
        ("--iface lan --bpf-log", |f| f.kernel = Some(Kernel { major: 5, minor: 7 }), Fail, "kernel"),
        ("--iface lan", |f| f.kernel = Some(Kernel { major: 5, minor: 7 }), Warn, "kernel"),
        (
            "--iface lan --handshake faithful",
            |f| f.tun = TunDriver::Absent("not there".to_owned()),
            Fail,
            "tun",
        ),
        (
            "--iface lan --handshake faithful",
            |f| f.tun = TunDriver::Refused("not permitted".to_owned()),
            Fail,
            "tun",
        ),
    ];
    for (flags, change, level, id) in cases {
        let expected: &[_] = if level == Level::Ok { &[] } else { &[(level, id)] };
        assert_eq!(unwell(&facts(flags, change)), expected, "{flags} {id}");
    }
    let both =
        |f: &mut Facts| f.links = vec![LinkDetail { index: 4, parent: Some(2), vlan: true, xdp: false }];
    assert_eq!(unwell(&facts("--iface lan --iface lan.7", both)), []);
}

fn chain(hook: &str, policy: &str) -> Value {
    json!({"chain": {"family": "inet", "table": "t", "name": hook, "hook": hook, "policy": policy}})
}

fn rule(chain: &str, expressions: &Value) -> Value {
    json!({"rule": {"family": "inet", "table": "t", "chain": chain, "expr": expressions}})
}

fn matching(left: &Value, right: &Value) -> Value {
    json!({"match": {"op": "==", "left": left, "right": right}})
}

fn judged(flags: &str, items: &[Value]) -> Vec<(Level, &'static str)> {
    let ruleset = Ruleset::parse(&json!({"nftables": items}));
    unwell(&facts(flags, |facts| facts.nft = Ok(ruleset)))
}

#[test]
fn an_input_chain_drops_unless_something_accepts() {
    let (iifname, source) =
        (json!({"meta": {"key": "iifname"}}), json!({"payload": {"protocol": "ip", "field": "saddr"}}));
    let source6 = json!({"payload": {"protocol": "ip6", "field": "saddr"}});
    let mark = json!({"&": [{"meta": {"key": "mark"}}, 1]});
    let state = json!({"ct": {"key": "state"}});
    let established =
        rule("input", &json!([matching(&state, &json!(["established", "related"])), {"accept": null}]));
    let accept =
        |left: &Value, right: Value| rule("input", &json!([matching(left, &right), {"accept": null}]));
    let net = |address: &str, length: u8| json!({"prefix": {"addr": address, "len": length}});
    let with = |more: &[Value]| {
        let items = [&[chain("input", "drop"), established.clone()], more].concat();
        judged("--iface lan", &items)
    };
    let lost = [(Level::Fail, "packet-filter")];
    assert_eq!(with(&[]), lost);
    assert_eq!(with(&[accept(&iifname, json!("wan"))]), lost);
    assert_eq!(with(&[accept(&iifname, json!({"set": ["lo", "la*"]}))]), []);
    assert_eq!(with(&[accept(&mark, json!(1))]), []);
    assert_eq!(with(&[accept(&mark, json!(0))]), lost);
    let both = [accept(&source, net("10.0.0.0", 8)), accept(&source6, net("fd00::", 8))];
    assert_eq!(with(&both), []);
    assert_eq!(with(&both[..1]), lost, "IPv6 is still dropped");
    // What cannot be read may be the rule for the mark.
    assert_eq!(
        with(&[rule("input", &json!([{"xt": null}, {"accept": null}]))]),
        [(Level::Warn, "packet-filter")]
    );
    // A port that is closed is closed on purpose.
    let port = json!({"payload": {"protocol": "tcp", "field": "dport"}});
    let closed = rule("input", &json!([matching(&port, &json!(25)), {"drop": null}]));
    assert_eq!(judged("--iface lan", &[chain("input", "accept"), closed]), []);
}

#[test]
fn the_mend_is_of_the_tool_that_made_the_chain() {
    let mend = |family: &str, name: &str| {
        let chain = json!({"chain": {"family": family, "table": "filter", "name": name, "hook": "input", "policy": "drop"}});
        let ruleset = Ruleset::parse(&json!({"nftables": [chain]}));
        let facts = facts("--iface lan", |facts| facts.nft = Ok(ruleset));
        diagnose(&facts)
            .into_iter()
            .find(|finding| finding.level == Level::Fail)
            .and_then(|finding| finding.mend)
    };
    let nft = "nft insert rule inet filter input meta mark and 0x1 == 0x1 accept";
    assert_eq!(mend("inet", "input").as_deref(), Some(nft));
    let iptables = "ip6tables -t filter -I INPUT -m mark --mark 0x1/0x1 -j ACCEPT";
    assert_eq!(mend("ip6", "INPUT").as_deref(), Some(iptables));
}

#[test]
fn jumps_and_verdict_maps_are_followed() {
    let map = json!([{"vmap": {"key": {"ct": {"key": "state"}},
        "data": {"set": [["established", {"accept": null}], ["new", {"jump": {"target": "fresh"}}]]}}}]);
    let items = [chain("input", "accept"), rule("input", &map), rule("fresh", &json!([{"reject": null}]))];
    assert_eq!(judged("--iface lan", &items), [(Level::Fail, "packet-filter")]);
    let endless = [chain("input", "accept"), rule("input", &json!([{"jump": {"target": "input"}}]))];
    assert_eq!(judged("--iface lan", &endless), []);
}

#[test]
fn marks_that_stay_are_no_fault() {
    let mangle = |value: Value| {
        let expressions = json!([{"mangle": {"key": {"meta": {"key": "mark"}}, "value": value}}]);
        judged("--iface lan", &[chain("prerouting", "accept"), rule("prerouting", &expressions)])
    };
    let mark = json!({"meta": {"key": "mark"}});
    for stays in [json!({"|": [mark, 16]}), json!({"&": [mark, 0xff]}), json!({"^": [mark, 16]}), json!(3)] {
        assert_eq!(mangle(stays.clone()), [], "{stays}");
    }
    for lost in
        [json!({"ct": {"key": "mark"}}), json!({"&": [mark, 0xfe]}), json!({"^": [mark, 1]}), json!(16)]
    {
        assert_eq!(mangle(lost.clone()), [(Level::Fail, "mark")], "{lost}");
    }
}

#[test]
fn masquerade_matters_for_the_clients_port() {
    let out = |name: &str| matching(&json!({"meta": {"key": "oifname"}}), &json!(name));
    let source = |address: &str| {
        let left = json!({"payload": {"protocol": "ip", "field": "saddr"}});
        matching(&left, &json!({"prefix": {"addr": address, "len": 16}}))
    };
    let with = |flags: &str, expressions: Value| {
        judged(flags, &[chain("postrouting", "accept"), rule("postrouting", &expressions)])
    };
    let all = json!([out("wan"), {"masquerade": null}]);
    assert_eq!(with("--iface lan --source client-port", all.clone()), [(Level::Warn, "nat")]);
    for flags in ["--iface lan", "--iface lan --source proxy"] {
        assert_eq!(with(flags, all.clone()), []);
    }
    // Those of containers are none of the clients'.
    assert_eq!(
        with("--iface lan --source client-port", json!([source("172.17.0.0"), {"masquerade": null}])),
        []
    );
    assert_eq!(
        with(
            "--iface lan --source client-port",
            json!([source("10.0.0.0"), {"xt": {"type": "target", "name": "MASQUERADE"}}])
        ),
        [(Level::Warn, "nat")]
    );
    assert_eq!(with("--iface lan --source client-port", json!([out("ppp0"), {"masquerade": null}])), []);
}

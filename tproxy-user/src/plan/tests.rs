use super::*;
use crate::cli::{Cli, resolve};
use clap::Parser as _;

fn config(flags: &str) -> Config {
    let argv = std::iter::once("tproxy-user").chain(flags.split_whitespace());
    resolve::config(&Cli::try_parse_from(argv).expect("flags").run).expect("valid")
}

fn interface(index: u32, name: &str) -> Interface {
    Interface {
        index,
        name: name.to_owned(),
        up: true,
        addresses: vec![format!("10.0.{index}.1").parse().expect("address")],
        ..Interface::default()
    }
}

/// A router: lo, eth0 and wg0 with addresses, br0 with port eth1, eth2 in a
/// VRF, tun0 without address but with a route, eth3 down, eth4 with nothing.
fn host() -> Host {
    let interfaces = vec![
        Interface { loopback: true, ..interface(1, "lo") },
        interface(2, "eth0"),
        Interface { master: Some(4), addresses: vec![], ..interface(3, "eth1") },
        Interface { kind: "bridge".to_owned(), ..interface(4, "br0") },
        Interface { master: Some(6), ..interface(5, "eth2") },
        Interface { kind: "vrf".to_owned(), ..interface(6, "vrf0") },
        Interface { addresses: vec![], routed: true, ..interface(7, "tun0") },
        Interface { up: false, ..interface(8, "eth3") },
        Interface { addresses: vec![], ..interface(9, "eth4") },
        interface(10, "wg0"),
    ];
    Host { interfaces, local: vec!["127.0.0.0/8".parse().expect("network")], ipv6: true }
}

fn roles(plan: &Plan) -> Vec<(&str, Role)> {
    plan.interfaces.iter().map(|interface| (&*interface.name, interface.role)).collect()
}

#[test]
fn devices_of_its_own_are_neither_clients_nor_servers() {
    let mut host = host();
    host.interfaces.push(Interface { kind: "tun".to_owned(), routed: true, ..interface(11, "tproxy0") });
    let plan = Plan::new(&config("--iface t*"), &host).expect("plan");
    assert!(roles(&plan).contains(&("tun0", Role::Capture)));
    assert!(roles(&plan).iter().all(|(name, _)| *name != "tproxy0"), "{:?}", roles(&plan));
    let named = Plan::new(&config("--iface tproxy0"), &host).expect("plan");
    assert_eq!(named.require_interfaces(&host).expect_err("refused").exit_code(), 2);
}

#[test]
fn uplinks_are_found() {
    let plan = Plan::new(&config("--iface br0"), &host()).expect("plan");
    assert_eq!(
        roles(&plan),
        [
            ("eth0", Role::Uplink),
            ("br0", Role::Capture),
            ("eth2", Role::Uplink),
            ("tun0", Role::Uplink),
            ("wg0", Role::Uplink)
        ]
    );
    assert_eq!(plan.rules.len(), 10);
    assert_eq!(plan.rules[0].to_string(), "ip -4 rule add priority 100 iif eth0 fwmark 0x1/0x1 lookup 100");
    assert_eq!(plan.routes.len(), 2);
    assert_eq!(plan.sysctls, []);
}

#[test]
fn source_proxy_needs_no_uplinks() {
    let plan = Plan::new(&config("--iface br0 --source proxy -4"), &host()).expect("plan");
    assert_eq!(roles(&plan), [("br0", Role::Capture)]);
    assert_eq!((plan.rules.len(), plan.routes.len()), (1, 1));
    // Own traffic leaves by all interfaces, but needs no rule there.
    let plan = Plan::new(&config("--iface br0 --source proxy -4 --own-traffic"), &host()).expect("plan");
    assert_eq!(plan.interfaces.len(), 6);
    assert_eq!(plan.rules.iter().map(|rule| &*rule.iif).collect::<Vec<_>>(), ["lo", "br0"]);
}

#[test]
fn own_traffic_has_its_own_mark() {
    let plan = Plan::new(&config("--own-traffic -4"), &host()).expect("plan");
    assert_eq!(plan.rules[0].to_string(), "ip -4 rule add priority 100 iif lo fwmark 0x3/0x3 lookup 100");
    assert_eq!(plan.sysctls, [Sysctl { name: "net.ipv4.conf.lo.accept_local", value: "1" }]);
}

#[test]
fn globs_take_what_can_be_captured() {
    let plan = Plan::new(&config("--iface eth* --iface eth0 --source proxy"), &host()).expect("plan");
    assert_eq!(
        roles(&plan).iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        ["eth0", "eth2", "eth3", "eth4"]
    );
    assert_eq!(plan.warnings, ["--iface eth3: the interface is down"]);
    let plan = Plan::new(&config("--iface ppp*"), &host()).expect("plan");
    assert!(plan.missing.is_empty() && plan.warnings[0].contains("ppp*"));
}

#[test]
fn rules_that_never_match_are_told() {
    let rule = |conditions| rule::Rule { conditions, action: rule::Action::Pass };
    let sender = rule(Conditions { uids: vec![(1000, 1000)], ..Conditions::default() });
    let arrival = rule(Conditions { macs: vec![[2; 6]], ..Conditions::default() });
    let group = rule(Conditions { gids: vec![(1000, 1000)], ..Conditions::default() });
    for (flags, expected) in [
        ("--iface eth0 --own-traffic", &[][..]),
        (
            "--iface eth0",
            &[
                "rule 1 never matches: it asks who on this host sends",
                "rule 3 never matches: it asks who on this host sends",
            ],
        ),
        ("--own-traffic", &["rule 2 never matches: it asks how a flow arrives"]),
    ] {
        let mut config = config(flags);
        config.capture.rules = vec![sender.clone(), arrival.clone(), group.clone()].into();
        let plan = Plan::new(&config, &host()).expect("plan");
        assert_eq!(plan.notes_groups, config.capture.own_traffic, "{flags}");
        let warnings = plan.warnings;
        assert_eq!(warnings.len(), expected.len(), "{flags}: {warnings:?}");
        assert!(warnings.iter().zip(expected).all(|(told, begin)| told.starts_with(begin)), "{warnings:?}");
    }
}

#[test]
fn a_proxy_server_whose_traffic_comes_back_is_told() {
    let told = |flags: &str, rules: Vec<rule::Rule>| {
        let mut config = config(flags);
        config.capture.rules = rules.into();
        let warnings = Plan::new(&config, &host()).expect("plan").warnings;
        warnings.iter().filter(|told| told.contains("is on this host")).count()
    };
    let (here, there) = ("--upstream socks5://127.0.0.1", "--upstream socks5://10.9.9.9");
    assert_eq!(told(&format!("--own-traffic {here}"), vec![]), 1);
    assert_eq!(told(&format!("--own-traffic {there} {here}"), vec![]), 1);
    assert_eq!(told(&format!("--own-traffic {there}"), vec![]), 0);
    assert_eq!(told(&format!("--iface eth0 {here}"), vec![]), 0);
    let sender = Conditions { uids: vec![(1000, 1000)], ..Conditions::default() };
    let passes = rule::Rule { conditions: sender, action: rule::Action::Pass };
    assert_eq!(told(&format!("--own-traffic {here}"), vec![passes]), 0);
    let upstream = config(&format!("--own-traffic {here}")).upstream;
    let sends = rule::Rule { conditions: Conditions::default(), action: rule::Action::Proxy(Some(upstream)) };
    assert_eq!(told("--own-traffic", vec![sends]), 1);
}

#[test]
fn bad_interfaces_are_explained() {
    let host = host();
    for (flags, explained) in [("--iface lo", "--own-traffic"), ("--iface eth1", "--iface br0")] {
        let plan = Plan::new(&config(flags), &host).expect("plan");
        assert!(plan.interfaces.iter().all(|interface| interface.role != Role::Capture), "{flags}");
        let error = plan.require_interfaces(&host).expect_err(flags);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(explained), "{error}");
    }
    let plan = Plan::new(&config("--iface eth9"), &host).expect("plan");
    let error = plan.require_interfaces(&host).expect_err("missing");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("there are: eth0, eth1"), "{error}");
}

#[test]
fn host_without_ipv6() {
    let host = Host { ipv6: false, ..host() };
    let plan = Plan::new(&config("--iface br0"), &host).expect("plan");
    assert!(plan.rules.iter().all(|rule| !rule.v6) && plan.routes.iter().all(|route| !route.v6));
    assert!(plan.sockets.iter().all(|socket| socket.address.is_ipv4()));
    assert_eq!(Plan::new(&config("--iface br0 -6"), &host).expect_err("no IPv6").exit_code(), 4);
}

#[test]
fn steering_by_others_sets_up_nothing() {
    let plan = Plan::new(&config("--steer none"), &host()).expect("plan");
    assert!(
        plan.interfaces.is_empty()
            && plan.rules.is_empty()
            && plan.routes.is_empty()
            && plan.sysctls.is_empty()
    );
    assert_eq!(plan.sockets[0].to_string(), "tcp 0.0.0.0:15001");
}

#[test]
fn text_and_json_name_everything() {
    let plan = Plan::new(&config("--iface br0 --to 10.0.0.0/8 --dport 53,80-81"), &host()).expect("plan");
    let text = plan.to_string();
    for part in ["br0 (index 4): capture", "  dport: 53, 80-81", "  to: 10.0.0.0/8", "127.0.0.0/8"] {
        assert!(text.contains(part), "{part} not in {text}");
    }
    let json = plan.to_json();
    assert_eq!(json["interfaces"][1]["role"], "capture");
    assert_eq!(json["captured"]["dport"], serde_json::json!(["53", "80-81"]));
    assert_eq!(json["captured"]["to"], serde_json::json!(["10.0.0.0/8"]));
    assert_eq!(json["rules"][0]["fwmark"], "0x1/0x1");
}

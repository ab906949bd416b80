//! Rules that ask for names, where the kernel knows what a destination is called and where it
//! does not.

use tproxy_common::abi::{Decided, Settings, Verdict, program};
use tproxy_user::config::Scope;
use tproxy_user::config::rule::{Action, Conditions, Domains, Rule};
use tproxy_user::config::upstream::Upstream;
use tproxy_user::policy::domains::{self, Pattern};
use tproxy_user::policy::names::Names;
use tproxy_user::policy::rules::{Written, rule_set};
use tproxy_user::policy::targets::Targets;

use crate::kernel::{DROP, Kernel, PASS, REDIRECTED, STEERED, usual};
use crate::packets as p;

tests![
    what_names_do_not_change_is_decided_at_once,
    the_proxy_is_asked_where_names_matter,
    what_an_address_is_called_decides,
    what_was_asked_of_own_traffic_comes_back,
    fragments_are_asked_about_too,
    what_the_proxy_throws_away_is_not_handed_to_it_again,
];

fn named(patterns: &[&str], action: Action) -> Rule {
    let listed = patterns.iter().map(|text| Pattern::parse(text).expect("a name")).collect();
    let domains = Domains { listed, ..Domains::default() };
    Rule { conditions: Conditions { domains, ..Conditions::default() }, action }
}

fn port(port: u16, action: Action) -> Rule {
    Rule { conditions: Conditions { to_ports: vec![(port, port)], ..Conditions::default() }, action }
}

/// A kernel that decides by these rules, and the numbers of names' sets.
fn with(settings: &Settings, mut rules: Vec<Rule>) -> (Kernel, impl Fn(&str) -> u32 + use<>) {
    domains::Domains::share(&mut rules);
    let mut kernel = Kernel::new(settings);
    let set = rule_set(
        Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &rules },
        &Names::default(),
        &Targets::default(),
    );
    kernel.set_rules(&set.expect("few targets"));
    let all = rules
        .iter()
        .find(|rule| !rule.conditions.domains.is_empty())
        .map(|rule| &rule.conditions.domains.all);
    let all = all.expect("names").clone();
    (kernel, move |name: &str| all.set_of(name))
}

fn what_names_do_not_change_is_decided_at_once() {
    // A rule before those that ask for names, and one that asks for another port as well.
    let before = vec![port(p::SERVER_PORT, Action::Pass), named(&["a.example"], Action::Drop)];
    let mut elsewhere = named(&["a.example"], Action::Drop);
    elsewhere.conditions.to_ports = vec![(1, 1)];
    let behind = vec![port(2, Action::Drop), elsewhere, port(p::SERVER_PORT, Action::Pass)];
    for (rules, number) in [(before, 1), (behind, 3)] {
        let (mut kernel, _) = with(&usual(), rules);
        kernel.run(program::CAPTURE, &p::syn_v4()).expect(PASS, "pass_policy");
        let (_, flow) = kernel.only_flow();
        assert_eq!((flow.verdict, flow.fallback, flow.rule), (Verdict::Pass as u8, 0, number));
    }
}

fn the_proxy_is_asked_where_names_matter() {
    for packet in [p::syn_v4(), p::syn_v6(), p::udp_v4(3), p::udp_v6(3)] {
        let all = Rule { conditions: Conditions::default(), action: Action::Drop };
        let (mut kernel, _) = with(&usual(), vec![named(&["*.example"], Action::Pass), all]);
        for _ in 0..2 {
            kernel.run(program::CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
        }
        let (_, flow) = kernel.only_flow();
        assert_eq!((flow.verdict, flow.fallback, flow.rule), (Verdict::Ask as u8, Verdict::Drop as u8, 2));
        assert_eq!((flow.packets_up, flow.target), (2, 0));
    }
}

fn what_an_address_is_called_decides() {
    let rules = || vec![named(&["a.example"], Action::Pass), named(&["*.example"], Action::Drop)];
    for packet in [p::syn_v4(), p::udp_v4(3)] {
        for (name, seconds, outcome) in [
            ("a.example", 10, (PASS, "pass_policy")),
            ("b.example", 10, (DROP, "policy_dropped")),
            ("other.test", 10, (STEERED, "assign_eopnotsupp")),
            // What has expired is as if it had never been.
            ("a.example", -1, (STEERED, "assign_eopnotsupp")),
        ] {
            let (mut kernel, set_of) = with(&usual(), rules());
            kernel.set_name(p::mapped(p::SERVER_V4), Some(set_of(name)), seconds);
            kernel.run(program::CAPTURE, &packet).expect(outcome.0, outcome.1);
            let (_, flow) = kernel.only_flow();
            let asked = flow.verdict == Verdict::Ask as u8;
            assert_eq!(asked, seconds < 0, "{name}: {flow:?}");
        }
    }
}

fn what_was_asked_of_own_traffic_comes_back() {
    let rules = vec![named(&["a.example"], Action::Drop)];
    let (mut kernel, _) = with(&Settings { own_traffic: 1, ..usual() }, rules);
    kernel.run(program::OWN, &p::syn_v4()).expect(REDIRECTED, "own_redirected");
    assert_eq!(kernel.only_flow().1.verdict, Verdict::Ask as u8);
}

fn fragments_are_asked_about_too() {
    let (mut kernel, _) = with(&usual(), vec![named(&["a.example"], Action::Drop)]);
    for fragment in p::fragment_v4(&p::udp_v4(3000), 1480, 7) {
        kernel.run(program::CAPTURE, &fragment).expect(STEERED, "steered_fragment");
    }
}

fn what_the_proxy_throws_away_is_not_handed_to_it_again() {
    let (mut kernel, _) = with(&usual(), vec![named(&["a.example"], Action::Drop)]);
    let packet = p::udp_v4(3);
    kernel.run(program::CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    let (key, flow) = kernel.only_flow();
    // Of another flow that had the same addresses and ports, and of this one.
    for (first_seen, outcome) in
        [(flow.first_seen + 1, (STEERED, "assign_eopnotsupp")), (flow.first_seen, (DROP, "policy_dropped"))]
    {
        let decided = Decided { first_seen, rule: 1, verdict: Verdict::Drop as u8, ..Decided::default() };
        kernel.set_decided(&key, decided);
        kernel.run(program::CAPTURE, &packet).expect(outcome.0, outcome.1);
    }
    assert_eq!(kernel.only_flow().1.packets_up, 3);
}

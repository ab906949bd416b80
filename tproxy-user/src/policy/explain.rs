//! Which rule decides over a packet, and why: by the image that the kernel gets.

use std::net::IpAddr;

use tproxy_common::abi::{Decision, Family, Verdict, mapped};
use tproxy_common::classify::is_special;
use tproxy_common::policy::Known;

use crate::config::upstream::Upstream;
use crate::plan::{Plan, Role, prefixes};

use super::compile::{Condition, Rule, RuleSet, Selector, compile};
use super::domains::Domains;
use super::facts::{Memory, Packet};
use super::hostname::normal;
use super::names::Names;
use super::question::{Origin, Question};
use super::rules::{Written, number, rule_set};
use super::targets::Targets;

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Answer {
    /// `proxy`, `divert`, `pass`, `reject` or `drop`.
    pub action: &'static str,
    /// Number of the rule of the configuration; `None`: none decides.
    pub rule: Option<u16>,
    /// Why.
    pub because: String,
    /// Rules before it.
    pub not: Vec<Miss>,
}

/// A rule that does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Miss {
    /// Its number.
    pub rule: u16,
    /// The first of its conditions that is not met.
    pub condition: &'static str,
}

impl Answer {
    fn passes(because: impl Into<String>) -> Self {
        Self { action: "pass", rule: None, because: because.into(), not: Vec::new() }
    }
}

/// Answers by a plan.
///
/// # Errors
///
/// What is missing in the question, or an interface that is not there.
pub fn explain(plan: &Plan, question: &Question) -> Result<Answer, String> {
    let interface = match &question.origin {
        Some(Origin::Own) => None,
        Some(Origin::Interface(name)) => Some(index(plan, name)?),
        None => Some(only_captured(plan)?),
    };
    if let Some(index) = interface
        && !plan.interfaces.iter().any(|i| i.index == index && i.role == Role::Capture)
    {
        return Ok(Answer::passes("that interface is not captured"));
    }
    if interface.is_none() && !plan.interfaces.iter().any(|i| i.role == Role::Loopback) {
        return Ok(Answer::passes("this host's own traffic is not captured"));
    }
    let packet = facts(question, interface, plan);
    if [&packet.source, &packet.destination].into_iter().any(|addr| is_special(addr, packet.family)) {
        return Ok(Answer::passes("loopback, link-local, multicast and such addresses are never captured"));
    }
    let to = question.destination.ip();
    if plan.local.iter().filter_map(prefixes::net).any(|net| net.contains(&to)) {
        return Ok(Answer::passes(format!("{to} is an address of this host")));
    }
    let names = Names::new(&plan.names, &plan.policy);
    let written = Written { scope: &plan.scope, upstream: &plan.upstream, rules: &plan.policy };
    let set = rule_set(written, &names, &Targets::default()).map_err(|error| error.to_string())?;
    let image = Memory(compile(&set).map_err(|error| error.to_string())?);
    Ok(answer(plan, &set, &packet, image.decide(&packet)))
}

fn answer(plan: &Plan, set: &RuleSet, packet: &Packet, (word, place): (u32, u32)) -> Answer {
    let (decision, place) = (Decision::from_word(word), place as usize);
    let because = match decision.rule().checked_sub(1).and_then(|at| plan.policy.get(usize::from(at))) {
        Some(rule) => rule.to_string(),
        // What is not selected passes by a rule of its own.
        None => match set.rules.get(place) {
            None if plan.upstream == Upstream::Direct => "no rule matches".to_owned(),
            None => format!("no rule matches, and the upstream is {}", plan.upstream),
            Some(_) if plan.upstream.passes_udp() && place + 1 == set.rules.len() => {
                format!("no rule matches, and the upstream carries no UDP: {}", plan.upstream)
            }
            Some(rule) => format!("it is not among the captured flows by its {}", respect(&rule.conditions)),
        },
    };
    let not = set.rules[..place].iter().filter_map(|rule| {
        let condition = key(unmet(&rule.conditions, packet)?);
        Some(Miss { rule: Decision::from_word(rule.verdict).rule(), condition })
    });
    let action = match Verdict::from_raw(decision.raw_verdict()) {
        Some(Verdict::Proxy | Verdict::Ask) | None => "proxy",
        Some(Verdict::Divert) => "divert",
        Some(Verdict::Pass) => "pass",
        Some(Verdict::Reject) => "reject",
        Some(Verdict::Drop) => "drop",
    };
    let not = not.filter(|miss| miss.rule > 0).collect();
    Answer { action, rule: (decision.rule() != 0).then_some(decision.rule()), because, not }
}

fn respect(conditions: &[Condition]) -> &'static str {
    conditions.first().map_or("nature", |condition| match condition.selector {
        // Of a family that is not selected every source is left out.
        Selector::Source4 | Selector::Source6 => "source or family",
        Selector::Destination4 | Selector::Destination6 => "destination",
        selector => key(selector),
    })
}

/// The first condition that a packet does not meet, by the same image.
fn unmet(conditions: &[Condition], packet: &Packet) -> Option<Selector> {
    let met = |condition: &Condition| {
        let rules = vec![Rule { conditions: vec![condition.clone()], verdict: 1 }];
        compile(&RuleSet { rules, otherwise: 0 }).is_ok_and(|image| Memory(image).decide(packet).0 == 1)
    };
    conditions.iter().find(|condition| !met(condition)).map(|condition| condition.selector)
}

/// The key of the config file.
const fn key(selector: Selector) -> &'static str {
    match selector {
        Selector::Source4 | Selector::Source6 => "from",
        Selector::Destination4 | Selector::Destination6 => "to",
        Selector::SourcePort => "from_port",
        Selector::DestinationPort => "to_port",
        Selector::Protocol => "protocol",
        Selector::Interface => "iface",
        Selector::Mac => "mac",
        Selector::Dscp => "dscp",
        Selector::Mark { .. } => "mark",
        Selector::Uid => "uid",
        Selector::Gid => "gid",
        Selector::Cgroup { .. } => "cgroup",
        Selector::Domain => "domain",
    }
}

fn facts(question: &Question, interface: Option<u32>, plan: &Plan) -> Packet {
    let domains = Domains::of(&plan.policy);
    let name = question.domain.as_deref().and_then(normal);
    let addr = |ip| match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    };
    Packet {
        family: if question.source.is_ipv4() { Family::V4 } else { Family::V6 },
        source: addr(question.source.ip()),
        destination: addr(question.destination.ip()),
        ports: Known::Is((question.source.port(), question.destination.port())),
        protocol: question.protocol,
        interface,
        // What the kernel knows of either: see `Facts` of its programs.
        mac: question.mac.filter(|_| interface.is_some()).map(number),
        dscp: question.dscp,
        mark: question.mark,
        uid: question.uid.filter(|_| interface.is_none()),
        gid: question.gid.filter(|_| interface.is_none()),
        cgroups: if interface.is_none() {
            question.cgroup.as_deref().map(Names::ancestors).unwrap_or_default()
        } else {
            Vec::new()
        },
        domain: domains.zip(name).map(|(domains, name)| domains.set_of(&name)).into(),
    }
}

fn index(plan: &Plan, name: &str) -> Result<u32, String> {
    let found = plan.names.iter().find(|(_, known)| known == name);
    found.map(|(index, _)| *index).ok_or_else(|| format!("iface {name}: no such interface"))
}

fn only_captured(plan: &Plan) -> Result<u32, String> {
    let mut captured = plan.interfaces.iter().filter(|interface| interface.role == Role::Capture);
    match (captured.next(), captured.next()) {
        (Some(only), None) => Ok(only.index),
        _ => Err("where does it come from? say 'iface NAME', or 'own' for what this host sends".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, resolve};
    use crate::config::file;
    use crate::interfaces::{Host, Interface};

    const CONFIG: &str = r#"
[[rule]]
to = ["10.0.0.0/8", "fd00::/8"]
action = "pass"
[[rule]]
protocol = "udp"
to_port = 53
action = "divert"
target = "127.0.0.53:53"
[[rule]]
from = "192.168.1.66"
mac = "02:00:00:00:00:01"
action = "reject"
"#;

    /// A router that captures `lan`.
    fn plan() -> Plan {
        plan_by("--not-to 203.0.113.0/24 --proto tcp,udp", CONFIG)
    }

    /// With these flags and rules.
    fn plan_by(flags: &str, rules: &str) -> Plan {
        let argv = ["tproxy-user", "-i", "lan"].into_iter().chain(flags.split(' '));
        let mut run = Cli::try_parse_from(argv).expect("flags").run;
        run.capture.rules = file::parse(rules.as_bytes(), "t.toml".as_ref()).expect("rules").1.rules;
        let interface = |index, name: &str, address: &str| Interface {
            index,
            name: name.to_owned(),
            up: true,
            addresses: vec![address.parse().expect("an address")],
            ..Interface::default()
        };
        let host = Host {
            interfaces: vec![
                Interface { loopback: true, ..interface(1, "lo", "127.0.0.1") },
                interface(2, "lan", "192.168.1.1"),
                interface(3, "wan", "198.51.100.1"),
            ],
            local: vec!["192.168.1.1/32".parse().expect("a network")],
            ipv6: true,
        };
        Plan::new(&resolve::config(&run).expect("valid"), &host).expect("a plan")
    }

    #[track_caller]
    fn ask(question: &str) -> (&'static str, Option<u16>, String) {
        let answer = explain(&plan(), &question.parse().expect("a packet")).expect("an answer");
        (answer.action, answer.rule, answer.because)
    }

    #[test]
    fn the_rule_that_decides_is_named() {
        let answer = |action, rule, because: &str| (action, rule, because.to_owned());
        assert_eq!(
            ask("tcp 192.168.1.5:1234 > 10.1.1.1:443 iface lan"),
            answer("pass", Some(1), "to 10.0.0.0/8,fd00::/8: pass")
        );
        assert_eq!(
            ask("udp 192.168.1.5:1234 > 8.8.8.8:53"),
            answer("divert", Some(2), "protocol udp, to_port 53: divert to 127.0.0.53:53")
        );
        assert_eq!(ask("tcp 192.168.1.66:1 > 8.8.8.8:53 mac 02:00:00:00:00:01").1, Some(3));
        assert_eq!(ask("tcp 192.168.1.66:1 > 8.8.8.8:53"), answer("proxy", None, "no rule matches"));
        assert_eq!(
            ask("tcp 192.168.1.66:1 > 203.0.113.9:53"),
            answer("pass", None, "it is not among the captured flows by its destination")
        );
        assert_eq!(ask("tcp 8.8.8.8:1 > 1.1.1.1:53 iface wan").2, "that interface is not captured");
        assert_eq!(ask("tcp 192.168.1.2:1 > 192.168.1.1:22").2, "192.168.1.1 is an address of this host");
        assert_eq!(ask("udp 192.168.1.2:1 > 224.0.0.1:22").0, "pass");
        assert_eq!(ask("udp 192.168.1.1:1 > 1.1.1.1:22 own").2, "this host's own traffic is not captured");
    }

    #[test]
    fn a_name_is_what_the_question_says() {
        let mut plan = plan();
        let config = "[[rule]]\ndomain = '*.example'\naction = 'reject'\n[[rule]]\naction = 'pass'\n";
        plan.policy = file::parse(config.as_bytes(), "t.toml".as_ref()).expect("rules").1.rules.into();
        for (name, rule, not) in
            [("domain a.Example", 1, None), ("domain example", 2, Some("domain")), ("", 2, Some("domain"))]
        {
            let question = format!("tcp 192.168.1.5:1 > 8.8.8.8:443 {name}").parse().expect("a packet");
            let answer = explain(&plan, &question).expect("an answer");
            let missed = answer.not.first().map(|miss| miss.condition);
            assert_eq!((answer.rule, missed), (Some(rule), not), "{name}");
        }
    }

    #[test]
    fn who_sends_is_asked_of_own_traffic_alone() {
        let plan = plan_by("--own-traffic", "[[rule]]\nuid = 7\ngid = '100-200'\naction = 'reject'\n");
        for (origin, rule, not) in [
            ("own uid 7 gid 150", Some(1), None),
            ("own uid 7 gid 201", None, Some("gid")),
            ("own uid 8 gid 150", None, Some("uid")),
            ("own uid 7", None, Some("gid")),
            ("iface lan uid 7 gid 150", None, Some("uid")),
        ] {
            let question = format!("tcp 192.168.1.5:1 > 8.8.8.8:443 {origin}").parse().expect("a packet");
            let answer = explain(&plan, &question).expect("an answer");
            let missed = answer.not.first().map(|miss| miss.condition);
            assert_eq!((answer.rule, missed), (rule, not), "{origin}");
        }
    }

    #[test]
    fn rules_before_it_tell_what_they_miss() {
        let question = "udp 192.168.1.66:1 > 8.8.8.8:99 iface lan".parse().expect("a packet");
        let answer = explain(&plan(), &question).expect("an answer");
        let not: Vec<_> = answer.not.iter().map(|miss| (miss.rule, miss.condition)).collect();
        assert_eq!(not, [(1, "to"), (2, "to_port"), (3, "mac")]);
        let elsewhere = "tcp 1.1.1.1:1 > 1.1.1.1:2 iface eth7".parse().expect("a packet");
        assert_eq!(explain(&plan(), &elsewhere), Err("iface eth7: no such interface".to_owned()));
    }
}

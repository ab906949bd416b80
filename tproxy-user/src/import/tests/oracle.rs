//! Random chains: what becomes of a packet on its way through them, rule by rule as the
//! kernel does it, must become of it by the configuration.

use std::net::SocketAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use super::super::{Error, import};
use super::judge::{Judge, Packet};
use super::table;

/// A condition, and whether it is negated.
#[derive(Clone, Debug)]
enum Match {
    From(IpNet, bool),
    To(IpNet, bool),
    /// TCP or UDP, and a port.
    Port(&'static str, u16, bool),
    Interface(&'static str, bool),
    Mark(u32, bool),
    User(u32, bool),
    Group(u32, bool),
}

#[derive(Clone, Debug)]
struct Rule {
    chain: &'static str,
    matches: Vec<Match>,
    target: &'static str,
}

/// Chains of one hook may jump to the later ones only.
const ARRIVING: [&str; 3] = ["PREROUTING", "A", "B"];
const OWN: [&str; 3] = ["OUTPUT", "C", "D"];

fn net() -> impl Strategy<Value = IpNet> {
    select(vec!["10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8", "0.0.0.0/1"])
        .prop_map(|net| net.parse().expect("a network"))
}

fn a_match(own: bool) -> impl Strategy<Value = Match> {
    let side = if own {
        let owner = select(vec![Match::User as fn(u32, bool) -> Match, Match::Group]);
        (owner, 0_u32..3, any::<bool>()).prop_map(|(owner, id, not)| owner(id, not)).boxed()
    } else {
        (select(vec!["eth0", "eth+", "lo", "wg0"]), any::<bool>())
            .prop_map(|(name, not)| Match::Interface(name, not))
            .boxed()
    };
    prop_oneof![
        2 => (net(), any::<bool>()).prop_map(|(net, not)| Match::To(net, not)),
        2 => (net(), any::<bool>()).prop_map(|(net, not)| Match::From(net, not)),
        3 => (select(vec!["tcp", "udp"]), 1_u16..4, any::<bool>())
            .prop_map(|(protocol, port, not)| Match::Port(protocol, port, not)),
        2 => side,
        1 => (select(vec![1_u32, 16]), any::<bool>()).prop_map(|(mark, not)| Match::Mark(mark, not)),
    ]
}

fn rule(chains: [&'static str; 3], own: bool) -> impl Strategy<Value = Rule> {
    let matches = move || prop::collection::vec(a_match(own), 0..3);
    (0_usize..3).prop_flat_map(move |at| {
        let mut targets = vec!["-j RETURN", "-j ACCEPT", "-j DROP", "-j MARK --set-xmark 0x10/0x10"];
        let capture = if own { "-j MARK --set-xmark 0x1/0x1" } else { TPROXY };
        targets.extend([capture; 3]);
        let jumps: &[_] = match chains[at] {
            "PREROUTING" => &["-j A", "-j B", "-g A", "-j A", "-j B"],
            "A" => &["-j B", "-g B"],
            "OUTPUT" => &["-j C", "-j D", "-g C", "-j C"],
            "C" => &["-j D", "-g D"],
            _ => &[],
        };
        targets.extend(jumps);
        (matches(), select(targets)).prop_map(move |(matches, target)| Rule {
            chain: chains[at],
            matches,
            target,
        })
    })
}

const TPROXY: &str = "-p tcp -j TPROXY --on-port 7 --tproxy-mark 0x1/0x1";

fn packet() -> impl Strategy<Value = Packet> {
    let address = || select(vec!["10.0.0.1", "10.1.0.1", "11.0.0.1", "129.0.0.1"]);
    let (from, to) = (address(), (address(), 1_u16..4));
    let interface = select(vec![Some("eth0"), Some("eth1"), Some("wg0"), None]);
    let gid = prop::option::of(0_u32..3);
    (interface, (0_u32..3, gid), select(vec!["tcp", "udp"]), from, to).prop_map(
        |(interface, (uid, gid), protocol, from, (to, port))| Packet {
            interface: interface.map(str::to_owned),
            uid,
            gid: gid.map(|gid| gid.to_string()),
            mac: String::new(),
            dscp: 0,
            mark: 0,
            protocol: protocol.to_owned(),
            from: SocketAddr::new(from.parse().expect("an address"), 9),
            to: SocketAddr::new(to.parse().expect("an address"), port),
        },
    )
}

impl Match {
    fn text(&self) -> String {
        let not = |negated: bool| if negated { "! " } else { "" };
        match self {
            Self::From(net, negated) => format!("{}-s {net}", not(*negated)),
            Self::To(net, negated) => format!("{}-d {net}", not(*negated)),
            Self::Port(protocol, port, negated) => {
                format!("-p {protocol} -m {protocol} {}--dport {port}", not(*negated))
            }
            Self::Interface(name, negated) => format!("{}-i {name}", not(*negated)),
            Self::Mark(mark, negated) => format!("-m mark {}--mark {mark:#x}/{mark:#x}", not(*negated)),
            Self::User(user, negated) => format!("-m owner {}--uid-owner {user}", not(*negated)),
            Self::Group(group, negated) => format!("-m owner {}--gid-owner {group}", not(*negated)),
        }
    }

    /// As nft has it. Of two families one is meant by an address, of protocols one by a port.
    fn json(&self) -> Value {
        let (left, right, negated) = match self {
            Self::From(net, negated) | Self::To(net, negated) => {
                let field = if matches!(self, Self::From(..)) { "saddr" } else { "daddr" };
                let prefix = json!({"prefix": {"addr": net.addr().to_string(), "len": net.prefix_len()}});
                (json!({"payload": {"protocol": "ip", "field": field}}), prefix, negated)
            }
            Self::Port(protocol, port, negated) => {
                (json!({"payload": {"protocol": protocol, "field": "dport"}}), json!(port), negated)
            }
            Self::Interface(name, negated) => {
                (json!({"meta": {"key": "iifname"}}), json!(name.replace('+', "*")), negated)
            }
            Self::Mark(mark, negated) => {
                (json!({"&": [{"meta": {"key": "mark"}}, mark]}), json!(mark), negated)
            }
            Self::User(user, negated) => (json!({"meta": {"key": "skuid"}}), json!(user), negated),
            Self::Group(group, negated) => (json!({"meta": {"key": "skgid"}}), json!(group), negated),
        };
        json!({"match": {"op": if *negated { "!=" } else { "==" }, "left": left, "right": right}})
    }

    fn holds(&self, packet: &Packet, mark: u32) -> bool {
        let interface = packet.interface.as_deref().unwrap_or("lo");
        match self {
            Self::From(net, negated) => net.contains(&packet.from.ip()) != *negated,
            Self::To(net, negated) => net.contains(&packet.to.ip()) != *negated,
            Self::Port(protocol, port, negated) => {
                packet.protocol == *protocol && (packet.to.port() == *port) != *negated
            }
            Self::Interface("eth+", negated) => interface.starts_with("eth") != *negated,
            Self::Interface(name, negated) => (interface == *name) != *negated,
            Self::Mark(value, negated) => (mark & value == *value) != *negated,
            Self::User(user, negated) => (packet.uid == *user) != *negated,
            Self::Group(group, negated) => (packet.gid == Some(group.to_string())) != *negated,
        }
    }
}

impl Rule {
    fn text(&self) -> String {
        let matches: Vec<_> = self.matches.iter().map(Match::text).collect();
        format!("-A {} {} {}", self.chain, matches.join(" "), self.target)
    }

    fn json(&self) -> Value {
        let set = |bit: u32| {
            json!({"mangle": {
                "key": {"meta": {"key": "mark"}},
                "value": {"|": [{"meta": {"key": "mark"}}, bit]},
            }})
        };
        let mut expressions: Vec<_> = self.matches.iter().map(Match::json).collect();
        expressions.extend(match self.target {
            "-j RETURN" => vec![json!({"return": null})],
            "-j ACCEPT" => vec![json!({"accept": null})],
            "-j DROP" => vec![json!({"drop": null})],
            "-j MARK --set-xmark 0x10/0x10" => vec![set(0x10)],
            "-j MARK --set-xmark 0x1/0x1" => vec![set(1)],
            TPROXY => vec![
                json!({"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}),
                json!({"tproxy": {"port": 7}}),
                set(1),
                json!({"accept": null}),
            ],
            jump if jump.starts_with("-g") => vec![json!({"goto": {"target": &jump[3..]}})],
            jump => vec![json!({"jump": {"target": &jump[3..]}})],
        });
        json!({"rule": {"family": "ip", "table": "t", "chain": self.chain, "handle": 1, "expr": expressions}})
    }
}

/// The rules as `nft -j list ruleset` has them.
fn nft(rules: &[Rule]) -> String {
    let base = |name: &str, hook: &str| {
        json!({"chain": {
            "family": "ip", "table": "t", "name": name, "handle": 1,
            "type": "filter", "hook": hook, "prio": -150, "policy": "accept",
        }})
    };
    let mut items = vec![base("PREROUTING", "prerouting"), base("OUTPUT", "output")];
    items.extend(rules.iter().map(Rule::json));
    json!({"nftables": items}).to_string()
}

/// The rules as iptables-save has them.
fn iptables(rules: &[Rule]) -> String {
    let ends = ["A", "B", "C", "D"].map(|chain| format!("-A {chain} -j RETURN"));
    let lines: Vec<_> = rules.iter().map(Rule::text).chain(ends).collect();
    table("mangle", &lines.iter().map(|line| &**line).collect::<Vec<_>>())
}

/// How a chain is left.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Proxy,
    Drop,
    Accept,
    Return,
}

fn walk(rules: &[Rule], chain: &str, packet: &Packet, mark: &mut u32) -> End {
    for rule in rules.iter().filter(|rule| rule.chain == chain) {
        if !rule.matches.iter().all(|one| one.holds(packet, *mark)) {
            continue;
        }
        let end = match rule.target {
            "-j RETURN" => return End::Return,
            "-j ACCEPT" => return End::Accept,
            "-j DROP" => return End::Drop,
            "-j MARK --set-xmark 0x10/0x10" => {
                *mark |= 0x10;
                continue;
            }
            "-j MARK --set-xmark 0x1/0x1" => {
                *mark |= 1;
                continue;
            }
            TPROXY if packet.protocol == "tcp" => return End::Proxy,
            TPROXY => continue,
            jump => walk(rules, &jump[3..], packet, mark),
        };
        if end != End::Return || rule.target.starts_with("-g") {
            return end;
        }
    }
    End::Return
}

fn expected(rules: &[Rule], packet: &Packet) -> &'static str {
    let mut mark = 0;
    if packet.interface.is_none() {
        match walk(rules, "OUTPUT", packet, &mut mark) {
            End::Drop => return "drop",
            _ if mark & 1 == 0 => return "pass",
            _ => {}
        }
    }
    match walk(rules, "PREROUTING", packet, &mut mark) {
        End::Proxy => "proxy",
        End::Drop => "drop",
        End::Accept | End::Return => "pass",
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn packets_fare_as_in_the_chains(
        arriving in prop::collection::vec(rule(ARRIVING, false), 1..8),
        own in prop::collection::vec(rule(OWN, true), 0..8),
        packets in prop::collection::vec(packet(), 30),
    ) {
        let mut rules = arriving;
        rules.extend(own);
        for text in [iptables(&rules), nft(&rules)] {
            let judge = match import(&text) {
                Ok(imported) => {
                    prop_assert!(imported.lost.is_empty(), "{:?}", imported.lost);
                    Some(Judge::new(&imported.toml))
                }
                Err(Error::Nothing(_)) => None,
                Err(error) => panic!("{error}"),
            };
            for packet in &packets {
                let own = packet.interface.is_none();
                let mut expected = expected(&rules, packet);
                // Where nothing is proxied nothing is captured, and rules that drop stay in force.
                if expected == "drop" && !judge.as_ref().is_some_and(|judge| judge.captures(own)) {
                    expected = "pass";
                }
                let fares = judge.as_ref().map_or_else(|| "pass".to_owned(), |judge| judge.judge(packet));
                prop_assert_eq!(&fares, expected, "{:?}\n{}", packet, text);
            }
        }
    }
}

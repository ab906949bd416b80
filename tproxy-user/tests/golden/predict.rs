//! What userspace's parser and classification say of a packet that a program
//! sees first, when nothing is known of any flow.

use tproxy_common::abi::{FlowKey, Origin, Settings, TCP, UDP, Verdict, program};
use tproxy_common::classify::{is_special, on_the_wire, segments};
use tproxy_common::flow::tcp_seen;
use tproxy_common::policy::Known;
use tproxy_common::wire::{Fragment, Packet, Skip, parse_v4, parse_v6};

use tproxy_user::config::Scope;
use tproxy_user::policy::compile::{RuleSet, compile};
use tproxy_user::policy::facts::{self, Memory};

use crate::corpus::Case;
use crate::kernel::{Context, PASS, REDIRECTED, STEERED};
use crate::packets::ETHERNET;

/// What is to be seen after a program has run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) action: i32,
    pub(crate) mark: u32,
    /// Those that rose by one, in the order of the map.
    pub(crate) counters: Vec<&'static str>,
    pub(crate) flow: Option<SeenFlow>,
    /// What was put before the packet; `None` where it was changed otherwise.
    pub(crate) added: Option<Vec<u8>>,
}

/// What is compared of an entry of the flow table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SeenFlow {
    pub(crate) key: FlowKey,
    pub(crate) verdict: u8,
    pub(crate) origin: u8,
    pub(crate) packets_up: u64,
    pub(crate) bytes_up: u64,
    pub(crate) seen_up: u8,
}

/// The model: settings and rules.
pub(crate) struct Model {
    pub(crate) settings: Settings,
    pub(crate) rules: RuleSet,
    image: Memory,
}

/// Parses a frame, as a program does: by the type in its Ethernet header.
pub(crate) fn parse(frame: &[u8]) -> Result<Packet, Skip> {
    let network = &frame[ETHERNET..];
    match frame[12..14] {
        [0x08, 0x00] => parse_v4(&network),
        [0x86, 0xdd] => parse_v6(&network),
        _ => Err(Skip::Protocol),
    }
}

/// A frame that is not longer than its IP packet has no Ethernet header: this is the one that it gets.
fn for_loopback(frame: &[u8], packet: &Packet) -> Vec<u8> {
    if packet.ip_len == 0 || frame.len() > packet.ip_len as usize {
        return Vec::new();
    }
    [&[0; 12], &frame[12..14]].concat()
}

fn counter(skip: Skip) -> &'static str {
    match skip {
        Skip::Protocol => "pass_protocol",
        Skip::Truncated => "truncated",
        Skip::Malformed => "malformed",
    }
}

impl Model {
    pub(crate) fn new(settings: &Settings, scope: &Scope) -> Self {
        let rules = scope.rules();
        let image = Memory(compile(&rules).expect("few rules"));
        Self { settings: *settings, rules, image }
    }

    /// What a program does with a packet.
    pub(crate) fn predict(&self, name: &str, case: &Case) -> Seen {
        match name {
            program::CAPTURE => admitted(case, |case, packet| self.capture(case, packet)),
            program::UPLINK => admitted(case, uplink),
            program::REPLY => pass(case, &[]),
            program::OWN => self.own(case),
            program::LOOPBACK => self.loopback(case),
            other => panic!("no model of {other}"),
        }
    }

    fn capture(&self, case: &Case, packet: &Packet) -> Seen {
        let opens = packet.protocol == UDP || packet.is_syn();
        let captured = opens && self.captures(packet);
        match packet.fragment {
            Fragment::Whole if !opens => pass(case, &["pass_midstream"]),
            Fragment::Whole if captured => Seen {
                flow: Some(flow(case, packet, true, Origin::Captured)),
                ..self.steered(case, &["assign_eopnotsupp", "flows_created"])
            },
            Fragment::First if captured => Seen {
                flow: Some(flow(case, packet, true, Origin::Captured)),
                ..self.steered(case, &["steered_fragment", "flows_created"])
            },
            Fragment::Whole | Fragment::First => Seen {
                flow: Some(flow(case, packet, false, Origin::Captured)),
                ..pass(case, &["pass_policy", "flows_created"])
            },
            Fragment::Later if self.captures(packet) => {
                self.steered(case, &["steered_fragment", "fragment_unknown"])
            }
            Fragment::Later => pass(case, &["pass_policy", "fragment_unknown"]),
        }
    }

    fn own(&self, case: &Case) -> Seen {
        let Ok(packet) = parse(&case.frame) else { return pass(case, &[]) };
        if case.context.mark & self.settings.own_mark == self.settings.own_mark {
            return pass(case, &["pass_own_mark"]);
        }
        if has_special(&packet) {
            return pass(case, &["pass_special"]);
        }
        if packet.fragment == Fragment::Later {
            return pass(case, &["fragment_unknown"]);
        }
        if packet.protocol == TCP && !packet.is_syn() {
            return pass(case, &["pass_midstream"]);
        }
        let captured = self.captures(&packet);
        let flow = Some(flow(case, &packet, captured, Origin::Own));
        if captured {
            let left = pass(case, &["own_redirected", "flows_created"]);
            Seen { action: REDIRECTED, flow, added: Some(for_loopback(&case.frame, &packet)), ..left }
        } else {
            Seen { flow, ..pass(case, &["pass_policy", "flows_created"]) }
        }
    }

    fn loopback(&self, case: &Case) -> Seen {
        let packet = match parse(&case.frame) {
            Err(skip) => return pass(case, &[counter(skip)]),
            Ok(packet) if is_special(&packet.destination, packet.family) => {
                return pass(case, &["pass_special"]);
            }
            Ok(packet) => packet,
        };
        let steered = self.steered(
            case,
            if packet.fragment != Fragment::Whole {
                &["steered_fragment"]
            } else if packet.protocol == UDP || packet.is_syn() {
                &["assign_eopnotsupp"]
            } else {
                &["steered_late"]
            },
        );
        Seen { mark: steered.mark | self.settings.own_mark, ..steered }
    }

    fn steered(&self, case: &Case, counters: &[&'static str]) -> Seen {
        let mark = case.context.mark & !self.settings.mark_mask | self.settings.mark_value;
        Seen { action: STEERED, mark, ..pass(case, counters) }
    }

    fn captures(&self, packet: &Packet) -> bool {
        let known = [Known::Is((packet.source_port, packet.destination_port))];
        let unknown = [Known::Absent, Known::Unknown];
        let ports: &[_] = if packet.fragment == Fragment::Later { &unknown } else { &known };
        ports.iter().any(|ports| {
            let seen = facts::Packet {
                family: packet.family,
                source: packet.source,
                destination: packet.destination,
                ports: *ports,
                protocol: packet.protocol,
                ..facts::Packet::EMPTY
            };
            self.image.decide(&seen).0 == Verdict::Proxy as u32
        })
    }
}

/// The checks of both ingress sides that need no lookup.
fn admitted(case: &Case, decide: impl FnOnce(&Case, &Packet) -> Seen) -> Seen {
    if case.frame[..6] != [0; 6] {
        return pass(case, &["pass_not_for_us"]);
    }
    match parse(&case.frame) {
        Err(skip) => pass(case, &[counter(skip)]),
        Ok(packet) if has_special(&packet) => pass(case, &["pass_special"]),
        Ok(packet) => decide(case, &packet),
    }
}

fn uplink(case: &Case, packet: &Packet) -> Seen {
    pass(
        case,
        match packet.fragment {
            Fragment::Whole => &["pass_no_socket"],
            Fragment::First => &["pass_policy"],
            Fragment::Later => &["pass_policy", "fragment_unknown"],
        },
    )
}

fn pass(case: &Case, counters: &[&'static str]) -> Seen {
    Seen {
        action: PASS,
        mark: case.context.mark,
        counters: counters.to_vec(),
        flow: None,
        added: Some(Vec::new()),
    }
}

fn has_special(packet: &Packet) -> bool {
    [&packet.source, &packet.destination].into_iter().any(|address| is_special(address, packet.family))
}

fn flow(case: &Case, packet: &Packet, proxied: bool, origin: Origin) -> SeenFlow {
    let ip_len = match packet.ip_len {
        0 => u32::try_from(case.frame.len() - ETHERNET).expect("short"),
        len => len,
    };
    let Context { gso_segs, gso_size, .. } = case.context;
    let header_len = u32::from(packet.header_len);
    let count = segments(ip_len, header_len, gso_segs, gso_size);
    let (packets_up, bytes_up) = on_the_wire(ip_len, header_len, count);
    SeenFlow {
        key: FlowKey::up(
            packet.protocol,
            packet.source,
            packet.destination,
            packet.source_port,
            packet.destination_port,
        ),
        verdict: if proxied { Verdict::Proxy } else { Verdict::Pass } as u8,
        origin: origin as u8,
        packets_up,
        bytes_up,
        seen_up: packet.tcp_flags & tcp_seen::ALL,
    }
}

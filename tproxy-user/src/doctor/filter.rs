//! Packet filter, NAT, connection tracking.

use crate::config::Mark;

use super::facts::Facts;
use super::nft::{Certainty, Effect, Found, Packet, RULES};
use super::{Finding, Level};

/// Follows captured packets, and those of the proxy, through the rules of others.
pub(super) fn rules_of_others(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "packet-filter";
    let rules = match &facts.nft {
        Ok(rules) => rules,
        Err(why) => {
            return vec![Finding::warn(ID, format!("nft and iptables-nft rules: not checked ({why})"))];
        }
    };
    let mut findings = Vec::new();
    for (hook, packet) in packets(facts) {
        for found in rules.follow(hook, &packet) {
            let finding = judge(facts, hook, &packet, &found);
            findings.extend(finding.filter(|finding| !findings.contains(finding)));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(ID, "no nft or iptables-nft rule drops or changes captured packets"));
    }
    findings
}

/// One of each kind that a run would have.
fn packets(facts: &Facts) -> Vec<(&'static str, Packet<'_>)> {
    let capture = &facts.config.capture;
    let mut packets = Vec::new();
    for v6 in [(false, capture.scope.v4), (true, facts.plan.ipv6)]
        .into_iter()
        .filter_map(|(v6, on)| on.then_some(v6))
    {
        for protocol in [("tcp", capture.scope.tcp), ("udp", capture.scope.udp)]
            .into_iter()
            .filter_map(|(p, on)| on.then_some(p))
        {
            let base = Packet { v6, protocol, sources: &facts.clients, ..Packet::default() };
            for interface in facts.captured() {
                let packet = Packet {
                    iif: &interface.name,
                    mark: facts.config.steering.mark.value,
                    state: "new",
                    ..base
                };
                packets.extend(incoming(packet));
            }
            for uplink in facts.uplinks() {
                if facts.keeps_client() {
                    let mark = facts.config.steering.mark.value;
                    let packet = Packet { iif: uplink, mark, state: "established", sources: &[], ..base };
                    packets.extend(incoming(packet));
                }
                let sources = if facts.keeps_client() { base.sources } else { &[] };
                let packet = Packet {
                    oif: uplink,
                    mark: facts.config.steering.own_mark,
                    state: "new",
                    sources,
                    ..base
                };
                packets.extend(["output", "postrouting", "egress"].map(|hook| (hook, packet)));
            }
        }
    }
    packets
}

/// The hooks that a packet passes after our program at TC has marked it:
/// `__netif_receive_skb_core()` asks TC first, then the ingress hook. There,
/// before connection tracking, every packet is `invalid` (`nft_ct_get_eval()`).
fn incoming(packet: Packet<'_>) -> [(&'static str, Packet<'_>); 3] {
    let untracked = Packet { state: "invalid", ..packet };
    [("ingress", untracked), ("prerouting", packet), ("input", packet)]
}

/// Accepts what the proxy sends: it has its own mark, and no other.
pub(super) fn accept_own(facts: &Facts, found: &Found) -> String {
    found.chain.accept(Mark { value: facts.config.steering.own_mark, mask: u32::MAX })
}

fn judge(facts: &Facts, hook: &str, packet: &Packet<'_>, found: &Found) -> Option<Finding> {
    let (chain, certain) = (found.chain.describe(), found.certainty == Certainty::Certain);
    let doubt = if certain { "" } else { "may " };
    let mark = facts.config.steering.mark;
    let incoming = matches!(hook, "ingress" | "prerouting" | "input");
    let whose = if incoming { "captured packets" } else { "what the proxy sends" };
    let accept = if incoming { found.chain.accept(mark) } else { accept_own(facts, found) };
    let finding = |level, id, text: String| Some(Finding::new(id, level, text));
    let level = if certain { Level::Fail } else { Level::Warn };
    match found.effect {
        // A rule for some ports or addresses is meant so.
        Effect::Drop if found.certainty == Certainty::Possible => None,
        Effect::Drop => {
            let at = if incoming { packet.iif } else { packet.oif };
            let unless = if certain {
                ""
            } else {
                ", unless they are let pass by what cannot be told here: a match of iptables, a named map, the devices of the chain"
            };
            let text = format!("{chain} drops {whose} ({at}){unless}");
            finding(level, "packet-filter", text).map(|finding| finding.mend(accept))
        }
        Effect::MarkLost if matches!(hook, "ingress" | "prerouting") => {
            let text = format!(
                "{chain} {doubt}write{} over mark {mark}, by which captured packets are delivered here",
                if certain { "s" } else { "" }
            );
            finding(level, "mark", text).map(|finding| finding.mend(accept))
        }
        Effect::Rewrite if hook == "ingress" || (hook == "prerouting" && packet.state == "new") => {
            let text = format!(
                "{chain} {doubt}send{} captured packets elsewhere (dnat, redirect, tproxy or fwd), so that their destination is lost",
                if certain { "s" } else { "" }
            );
            finding(level, "dnat", text).map(|finding| finding.mend(accept))
        }
        Effect::SourceNat if hook == "postrouting" && facts.keeps_port() => {
            let text = format!(
                "{chain} {doubt}masquerade{} what the proxy sends ({}); with a client's own port that works only where the client's half is not tracked",
                if certain { "s" } else { "" },
                packet.oif
            );
            finding(Level::Warn, "nat", text).map(|finding| finding.mend("--source client"))
        }
        // REJECT before anything else, MARK and DNAT, MASQUERADE: where each would matter.
        Effect::Untold
            if match hook {
                "prerouting" => true,
                "postrouting" => facts.keeps_port(),
                _ => certain,
            } =>
        {
            let text = format!(
                "{chain} has a target of iptables that this nft does not name (before 1.0.6), so what it does to {whose} is not judged; look with iptables-save and ip6tables-save"
            );
            finding(Level::Warn, "packet-filter", text)
        }
        Effect::Unfinished => {
            let text = format!(
                "{chain} is followed for {RULES} rules only, each as often as it is jumped to: what those after do to {whose} is not judged"
            );
            finding(Level::Warn, "packet-filter", text)
        }
        Effect::MarkLost | Effect::Rewrite | Effect::SourceNat | Effect::Untold => None,
    }
}

/// Two entries a proxied connection: one on each side.
pub(super) fn conntrack(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "conntrack";
    let Some((count, max)) = facts.conntrack else { return Vec::new() };
    if count >= max / 10 * 9 {
        let text = format!(
            "the table of connections is nearly full ({count} of {max}): packets of new ones are dropped then; a proxied connection takes two entries"
        );
        return vec![
            Finding::warn(ID, text)
                .mend(format!("sysctl -w net.netfilter.nf_conntrack_max={}", max.max(count) * 2)),
        ];
    }
    vec![Finding::ok(ID, format!("{count} of {max} connections are tracked"))]
}

/// Rules of the older kind, which nft does not show.
pub(super) fn legacy(facts: &Facts) -> Vec<Finding> {
    if facts.legacy.is_empty() {
        return Vec::new();
    }
    let tables = facts.legacy.join(", ");
    vec![Finding::warn(
        "iptables-legacy",
        format!(
            "tables of iptables-legacy are in use ({tables}): not checked; look with iptables-legacy-save for DROP in INPUT and for MASQUERADE"
        ),
    )]
}

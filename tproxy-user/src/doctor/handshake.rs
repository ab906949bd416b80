//! What `--handshake faithful` needs.

use crate::config::Handshake;

use super::Finding;
use super::facts::{Facts, TunDriver};
use super::filter::accept_own;
use super::nft::{Certainty, Effect, Packet};

fn is_faithful(facts: &Facts) -> bool {
    facts.config.steering.handshake == Handshake::Faithful
}

/// The driver of the device that SYNs wait in.
pub(super) fn tun(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "tun";
    if !is_faithful(facts) {
        return Vec::new();
    }
    vec![match &facts.tun {
        TunDriver::Usable => Finding::ok(ID, "a tun device can be made for --handshake faithful"),
        TunDriver::Absent(why) => Finding::fail(ID, why).mend("modprobe tun"),
        TunDriver::Refused(why) => Finding::fail(ID, why),
    }]
}

/// Resets and ICMP errors in answer to a SYN that was set aside: connection
/// tracking has not seen the SYN, so to it they are `invalid`.
pub(super) fn answers(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "handshake";
    let (true, Ok(rules)) = (is_faithful(facts), &facts.nft) else { return Vec::new() };
    let mut findings = Vec::new();
    for interface in facts.captured() {
        let families = [(facts.config.capture.scope.v4, false), (facts.plan.ipv6, true)];
        for v6 in families.into_iter().filter_map(|(on, v6)| on.then_some(v6)) {
            let reset = Packet {
                v6,
                protocol: "tcp",
                oif: &interface.name,
                mark: facts.config.steering.own_mark,
                state: "invalid",
                ..Packet::default()
            };
            let found = ["output", "postrouting", "egress"].map(|hook| rules.follow(hook, &reset));
            let dropped = found.into_iter().flatten().filter(|found| found.effect == Effect::Drop);
            for found in dropped.filter(|found| found.certainty != Certainty::Possible) {
                let (chain, name) = (found.chain.describe(), &interface.name);
                let may = if found.certainty == Certainty::Certain { "drops" } else { "may drop" };
                let text = format!(
                    "{chain} {may} what is no part of a tracked connection, as resets in answer to a client's SYN are ({name}): \
                     a server that refuses looks as one that does not answer"
                );
                let finding = Finding::warn(ID, text).mend(accept_own(facts, &found));
                if !findings.contains(&finding) {
                    findings.push(finding);
                }
            }
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(ID, "no nft or iptables-nft rule drops the answers to clients' SYNs"));
    }
    findings
}

//! Programs of others on the way of a packet.

use crate::datapath::features::Features;

use super::Finding;
use super::facts::Facts;

fn tcx(facts: &Facts) -> bool {
    use crate::config::Attach;
    facts.config.steering.attach != Attach::Clsact
        && facts.kernel.and_then(|kernel| Features::of(kernel).ok()).is_some_and(Features::tcx)
}

/// An `ingress` qdisc keeps clsact out.
pub(super) fn ingress_qdisc(facts: &Facts) -> Vec<Finding> {
    let kept_out = facts.hooks.iter().filter(|hook| hook.ingress_qdisc && !tcx(facts));
    kept_out
        .map(|hook| {
            let name = &hook.interface;
            Finding::fail("qdisc", format!("{name} has an ingress qdisc, which keeps clsact out"))
                .mend(format!("tc qdisc del dev {name} ingress"))
        })
        .collect()
}

/// Programs that decide before ours.
pub(super) fn programs(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "tc-programs";
    let mut findings = Vec::new();
    for hook in &facts.hooks {
        let name = &hook.interface;
        let Some(before) = &hook.tcx else {
            findings.push(Finding::warn(
                ID,
                format!("{name}: tcx programs of others: not checked (needs CAP_NET_ADMIN)"),
            ));
            continue;
        };
        // tcx programs run before all filters.
        let filters = if tcx(facts) { &[][..] } else { &hook.filters[..] };
        let others: Vec<_> = before.iter().chain(filters).cloned().collect();
        if !others.is_empty() {
            findings.push(Finding::warn(
                ID,
                format!("{name}: {} of another runs before ours; packets that it drops, redirects or accepts for good are not captured", others.join(", ")),
            ));
        }
    }
    if findings.is_empty() {
        vec![Finding::ok(ID, "no program of another decides before ours")]
    } else {
        findings
    }
}

/// XDP sees packets before TC does.
pub(super) fn xdp(facts: &Facts) -> Vec<Finding> {
    let with = facts.hooks.iter().filter(|hook| hook.xdp);
    with.map(|hook| {
        let name = &hook.interface;
        Finding::warn(
            "xdp",
            format!(
                "{name} has an XDP program; packets that it drops, redirects or answers are not captured"
            ),
        )
    })
    .collect()
}

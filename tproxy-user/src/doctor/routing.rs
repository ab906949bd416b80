//! Rules and routes that decide where a marked packet goes.

use super::Finding;
use super::facts::Facts;

/// The local route needs lo.
pub(super) fn loopback(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "loopback";
    if facts.host.interfaces.iter().any(|interface| interface.loopback && interface.up) {
        return vec![Finding::ok(ID, "lo is up")];
    }
    vec![Finding::fail(ID, "lo is down, so nothing can be delivered to this host").mend("ip link set lo up")]
}

/// Table and mark are this instance's own.
pub(super) fn table_and_mark(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "table-and-mark";
    let steering = &facts.config.steering;
    let Some(conflict) = &facts.conflict else {
        return vec![Finding::ok(
            ID,
            format!("table {} and mark {} are free", steering.table, steering.mark),
        )];
    };
    let finding = Finding::fail(ID, conflict);
    vec![match &facts.alternative {
        Some(flags) => finding.mend(flags),
        None => finding,
    }]
}

/// Rules before ours that would route a marked packet elsewhere.
pub(super) fn earlier_rules(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "rule-order";
    let own = facts.config.steering.rule_priority;
    let mark = facts.config.steering.mark;
    let families = [(false, facts.config.capture.scope.v4), (true, facts.plan.ipv6)];
    let concerns = |v6: bool, iif: Option<&str>| {
        families.contains(&(v6, true))
            && iif.is_none_or(|iif| facts.plan.interfaces.iter().any(|interface| interface.name == iif))
    };
    let findings: Vec<_> = facts
        .earlier
        .iter()
        .filter(|rule| concerns(rule.v6, rule.iif.as_deref()))
        // One that asks for another value of our bits never sees a marked packet.
        .filter(|rule| {
            rule.inverted
                || rule.mark.is_none_or(|other| (other.value ^ mark.value) & other.mask & mark.mask == 0)
        })
        .map(|rule| {
            let text = format!("the rule '{}' comes before ours (priority {own})", rule.text);
            let asks_no_more = rule.mark.is_none_or(|other| other.mask & !mark.mask == 0);
            let certain = !rule.narrow && !rule.inverted && asks_no_more;
            let finding = if certain {
                Finding::fail(
                    ID,
                    format!("{text} and catches captured packets: they would be routed on, and lost"),
                )
            } else {
                Finding::warn(ID, format!("{text}: captured packets that it matches would be lost"))
            };
            let first = facts.earlier.iter().map(|rule| rule.priority).min().unwrap_or(own);
            match first.checked_sub(1).filter(|before| *before > 0) {
                Some(before) => finding.mend(format!("--rule-priority {before}")),
                None => finding,
            }
        })
        .collect();
    if findings.is_empty() {
        return vec![Finding::ok(
            ID,
            format!("no rule before ours (priority {own}) catches captured packets"),
        )];
    }
    findings
}

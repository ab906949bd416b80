//! The interfaces that were named, and the settings of the host around them.

use crate::config::SourceMode;
use crate::interfaces::Interface;

use super::Finding;
use super::facts::Facts;

/// Each `--iface`: there, up, and the place where packets are routed.
pub(super) fn named(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "interface";
    let mut findings = Vec::new();
    for name in &facts.plan.missing {
        let names: Vec<_> =
            facts.host.interfaces.iter().filter(|other| !other.loopback).map(|other| &*other.name).collect();
        findings.push(Finding::fail(ID, format!("there is no {name}; there are: {}", names.join(", "))));
    }
    for refused in &facts.plan.refused {
        let finding = Finding::fail(ID, refused);
        // The one that carries the addresses is named at the end.
        let instead = refused.rsplit_once("--iface ").filter(|(before, _)| before.ends_with("name that: "));
        findings.push(match instead {
            Some((_, name)) => finding.mend(format!("--iface {name}")),
            None => finding,
        });
    }
    for interface in facts.captured() {
        let name = &interface.name;
        findings.push(if interface.up {
            Finding::ok(ID, format!("{name} is up"))
        } else {
            Finding::fail(ID, format!("{name} is down")).mend(format!("ip link set {name} up"))
        });
    }
    if findings.is_empty() && !facts.config.capture.interfaces.is_empty() {
        let globs = facts.config.capture.interfaces.join(", ");
        findings.push(Finding::warn(
            ID,
            format!("no interface matches {globs} yet; one that comes later is captured"),
        ));
    }
    findings
}

/// Packets arrive where the host has an address or a route.
pub(super) fn addresses(facts: &Facts) -> Vec<Finding> {
    let without =
        |interface: &&Interface| interface.up && interface.addresses.is_empty() && !interface.routed;
    facts
        .captured()
        .filter(without)
        .map(|interface| {
            let name = &interface.name;
            Finding::warn(
                "address",
                format!("{name} has no address and no route: no client can use this host as its gateway there; is it the right one?"),
            )
        })
        .collect()
}

/// Frames with a VLAN tag belong to the VLAN device.
pub(super) fn trunks(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for interface in facts.captured() {
        for vlan in facts.links.iter().filter(|link| link.vlan && link.parent == Some(interface.index)) {
            let Some(device) = facts.host.by_index(vlan.index) else { continue };
            if facts.captured().any(|captured| captured.index == device.index) {
                continue;
            }
            let (trunk, name) = (&interface.name, &device.name);
            findings.push(
                Finding::warn(
                    "vlan",
                    format!("{trunk} is a trunk: frames of the VLAN device {name} pass and are not captured"),
                )
                .mend(format!("--iface {name}")),
            );
        }
    }
    findings
}

/// IPv6 on the loopback device, where packets are delivered, and on the captured ones.
pub(super) fn ipv6(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "ipv6";
    if !facts.config.capture.scope.v6 {
        return Vec::new();
    }
    if !facts.host.ipv6 {
        return vec![
            Finding::warn(ID, "IPv6 is off on lo, so IPv4 alone is captured")
                .mend("sysctl -w net.ipv6.conf.lo.disable_ipv6=0"),
        ];
    }
    let off: Vec<_> =
        facts.captured().filter(|i| facts.without_ipv6.contains(&i.name)).map(|i| &i.name).collect();
    if off.is_empty() {
        return vec![Finding::ok(ID, "enabled")];
    }
    off.into_iter()
        .map(|name| {
            Finding::warn(ID, format!("IPv6 is off on {name}: clients have none through this host"))
                .mend(format!("sysctl -w net/ipv6/conf/{name}/disable_ipv6=0"))
        })
        .collect()
}

/// What is passed is forwarded by the kernel.
pub(super) fn forwarding(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "forwarding";
    if facts.config.capture.interfaces.is_empty() {
        return Vec::new();
    }
    let families = [
        (facts.config.capture.scope.v4, "IPv4", facts.forwards.0, "net.ipv4.ip_forward"),
        (facts.plan.ipv6, "IPv6", facts.forwards.1, "net.ipv6.conf.all.forwarding"),
    ];
    families
        .into_iter()
        .filter(|(wanted, ..)| *wanted)
        .map(|(_, family, on, sysctl)| {
            if on {
                Finding::ok(ID, format!("{family}: what is passed is forwarded"))
            } else {
                Finding::warn(ID, format!("{family} forwarding is off: what is captured works, what is passed (other protocols, --not-to …) is lost"))
                    .mend(format!("sysctl -w {sysctl}=1"))
            }
        })
        .collect()
}

/// What has broken other transparent proxies and does not break this one.
pub(super) fn harmless(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![Finding::ok(
        "reverse-path",
        "rp_filter and src_valid_mark may be as they are: the rules are bound to interfaces",
    )];
    if facts.bridge_filter && facts.captured().any(|interface| interface.kind == "bridge") {
        findings.push(Finding::ok(
            "bridge-filter",
            "bridge-nf-call-iptables=1 does no harm: packets are captured behind it",
        ));
    }
    findings
}

/// The host's own packets come back in by lo.
pub(super) fn own_traffic(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "own-traffic";
    if !facts.config.capture.own_traffic || !facts.config.capture.scope.v4 {
        return Vec::new();
    }
    if facts.accept_local.0 == "1" {
        vec![Finding::ok(ID, "net.ipv4.conf.lo.accept_local is 1")]
    } else if facts.accept_local.1 {
        vec![Finding::ok(ID, "net.ipv4.conf.lo.accept_local is set while it runs")]
    } else {
        let text = "net.ipv4.conf.lo.accept_local is 0 and /proc/sys cannot be written here: own IPv4 traffic would be dropped; set it from outside";
        vec![Finding::fail(ID, text).mend("sysctl -w net.ipv4.conf.lo.accept_local=1")]
    }
}

impl Facts {
    /// Whether servers see another address than the proxy's.
    pub(super) fn keeps_client(&self) -> bool {
        self.config.source != SourceMode::Proxy
    }

    /// Whether servers see the client's port as well.
    pub(super) fn keeps_port(&self) -> bool {
        self.config.source == SourceMode::ClientPort
    }
}

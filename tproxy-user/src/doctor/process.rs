//! Kernel, privileges, limits, ports, other runs.

use crate::config::{Attach, Handshake, Kernel};
use crate::datapath::features::Features;
use crate::datapath::group;
use crate::privilege;

use super::Finding;
use super::facts::{BpfFs, Facts};

/// To raise limits (include/uapi/linux/capability.h).
const SYS_RESOURCE: u32 = 24;
/// Descriptors for all but traffic: workers, maps, programs.
const OTHER_FILES: u64 = 1024;

/// The version, and what is missing before a later one.
pub(super) fn kernel(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "kernel";
    let Some(kernel) = facts.kernel else {
        return vec![Finding::warn(ID, "the kernel's release is not a version: not checked")];
    };
    if !facts.steers() {
        return vec![Finding::ok(ID, format!("Linux {kernel}"))];
    }
    let features = match Features::of(kernel) {
        Ok(features) => features,
        Err(failure) => {
            let text =
                format!("{failure}; the relay alone works behind TPROXY rules of yours, with --steer none");
            return vec![Finding::fail(ID, text)];
        }
    };
    let refused = refused(facts, features);
    if !refused.is_empty() {
        return refused
            .into_iter()
            .map(|(lacks, mend)| Finding {
                mend,
                ..Finding::fail(ID, format!("Linux {kernel} has no {lacks}"))
            })
            .collect();
    }
    let lacks: Vec<_> = [
        (features.listeners_from_tc(), "listeners are looked up by port, and --bpf-log does not work (5.8)"),
        (
            features.sk_lookup(),
            "fragmented datagrams are forwarded and a client port reused at once costs a retry (5.9)",
        ),
    ]
    .into_iter()
    .filter_map(|(has, without)| (!has).then_some(without))
    .collect();
    if !lacks.is_empty() {
        let text = format!("Linux {kernel} works; for want of a later one {}", lacks.join("; "));
        return vec![Finding::warn(ID, text)];
    }
    let hook = if features.tcx() { "tcx links" } else { "filters on a clsact qdisc (tcx comes with 6.6)" };
    vec![Finding::ok(
        ID,
        format!("Linux {kernel}: bpf_sk_assign, socket maps, sk_lookup; programs attach as {hook}"),
    )]
}

/// What is asked for and the kernel lacks, so that `run` would not start; and flags to do without.
fn refused(facts: &Facts, features: Features) -> Vec<(&'static str, Option<String>)> {
    let steering = &facts.config.steering;
    [
        (steering.attach == Attach::Tcx && !features.tcx(), "tcx links (6.6)", Some("--attach auto")),
        (
            steering.handshake == Handshake::Faithful && !features.link_headers(),
            "link-layer headers for packets from a tun device, which --handshake faithful needs (5.8)",
            Some("--handshake eager"),
        ),
        (
            facts.plan.notes_groups && !features.socket_notes(),
            "notes at sockets, which rules with `gid` need (5.9): leave those out",
            None,
        ),
        (
            steering.bpf_log && !features.ring_buffer(),
            "ring buffer, which --bpf-log needs (5.8): leave that out",
            None,
        ),
    ]
    .into_iter()
    .filter(|(lacks, ..)| *lacks)
    .map(|(_, what, mend)| (what, mend.map(str::to_owned)))
    .collect()
}

/// The capabilities, each by name.
pub(super) fn capabilities(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "capabilities";
    let kernel = facts.kernel.unwrap_or(privilege::OLDEST);
    let missing = privilege::missing(&facts.config, kernel, facts.capabilities);
    if missing.is_empty() {
        return vec![Finding::ok(ID, "all that is needed")];
    }
    missing
        .into_iter()
        .map(|what| {
            Finding::fail(
                ID,
                format!("missing {what}; run as root, or give them to the service (AmbientCapabilities=)"),
            )
        })
        .collect()
}

/// Descriptors for as many connections as are asked for.
pub(super) fn open_files(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "open-files";
    let limits = &facts.config.limits;
    // Two a connection, one a UDP flow.
    let needed = u64::from(limits.connections) * 2 + u64::from(limits.udp_flows) + OTHER_FILES;
    let has = facts.open_files;
    if has >= needed {
        return vec![Finding::ok(ID, format!("up to {has} open files"))];
    }
    let text = format!(
        "the hard limit of {has} open files is less than {needed}, which --max-connections {} and --max-udp-flows {} need: \
         connections wait once it is reached (in the unit: LimitNOFILE={needed})",
        limits.connections, limits.udp_flows
    );
    let finding = Finding::warn(ID, text);
    vec![if facts.has_capability(SYS_RESOURCE) {
        finding.mend(format!("ulimit -n {needed}"))
    } else if has > 2 * OTHER_FILES {
        let udp = u64::from(limits.udp_flows).min(has / 8);
        let connections = (has - OTHER_FILES - udp) / 2;
        finding.mend(format!("--max-connections {connections} --max-udp-flows {udp}"))
    } else {
        finding
    }]
}

/// The listeners' port.
pub(super) fn ports(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "port";
    let port = facts.config.steering.on_port;
    if facts.taken.is_empty() {
        return vec![Finding::ok(ID, format!("{port} is free for the listeners"))];
    }
    facts
        .taken
        .iter()
        .map(|(socket, owner)| {
            Finding::fail(ID, format!("{socket} is taken by {owner}"))
                .mend(format!("--on-port {}", facts.free_port))
        })
        .collect()
}

/// A run with the same pin directory: one that goes on, or one that was killed.
pub(super) fn instance(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "instance";
    let pin = facts.config.pin.display();
    if let Some(pid) = facts.running {
        let text = format!(
            "an instance with --pin {pin} runs as pid {pid}: if that is the one you ask about, all is well; a second one needs its own --pin"
        );
        return vec![Finding::warn(ID, text).mend(format!("--pin {pin}2"))];
    }
    if facts.left.is_empty() {
        return vec![Finding::ok(ID, "nothing is left of a killed run")];
    }
    let text =
        format!("a run that was killed left {}; the next start would replace it", facts.left.join(", "));
    vec![Finding::warn(ID, text).mend(format!("tproxy-user cleanup --pin {pin}"))]
}

/// Where maps and links are pinned.
pub(super) fn bpf_file_system(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "bpf-file-system";
    let pin = facts.config.pin.display();
    vec![match facts.bpffs {
        BpfFs::Mounted => Finding::ok(ID, format!("{pin} is on a BPF file system")),
        BpfFs::Mountable => Finding::warn(ID, "/sys/fs/bpf is not mounted; `run` does it, where it may")
            .mend("mount -t bpf bpf /sys/fs/bpf"),
        BpfFs::Other => {
            Finding::fail(ID, format!("{pin} is not on a BPF file system, so nothing can be pinned there"))
                .mend("--pin /sys/fs/bpf/tproxy")
        }
    }]
}

/// Where the program is attached that notes the group of sockets.
pub(super) fn control_groups(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "control-groups";
    vec![match (facts.plan.notes_groups, facts.control_groups) {
        (false, _) => Finding::ok(ID, "no rule asks for groups"),
        (true, true) => Finding::ok(ID, "mounted, as rules with `gid` need"),
        (true, false) => {
            Finding::fail(ID, "not mounted (version 2), which rules with `gid` need").mend(group::MOUNT)
        }
    }]
}

/// Before 5.11 maps count against the limit of locked memory.
pub(super) fn memlock(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "memlock";
    let counts = facts.kernel.is_none_or(|kernel| kernel < Kernel { major: 5, minor: 11 });
    match facts.memlock {
        Some(limit) if counts && !facts.has_capability(SYS_RESOURCE) => vec![
            Finding::fail(ID, format!("{limit} bytes of locked memory are too few for the maps (before Linux 5.11), and without CAP_SYS_RESOURCE the limit cannot be raised"))
                .mend("ulimit -l unlimited"),
        ],
        _ => vec![Finding::ok(ID, "maps fit into the limit of locked memory")],
    }
}

/// Types for bpftool; the programs need none of the kernel's.
pub(super) fn btf(facts: &Facts) -> Vec<Finding> {
    let text = if facts.btf {
        "the kernel has its types"
    } else {
        "the kernel has no types of its own; none are needed"
    };
    vec![Finding::ok("btf", text)]
}

/// Interpreted programs cost several times as much.
pub(super) fn jit(facts: &Facts) -> Vec<Finding> {
    const ID: &str = "jit";
    if facts.jit.as_deref() == Some("0") {
        return vec![
            Finding::warn(
                ID,
                "eBPF programs are interpreted: every packet of a captured interface costs more",
            )
            .mend("sysctl -w net.core.bpf_jit_enable=1"),
        ];
    }
    let text =
        if facts.jit.is_some() { "programs are compiled" } else { "not visible from this network namespace" };
    vec![Finding::ok(ID, text)]
}

//! Other TC programs and other instances beside ours (H7).

use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::proxy::Launch;
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, TCX, expect_service, needs_linux, needs_proxy, service, start_proxy};
use crate::foreign::{Foreign, Verdict};
use crate::interfaces::expect_capture;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H7_tcx_program_before_and_after", tcx_neighbours),
    ("H7_filters_beside_tcx", |lab, family| filter_neighbours(lab, family, "--iface lan")),
    ("clsact_H7_filters_before_and_after", |lab, family| {
        filter_neighbours(lab, family, "--iface lan --attach clsact")
    }),
    ("H7_conflicts_are_named", conflicts),
];

fn ping(lab: &Lab, family: Family) -> Result<bool> {
    let to = family.anywhere(1).to_string();
    Ok(lab.client.cmd("ping").args(["-n", "-c", "1", "-W", "1", &to]).run()?.code() == 0)
}

/// One before ours that has nothing to say, and one after ours that drops what it sees.
fn tcx_neighbours(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    needs_linux(TCX, "tcx")?;
    let _service = service(lab, family)?;
    let _before = Foreign::attach(&lab.router, "lan", Verdict::Next)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect_capture(lab, family, &proxy)?;
    ensure!(ping(lab, family)?, "what is not captured does not pass");
    let after = Foreign::attach(&lab.router, "lan", Verdict::Drop)?;
    expect_capture(lab, family, &proxy)?;
    ensure!(!ping(lab, family)?, "the other program did not see what is not captured");
    // Detached and put back, ours is the last: the other program now decides before it.
    drop(after);
    ensure!(ping(lab, family)?, "the end of the other program took ours with it");
    expect_capture(lab, family, &proxy)?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// A classic BPF program that leaves every packet to the next filter.
pub(crate) const NEXT: &str = "1,6 0 0 4294967295";

/// A direct-action filter of another program; `verb` is `add` or `replace`.
pub(crate) fn filter(lab: &Lab, verb: &str, side: &str, priority: u16, bytecode: &str) -> Result<()> {
    let words = format!("filter {verb} dev lan {side} pref {priority} handle 1 bpf da bytecode");
    lab.router.cmd("tc").args(words.split_whitespace()).arg(bytecode).check().map(drop)
}

/// Filters of others at the clsact hook, before and after ours.
fn filter_neighbours(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    lab.router.sh("tc qdisc add dev lan clsact")?;
    filter(lab, "add", "ingress", 1, NEXT)?;
    filter(lab, "add", "egress", 1, NEXT)?;
    let proxy = start_proxy(lab, flags)?;
    expect_capture(lab, family, &proxy)?;
    ensure!(ping(lab, family)?, "what is not captured does not pass");
    // The protocol of the IP header, behind 14 bytes of Ethernet: drop ICMP, else ask the next.
    let drop_icmp = family.pick(
        "4,48 0 0 23,21 0 1 1,6 0 0 2,6 0 0 4294967295",
        // Neighbour discovery is ICMPv6 too: by the type as well, echo request.
        "6,48 0 0 20,21 0 3 58,48 0 0 54,21 0 1 128,6 0 0 2,6 0 0 4294967295",
    );
    filter(lab, "add", "ingress", 40_000, drop_icmp)?;
    ensure!(!ping(lab, family)?, "the other filter did not see what is not captured");
    expect_capture(lab, family, &proxy)?;
    proxy.terminate(Duration::from_secs(10))?;
    let rest = lab.router.sh("tc filter show dev lan ingress")?.stdout;
    ensure!(
        rest.contains("pref 1 ") && rest.contains("pref 40000 ") && !rest.contains("tproxy"),
        "the filters afterwards:\n{rest}"
    );
    ensure!(!ping(lab, family)?, "the other filter no longer works");
    Ok(())
}

/// A second instance that wants what the first has: exit code 5, and by whom.
fn conflicts(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let first = start_proxy(lab, "--iface lan")?;
    let by = format!("instance '{}' (pid {})", lab.name(), first.daemon.pid());
    for (flags, expected) in [
        ("--tproxy-mark 0x10/0x10 --own-mark 0x20 --on-port 15101", "routing table 100 is used by"),
        ("--table 110 --own-mark 0x20 --on-port 15101", "mark 0x1/0x1 overlaps mark 0x1/0x1 of"),
        ("--table 110 --tproxy-mark 0x10/0x10 --own-mark 0x20", "cannot listen on TCP"),
    ] {
        for command in ["", "check "] {
            let flags = format!("{command}--iface lan2 {flags}");
            let output = Launch::new(lab, &flags).instance("b").command()?.run()?.expect_code(5)?;
            let said = &output.stderr;
            ensure!(said.to_lowercase().contains(&expected.to_lowercase()), "{flags}: {said}");
            let named = if expected.contains("listen") {
                format!("(pid {})", first.daemon.pid())
            } else {
                by.clone()
            };
            ensure!(said.contains(&named), "{flags}: it does not say by whom: {said}");
        }
    }
    expect_service(lab, family)?;
    expect_capture(lab, family, &first)
}

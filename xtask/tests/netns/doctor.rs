//! `doctor` finds what is broken on purpose, and what it prints mends it.

mod broken;

use anyhow::{Context, Result, ensure};
use xtask::lab::peer::{TcpServer, UdpServer};
use xtask::lab::proxy::{self, Launch};
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, TCX, at, needs_linux, needs_proxy, start_proxy};
use crate::company::{NEXT, filter};
use crate::foreign::{Foreign, Verdict};

use broken::{Broken, Finding, doctor, examine, fails, no_finding, sh, warns, with, works};

pub(crate) const SCENARIOS: Scenarios = &[
    ("doctor_finds_nothing_in_the_lab", clean),
    ("doctor_interface_is_down", |lab, family| {
        Broken { says: "lan is down", ..fails("interface", "ip link set lan down") }.examine(lab, family)
    }),
    ("doctor_interface_is_not_there", |lab, family| {
        let broken =
            Broken { flags: "--iface lam", says: "there are: lan, lan2, wan", ..fails("interface", "true") };
        broken.find(lab, family).map(drop)
    }),
    ("doctor_interface_is_a_bridge_port", |lab, family| {
        let broken =
            fails("interface", "ip link add br0 type bridge; ip link set br0 up; ip link set lan master br0");
        Broken { says: "port of the bridge br0", ..broken }.examine(lab, family)
    }),
    ("doctor_interface_has_no_address", |lab, family| {
        let script =
            "ip link add br7 type bridge; ip link set br7 up; sysctl -wq net/ipv6/conf/br7/disable_ipv6=1";
        Broken { flags: "--iface br7", says: "br7 has no address", ..warns("address", script) }
            .find(lab, family)
            .map(drop)
    }),
    ("doctor_loopback_is_down", |lab, family| {
        Broken { works: true, ..fails("loopback", "ip link set lo down") }.examine(lab, family)
    }),
    ("doctor_forwarding_is_off", |lab, family| {
        let sysctl = family.pick("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding");
        Broken { works: true, ..warns("forwarding", &format!("sysctl -wq {sysctl}=0")) }.examine(lab, family)
    }),
    ("doctor_ipv6_is_off", |lab, family| {
        warns("ipv6", "sysctl -wq net.ipv6.conf.lo.disable_ipv6=1").examine(lab, family)?;
        let script = "sysctl -wq net.ipv6.conf.lan.disable_ipv6=1";
        Broken { says: "IPv6 is off on lan", ..warns("ipv6", script) }.examine(lab, family)
    }),
    ("doctor_rule_before_ours", |lab, family| {
        let script = format!("ip {} rule add pref 50 lookup main", family.flag());
        Broken { lost: Some("tcp"), works: true, ..fails("rule-order", &script) }.examine(lab, family)
    }),
    ("doctor_mark_of_another", |lab, family| {
        let script = format!("ip {} rule add pref 500 fwmark 0x1/0xff lookup 500", family.flag());
        Broken { works: true, says: "matches mark 0x1/0x1 too", ..fails("table-and-mark", &script) }
            .examine(lab, family)
    }),
    ("doctor_table_of_another", |lab, family| {
        let script = format!("ip {} route add {} dev wan table 100", family.flag(), family.anywhere_net(9));
        Broken { works: true, says: "route of another", ..fails("table-and-mark", &script) }
            .examine(lab, family)
    }),
    ("doctor_another_instance_runs", another_instance),
    ("doctor_port_is_taken", port_taken),
    ("doctor_input_chain_drops", |lab, family| {
        let script = "nft add table inet fw; \
            nft 'add chain inet fw input { type filter hook input priority 0; policy drop; }'; \
            nft add rule inet fw input ct state established,related accept; \
            nft add rule inet fw input iif lo accept; \
            nft add rule inet fw input meta l4proto icmpv6 accept; \
            nft add rule inet fw input tcp dport 22 accept";
        Broken { lost: Some("tcp"), works: true, ..fails("packet-filter", script) }.examine(lab, family)
    }),
    ("doctor_input_chain_accepts_the_lan", |lab, family| {
        let script = "nft add table inet fw; \
            nft 'add chain inet fw input { type filter hook input priority 0; policy drop; }'; \
            nft 'add chain inet fw lan'; nft add rule inet fw lan accept; \
            nft add rule inet fw input meta l4proto icmpv6 accept; \
            nft 'add rule inet fw input ct state vmap { established : accept, invalid : drop }'; \
            nft 'add rule inet fw input iifname { lan, lo } jump lan'";
        sh(lab, script)?;
        no_finding(lab, "--iface lan", "packet-filter")?;
        works(lab, family, "--iface lan")
    }),
    ("doctor_output_chain_drops", |lab, family| {
        let script = "nft add table inet fw; \
            nft 'add chain inet fw output { type filter hook output priority 0; }'; \
            nft add rule inet fw output ct state established,related accept; \
            nft add rule inet fw output oifname wan ct state new drop";
        Broken { works: true, says: "what the proxy sends", ..fails("packet-filter", script) }
            .examine(lab, family)
    }),
    ("doctor_iptables_rejects", |lab, family| {
        let tool = family.pick("iptables-nft", "ip6tables-nft");
        let script = format!("{tool} -A INPUT -p tcp -j REJECT");
        Broken { lost: Some("tcp"), works: true, ..fails("packet-filter", &script) }.examine(lab, family)
    }),
    ("doctor_ingress_chain_drops", |lab, family| {
        // By the mark alone: the chain sees what the program at TC has marked.
        let script = "nft add table netdev fw; \
            nft 'add chain netdev fw lan { type filter hook ingress device lan priority 0; }'; \
            nft add rule netdev fw lan meta mark 1 drop";
        // nft 1.0.6 does not print the device, so it is in doubt.
        Broken {
            lost: Some("tcp"),
            works: true,
            says: "chain lan of table netdev fw",
            ..warns("packet-filter", script)
        }
        .examine(lab, family)
    }),
    ("doctor_answers_to_syns_are_dropped", |lab, family| {
        let script = "nft add table inet fw; \
            nft 'add chain inet fw output { type filter hook output priority 0; }'; \
            nft add rule inet fw output ct state invalid drop";
        let flags = "--iface lan --handshake faithful";
        Broken { flags, works: true, ..warns("handshake", script) }.examine(lab, family)
    }),
    ("doctor_mark_is_overwritten", |lab, family| {
        // As wg-quick has it.
        let script = "nft add table inet wg; \
            nft 'add chain inet wg premangle { type filter hook prerouting priority -150; }'; \
            nft add rule inet wg premangle meta l4proto udp meta mark set ct mark";
        Broken { lost: Some("udp"), works: true, ..fails("mark", script) }.examine(lab, family)
    }),
    ("doctor_captured_packets_are_redirected", |lab, family| {
        let script = "nft add table inet nat; \
            nft 'add chain inet nat pre { type nat hook prerouting priority -100; }'; \
            nft add rule inet nat pre iifname lan meta l4proto tcp redirect to :9";
        Broken { lost: Some("tcp"), works: true, ..fails("dnat", script) }.examine(lab, family)
    }),
    ("doctor_ingress_qdisc", |lab, family| {
        let broken = fails("qdisc", "tc qdisc add dev lan ingress");
        Broken { flags: "--iface lan --attach clsact", works: true, ..broken }.examine(lab, family)
    }),
    ("doctor_programs_of_others", programs_of_others),
    ("doctor_leftovers_of_a_killed_run", leftovers),
    ("doctor_capabilities", capabilities),
    ("doctor_open_files", open_files),
    ("doctor_pin_is_on_no_bpf_file_system", no_bpf_file_system),
    ("doctor_old_kernels", old_kernels),
    ("doctor_bridge_filter_does_no_harm", bridge_filter),
];

fn clean(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    for flags in ["--iface lan", "--iface lan* --own-traffic --source proxy", "--steer none"] {
        let unwell: Vec<_> = doctor(lab, flags)?
            .into_iter()
            // How many files may be open is the machine's.
            .filter(|finding| finding.level != "ok" && finding.id != "open-files")
            .collect();
        ensure!(unwell.is_empty(), "{flags}: {unwell:#?}");
    }
    let text = Launch::new(lab, "doctor --iface lan").command()?.check()?.stdout;
    ensure!(
        text.contains("ok    interface        lan is up") && text.contains("nothing is in the way"),
        "{text}"
    );
    works(lab, family, "--iface lan")
}

fn another_instance(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let other = Launch::new(lab, "--iface lan2").instance("b").start()?;
    let pid = format!("(pid {})", other.daemon.pid());
    let mut flags = "--iface lan".to_owned();
    for id in ["table-and-mark", "port"] {
        let findings = doctor(lab, &flags)?;
        let finding = findings.iter().find(|finding| finding.id == id && finding.level == "FAIL");
        let finding = finding.with_context(|| format!("no FAIL of {id}: {findings:#?}"))?;
        ensure!(finding.text.contains(&pid), "{id} does not say by whom: {}", finding.text);
        flags = with(&flags, finding.mend.as_deref().unwrap_or_default());
        no_finding(lab, &flags, id)?;
    }
    works(lab, family, &flags)?;
    // And of the instance itself: it runs, and has nobody in its way.
    let findings = examine(&Launch::new(lab, "doctor --json --iface lan2").instance("b").command()?)?;
    ensure!(findings.iter().any(|found| found.id == "instance" && found.level == "warn"), "{findings:#?}");
    ensure!(findings.iter().all(|found| found.level != "FAIL"), "{findings:#?}");
    Ok(())
}

fn port_taken(lab: &Lab, family: Family) -> Result<()> {
    let _tcp = TcpServer::echo(&lab.router, at(family.loopback(), 15_001))?;
    let _udp = UdpServer::echo(&lab.router, at(family.loopback(), 15_002))?;
    let broken = Broken { flags: "--iface lan --workers 1", works: true, ..fails("port", "true") };
    broken.examine(lab, family)
}

fn programs_of_others(lab: &Lab, family: Family) -> Result<()> {
    needs_linux(TCX, "tcx")?;
    let program = Foreign::attach(&lab.router, "lan", Verdict::Next)?;
    Broken { flags: "--iface la[n]", says: "tcx, id", ..warns("tc-programs", "true") }.find(lab, family)?;
    drop(program);
    no_finding(lab, "--iface lan", "tc-programs")?;
    lab.router.sh("tc qdisc add dev lan clsact")?;
    filter(lab, "add", "ingress", 7, NEXT)?;
    // Behind a tcx program of ours, and before a filter of ours.
    no_finding(lab, "--iface lan", "tc-programs")?;
    let flags = "--iface lan --attach clsact";
    Broken { flags, says: "tc, pref 7", ..warns("tc-programs", "true") }.find(lab, family).map(drop)
}

fn leftovers(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    start_proxy(lab, "--iface lan")?.kill()?;
    let broken =
        Broken { flags: "--iface lan ", says: "a run that was killed left", ..warns("instance", "true") };
    let mend = broken.find(lab, family)?.mend.context("nothing mends it")?;
    let binary = proxy::binary()?;
    sh(lab, &mend.replace("tproxy-user cleanup", &format!("{} cleanup", binary.display())))?;
    no_finding(lab, "--iface lan", "instance")
}

/// Without any capability each one is named, and what cannot be seen is said.
fn capabilities(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let words = ["--bounding-set=-all", "--inh-caps=-all"];
    let command = lab.router.cmd("setpriv").args(words).arg(proxy::binary()?);
    let findings = examine(&command.args(["doctor", "--json", "--iface", "lan", "--pin"]).arg(lab.pin()))?;
    for (level, part) in
        [("FAIL", "CAP_NET_ADMIN"), ("FAIL", "CAP_NET_RAW"), ("FAIL", "CAP_BPF"), ("warn", "not checked")]
    {
        ensure!(
            findings.iter().any(|finding| finding.level == level && finding.text.contains(part)),
            "no {level} with '{part}': {findings:#?}"
        );
    }
    Ok(())
}

fn open_files(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let limited = |flags: &str| -> Result<Vec<Finding>> {
        examine(&Launch::new(lab, &format!("doctor --json --iface lan {flags}")).open_files(4096).command()?)
    };
    let findings = limited("")?;
    let finding = findings.iter().find(|finding| finding.id == "open-files" && finding.level == "warn");
    let mend = finding.and_then(|finding| finding.mend.clone()).with_context(|| format!("{findings:#?}"))?;
    // Who may not raise the limit has to ask for less.
    let findings = if mend.starts_with("--") {
        limited(&mend)?
    } else {
        let script = format!("{mend}; exec \"$0\" \"$@\"");
        let command = lab.router.cmd("sh").arg("-ec").arg(script).arg(proxy::binary()?);
        examine(&command.args(["doctor", "--json", "--iface", "lan", "--pin"]).arg(lab.pin()))?
    };
    ensure!(
        findings.iter().any(|finding| finding.id == "open-files" && finding.level == "ok"),
        "after {mend}: {findings:#?}"
    );
    Ok(())
}

fn no_bpf_file_system(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let findings =
        examine(&Launch::new(lab, "doctor --json --iface lan").pin(lab.dir().join("pin")).command()?)?;
    let finding = findings.iter().find(|finding| finding.id == "bpf-file-system" && finding.level == "FAIL");
    let mend = finding.and_then(|finding| finding.mend.clone()).with_context(|| format!("{findings:#?}"))?;
    let pin = mend.strip_prefix("--pin ").with_context(|| format!("no pin directory: {mend}"))?;
    let findings = examine(&Launch::new(lab, "doctor --json --iface lan").pin(pin).command()?)?;
    ensure!(
        findings.iter().any(|finding| finding.id == "bpf-file-system" && finding.level == "ok"),
        "{findings:#?}"
    );
    Ok(())
}

fn old_kernels(lab: &Lab, family: Family) -> Result<()> {
    for (flags, level, says) in [
        ("--iface lan --assume-kernel 5.6", "FAIL", "needs Linux 5.7"),
        ("--iface lan --assume-kernel 5.7", "warn", "fragmented datagrams"),
        ("--iface lan --assume-kernel 5.10 --attach tcx", "FAIL", "no tcx links (6.6)"),
        ("--iface lan --assume-kernel 5.7 --handshake faithful", "FAIL", "--handshake faithful needs (5.8)"),
        ("--iface lan --assume-kernel 5.7 --bpf-log", "FAIL", "--bpf-log needs (5.8)"),
    ] {
        Broken { flags, level, says, ..fails("kernel", "true") }.find(lab, family)?;
    }
    no_finding(lab, "--iface lan --assume-kernel 5.10", "kernel")
}

/// That it does no harm is not only said.
fn bridge_filter(lab: &Lab, family: Family) -> Result<()> {
    lab.router.ip_batch(
        "link add br0 type bridge forward_delay 0\n\
         addr flush dev lan\n\
         link set lan master br0\n\
         link set br0 up\n\
         addr add 192.0.2.1/24 dev br0\n\
         addr add 2001:db8:1::1/64 dev br0 nodad\n",
    )?;
    sh(
        lab,
        "sysctl -wq net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1; \
         nft add table inet fw; nft 'add chain inet fw pre { type filter hook prerouting priority -150; }'; \
         nft add rule inet fw pre ct state new counter",
    )?;
    let broken =
        Broken { flags: "--iface br0", level: "ok", says: "no harm", ..fails("bridge-filter", "true") };
    broken.find(lab, family)?;
    works(lab, family, "--iface br0")
}

//! What `flows`, `status`, `check` and the pinned maps show.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::lab::firewall;
use xtask::lab::proxy::Launch;
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, TCX, at, expect_service, needs_linux, needs_proxy, service, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("flows_as_documented", flows),
    ("flows_equal_the_pinned_map", pinned_map),
    ("status_as_documented", status),
    ("status_when_nothing_runs", not_running),
    ("check_needs_no_privilege", check),
    ("no_packet_filter_rule_anywhere", no_firewall),
    ("attach_clsact_is_told_and_chosen", |lab, family| attach(lab, family, "clsact")),
    ("attach_tcx_is_told_and_chosen", attach_tcx),
    ("all_goes_as_on_linux_5_7", oldest),
];

fn flows(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect_service(lab, family)?;
    let destination = at(family.anywhere(7), crate::common::SERVICE_PORT).to_string();
    let flows = proxy.flows()?;
    for protocol in ["tcp", "udp"] {
        let flow = flows.iter().find(|flow| flow.protocol == protocol && flow.destination == destination);
        let flow = flow.with_context(|| format!("no {protocol} flow to {destination}: {flows:#?}"))?;
        let port = at(family.client(), 0).to_string();
        ensure!(
            flow.client.starts_with(port.trim_end_matches('0')),
            "the client is written as {}",
            flow.client
        );
        ensure!(
            flow.iface.as_deref() == Some("lan") && flow.action == "proxy",
            "expected interface lan and action proxy: {flow:?}"
        );
        ensure!(
            flow.packets_up > 0 && flow.packets_down > 0 && flow.bytes_up > 0 && flow.bytes_down > 0,
            "a counter is 0: {flow:?}"
        );
        ensure!(
            !flow.first_seen.is_null() && !flow.last_seen.is_null(),
            "first_seen or last_seen is missing: {flow:?}"
        );
    }
    // For people: the same in columns.
    let text = proxy.cmd("flows")?.check()?.stdout;
    ensure!(text.contains(&destination), "`flows` does not show {destination}:\n{text}");
    Ok(())
}

/// The table that `flows` prints and the one that bpftool finds pinned are one.
fn pinned_map(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect_service(lab, family)?;
    std::thread::sleep(Duration::from_millis(300));
    let dump = |map: &str| -> Result<Value> {
        let output = lab
            .router
            .cmd("bpftool")
            .args(["--json", "map", "dump", "pinned"])
            .arg(lab.pin().join(map))
            .check()?;
        serde_json::from_str(&output.stdout).with_context(|| format!("not JSON: {}", output.describe()))
    };
    let (flows, entries) = (proxy.flows()?, dump("FLOWS")?);
    let entries = entries.as_array().context("no entries")?;
    ensure!(
        entries.len() == flows.len(),
        "{} entries in the pinned map, {} flows listed",
        entries.len(),
        flows.len()
    );
    for flow in &flows {
        let same = |entry: &&Value| {
            let (key, value) = (&entry["formatted"]["key"], &entry["formatted"]["value"]);
            let port = |text: &str| text.rsplit(':').next().and_then(|port| port.parse::<u64>().ok());
            key["client_port"].as_u64() == port(&flow.client)
                && key["destination_port"].as_u64() == port(&flow.destination)
                && key["protocol"].as_u64() == Some(if flow.protocol == "tcp" { 6 } else { 17 })
                && value["packets_up"] == flow.packets_up
                && value["bytes_up"] == flow.bytes_up
                && value["packets_down"] == flow.packets_down
                && value["bytes_down"] == flow.bytes_down
        };
        ensure!(
            entries.iter().any(|entry| same(&entry)),
            "no entry of the pinned map has the names and numbers of {flow:?}: {entries:#?}"
        );
    }
    let counters = dump("COUNTERS")?.to_string();
    ensure!(counters.contains("steered_tcp_new"), "COUNTERS shows no names: {counters}");
    Ok(())
}

fn status(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan --iface lan2")?;
    expect_service(lab, family)?;
    let status = proxy.status()?;
    for key in [
        "running",
        "pid",
        "version",
        "since",
        "interfaces",
        "listeners",
        "upstreams",
        "connections",
        "counters",
    ] {
        ensure!(!status[key].is_null(), "`status --json` has no {key}: {status:#}");
    }
    ensure!(
        status["pid"] == proxy.daemon.pid(),
        "the process is {}, status says {}",
        proxy.daemon.pid(),
        status["pid"]
    );
    for name in ["lan", "lan2"] {
        let interfaces = status["interfaces"].as_array().context("interfaces is no array")?;
        let interface = interfaces
            .iter()
            .find(|interface| interface["name"] == name)
            .with_context(|| format!("{name} is not listed: {status:#}"))?;
        ensure!(
            matches!(interface["attach"].as_str(), Some("tcx" | "clsact")),
            "how {name} is attached: {interface}"
        );
    }
    ensure!(
        status["connections"]["tcp"].is_u64() && status["connections"]["udp"].is_u64(),
        "connections: {}",
        status["connections"]
    );
    ensure!(status["counters"]["steered_tcp_new"].as_u64() > Some(0), "counters: {}", status["counters"]);
    let text = proxy.cmd("status")?.check()?.stdout;
    ensure!(text.contains("lan"), "`status` does not name the interface:\n{text}");
    Ok(())
}

fn not_running(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _ = family;
    for command in ["status", "status --json", "flows", "flows --json"] {
        let output = Launch::new(lab, command).command()?.run()?.expect_code(3)?;
        ensure!(output.stderr.trim().lines().count() <= 1, "more than one line: {}", output.describe());
    }
    Launch::new(lab, "cleanup").command()?.run()?.expect_code(0).map(drop)
}

fn check(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let binary = crate::bad_input::readable_binary(lab)?;
    let net = family.anywhere_net(3);
    let as_nobody =
        lab.router.cmd("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&binary.0);
    let output = as_nobody
        .args(["check", "--iface", "lan", "--not-to", &net, "--table", "123"])
        .arg("--pin")
        .arg(lab.pin())
        .check()?;
    for part in ["lan", &net, "123"] {
        ensure!(output.stdout.contains(part), "the plan does not show {part}, {}", output.describe());
    }
    let json = lab
        .router
        .cmd(&binary.0)
        .args(["check", "--json", "--iface", "lan"])
        .arg("--pin")
        .arg(lab.pin())
        .check()?;
    let _: Value =
        serde_json::from_str(&json.stdout).with_context(|| format!("not JSON: {}", json.describe()))?;
    Ok(())
}

fn no_firewall(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let _proxy = start_proxy(lab, "--iface lan --own-traffic")?;
    expect_service(lab, family)?;
    for namespace in lab.namespaces() {
        let rules = firewall::rules(namespace)?;
        ensure!(rules.is_empty(), "there are packet filter rules on the {}:\n{rules}", namespace.role());
    }
    Ok(())
}

fn attach_tcx(lab: &Lab, family: Family) -> Result<()> {
    needs_linux(TCX, "tcx")?;
    attach(lab, family, "tcx")
}

/// What the oldest kernel would have: filters, listeners by port, no `sk_lookup`, rules in
/// a map of fixed size, which must capture what is asked for and nothing else.
fn oldest(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    for (port, captured) in [(crate::common::SERVICE_PORT, true), (crate::common::SERVICE_PORT + 1, false)] {
        let proxy = start_proxy(lab, &format!("--iface lan --assume-kernel 5.7 --dport {port}"))?;
        expect_service(lab, family)?;
        for counter in ["steered_tcp_new", "steered_udp"] {
            let count = proxy.counter(counter)?;
            ensure!((count > 0) == captured, "with --dport {port} {counter} is {count}");
        }
        proxy.terminate(Duration::from_secs(10))?;
    }
    Ok(())
}

fn attach(lab: &Lab, family: Family, wanted: &str) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, &format!("--iface lan --attach {wanted}"))?;
    expect_service(lab, family)?;
    let status = proxy.status()?;
    ensure!(
        status["interfaces"][0]["attach"] == wanted,
        "asked for {wanted}, status says {}",
        status["interfaces"]
    );
    let filters = lab.router.sh("tc filter show dev lan ingress")?.stdout;
    ensure!(
        filters.contains("bpf") == (wanted == "clsact"),
        "attached by {wanted}, `tc filter show dev lan ingress` prints:\n{filters}"
    );
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

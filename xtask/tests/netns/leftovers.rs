//! After the end of the proxy the host is as before.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::pace::patience;
use xtask::lab::proxy;
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, expect_service, needs_proxy, service, start_proxy};
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[
    ("nothing_left_after_sigterm", |lab, family| {
        graceful(lab, family, "--iface lan --iface lan2", Signal::SIGTERM)
    }),
    ("nothing_left_after_sigint", |lab, family| graceful(lab, family, "--iface lan", Signal::SIGINT)),
    ("nothing_left_after_sigterm_own_traffic", |lab, family| {
        graceful(lab, family, "--iface lan --own-traffic", Signal::SIGTERM)
    }),
    ("clsact_nothing_left_after_sigterm", |lab, family| {
        graceful(lab, family, "--iface lan --own-traffic --attach clsact", Signal::SIGTERM)
    }),
    ("nothing_left_after_kill_and_cleanup", |lab, family| killed(lab, family, "--iface lan --iface lan2")),
    ("nothing_left_after_kill_and_cleanup_own_traffic", |lab, family| {
        killed(lab, family, "--iface lan --own-traffic")
    }),
    ("clsact_nothing_left_after_kill_and_cleanup", |lab, family| {
        killed(lab, family, "--iface lan --own-traffic --attach clsact")
    }),
    ("restart_with_other_flags_after_kill", restart_changed),
    ("H7_two_instances_side_by_side", two_instances),
];

pub(crate) fn graceful(lab: &Lab, family: Family, flags: &str, signal: Signal) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let mut proxy = start_proxy(lab, flags)?;
    expect_service(lab, family)?;
    let (code, took) = proxy.daemon.stop(signal, Duration::from_secs(15))?;
    ensure!(code == 0, "exit code {code} after {signal}, {}", proxy.daemon.describe());
    ensure!(took < patience(Duration::from_secs(5)), "with nothing to drain, the end took {took:?}");
    Snapshot::take(lab)?.expect_same(&before).with_context(|| format!("after {signal}"))?;
    expect_service(lab, family).context("without the proxy, traffic must be forwarded")
}

fn killed(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    start_proxy(lab, flags)?.kill()?;
    proxy::cleanup(lab)?;
    Snapshot::take(lab)?.expect_same(&before).context("after kill -9 and `tproxy-user cleanup`")?;
    expect_service(lab, family).context("without the proxy, traffic must be forwarded")
}

/// What a killed run left is removed, even where the next one wants less.
fn restart_changed(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    start_proxy(lab, "--iface lan --iface lan2 --own-traffic --table 200 --tproxy-mark 0x20/0x20")?.kill()?;
    start_proxy(lab, "--iface lan2 --attach clsact")?.kill()?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect_service(lab, family)?;
    ensure!(proxy.counter("steered_tcp_new")? > 0, "the traffic went past the proxy");
    proxy.terminate(Duration::from_secs(10))?;
    Snapshot::take(lab)?.expect_same(&before)
}

/// Two instances with marks, tables, ports and interfaces of their own.
fn two_instances(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let first = start_proxy(lab, "--iface lan")?;
    let flags = "--iface lan2 --tproxy-mark 0x10/0x10 --own-mark 0x20 --table 110 --on-port 15101";
    let second = proxy::Launch::new(lab, flags).instance("b").start()?;
    expect_service(lab, family)?;
    let to = crate::common::at(family.anywhere(7), crate::common::SERVICE_PORT);
    let mut guest = xtask::lab::peer::connect(&lab.guest, None, to, Duration::from_secs(5))?;
    xtask::lab::peer::ask(&mut guest, "the guest")?;
    ensure!(
        second.counter("steered_tcp_new")? == 1,
        "the second instance steered {}, expected 1",
        second.counter("steered_tcp_new")?
    );
    ensure!(
        first.counter("steered_tcp_new")? == 1,
        "the first instance steered {}, expected 1",
        first.counter("steered_tcp_new")?
    );
    drop(guest);
    second.terminate(Duration::from_secs(10))?;
    expect_service(lab, family).context("after the end of the second instance")?;
    ensure!(first.counter("steered_tcp_new")? == 2, "the end of the second instance broke the first");
    first.terminate(Duration::from_secs(10))?;
    Snapshot::take(lab)?.expect_same(&before)
}

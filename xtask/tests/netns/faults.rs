//! Limits, crashes and ends under load (F1, F2, F10).

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{self, Load, LoadServer, Report};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer;
use xtask::lab::proxy::{self, Launch};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{
    SERVICE_PORT, Scenarios, Skip, at, expect_service, expect_tcp_service, expect_udp_service_within,
    needs_proxy, service, start_proxy,
};
use crate::host::counters_named;
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[
    ("F1_open_file_limit", open_file_limit),
    ("F2_kill_9_under_load_fail_open", |lab, family| {
        killed(lab, family, "--iface lan --fail open", Fail::Open)
    }),
    ("F2_kill_9_under_load_fail_closed", |lab, family| {
        killed(lab, family, "--iface lan --fail closed", Fail::Closed)
    }),
    ("F2_who_was_left_open_is_reset", left_open),
    ("F2_kill_9_with_own_traffic", |lab, family| {
        killed(lab, family, "--iface lan --own-traffic --fail open", Fail::Open)
    }),
    ("F10_sigterm_under_load", |lab, family| terminated(lab, family, "--iface lan", Signal::SIGTERM)),
    ("F10_sigint_under_load", |lab, family| {
        terminated(lab, family, "--iface lan --own-traffic", Signal::SIGINT)
    }),
    ("F10_open_connections_are_drained", |lab, family| drained(lab, family, &lab.client, "--iface lan")),
    ("F10_own_connections_are_drained", |lab, family| {
        drained(lab, family, &lab.router, "--iface lan --own-traffic")
    }),
    ("F10_handshakes_under_way_are_served", handshake),
    ("F10_a_second_signal_ends_at_once", second_signal),
    ("clsact_F2_kill_9_under_load_fail_open", |lab, family| {
        killed(lab, family, "--iface lan --attach clsact --fail open", Fail::Open)
    }),
    ("clsact_F2_kill_9_under_load_fail_closed", |lab, family| {
        killed(lab, family, "--iface lan --attach clsact --fail closed", Fail::Closed)
    }),
    ("clsact_F10_sigterm_under_load", |lab, family| {
        terminated(lab, family, "--iface lan --attach clsact", Signal::SIGTERM)
    }),
];

const PORT: u16 = 9300;

fn open_file_limit(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
    let proxy = Launch::new(lab, "--iface lan --workers 1").open_files(64).start()?;
    expect_service(lab, family)?;
    let lines_before = proxy.daemon.log().lines().count();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", proxy.daemon.pid()))?;
    let limit = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    ensure!(
        limit.split_whitespace().any(|word| word == "64"),
        "the proxy runs with another limit than the 64 it was given: {limit}"
    );

    let crowd: Vec<TcpStream> = (1..=200)
        .map(|number| {
            peer::connect(&lab.client, None, to, Duration::from_secs(5))
                .with_context(|| format!("connection {number} of 200, which must at least be queued"))
        })
        .collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_millis(500));
    let before = proxy.daemon.cpu_time()?;
    std::thread::sleep(Duration::from_secs(3));
    let used = proxy.daemon.cpu_time()?.saturating_sub(before);
    ensure!(
        used < patience(Duration::from_millis(600)).min(Duration::from_secs(2)),
        "at its limit of open files the proxy used {used:?} of processor time in 3 s: it spins"
    );
    let log = proxy.daemon.log();
    let lines: Vec<&str> = log.lines().skip(lines_before).collect();
    ensure!(
        lines.len() <= 20,
        "at its limit of open files the proxy wrote {} lines in 3.5 s, the last: {:?}",
        lines.len(),
        lines.last()
    );
    ensure!(
        lines.iter().any(|line| line.contains("64") && line.to_lowercase().contains("open file")),
        "no log line names the limit of 64 open files: {lines:#?}"
    );
    let lost = crowd.iter().filter(|stream| !is_open(stream)).count();
    ensure!(lost == 0, "of 200 connections {lost} were ended for want of a descriptor instead of queued");
    drop(crowd);
    let mut latest = Ok(());
    let again = wait_for("service after the crowd had gone", Duration::from_secs(10), || {
        // Those of the crowd that have waited are taken now, and gone in a moment: until then
        // there may be no descriptor for a datagram's flow.
        latest = expect_tcp_service(lab, family)
            .and_then(|()| expect_udp_service_within(lab, family, patience(Duration::from_secs(1))));
        Ok(latest.is_ok())
    });
    again.with_context(|| format!("the latest attempt: {latest:?}"))?;
    let counted = ["accept", "limit", "emfile"]
        .iter()
        .map(|part| counters_named(&proxy, part))
        .collect::<Result<Vec<_>>>()?;
    ensure!(
        counted.iter().any(|(_, sum)| *sum > 0),
        "no counter tells of it: {}",
        proxy.status()?["counters"]
    );
    expect_service(lab, family).context("after the crowd had gone")
}

/// Whether a connection on which nothing was said is neither closed nor reset.
fn is_open(stream: &TcpStream) -> bool {
    let silent = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]).map(drop));
    silent.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Runs `during` while connections come and go.
fn under_load<T>(lab: &Lab, family: Family, during: impl FnOnce() -> Result<T>) -> Result<(T, Report)> {
    let load = Load {
        targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
        concurrency: 16,
        connections: u64::MAX,
        duration: Duration::from_secs(30),
        reset: false,
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| load.run(&lab.client, &stop));
        std::thread::sleep(Duration::from_millis(500));
        let done = during();
        stop.store(true, Ordering::Relaxed);
        let report = running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((done?, report))
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fail {
    Open,
    Closed,
}

pub(crate) fn killed(lab: &Lab, family: Family, flags: &str, fail: Fail) -> Result<()> {
    needs_proxy()?;
    let before = Snapshot::take(lab)?;
    let server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, flags)?;
    expect_service(lab, family)?;
    under_load(lab, family, || proxy.kill())?;
    match fail {
        Fail::Open => expect_service(lab, family)
            .context("with `fail = open` and no proxy, traffic must be forwarded")?,
        Fail::Closed => expect_nothing_passes(lab, family)?,
    }

    // A plain restart needs no help.
    let proxy = start_proxy(lab, flags).context("a plain restart after kill -9")?;
    expect_service(lab, family).context("after a plain restart")?;
    ensure!(proxy.counter("steered_tcp_new")? > 0, "after a plain restart the traffic goes past the proxy");
    under_load(lab, family, || proxy.kill())?;

    // Neither does cleaning up, and once more is no error.
    proxy::cleanup(lab)?;
    Snapshot::take(lab)?.expect_same(&before).context("after kill -9 and `tproxy-user cleanup`")?;
    proxy::cleanup(lab).context("a second `tproxy-user cleanup`")?;
    expect_service(lab, family).context("after kill -9 and cleanup, traffic must be forwarded")?;
    ensure!(server.foreign() == 0, "{} connections did not come from the client's address", server.foreign());
    Ok(())
}

/// A client that keeps its half of a connection open, when the kernel of the proxy that was killed
/// has forgotten it, is told so as soon as it says something.
fn left_open(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    lab.router.set_sysctls(&[("net/ipv4/tcp_fin_timeout", "1")])?;
    let _server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let proxy = start_proxy(lab, "--iface lan --fail open")?;
    let to = at(family.anywhere(1), PORT);
    let mut client = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    load::ask(&mut client)?;
    proxy.kill()?;
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    ensure!(peer::read(&mut client, &mut [0; 16])? == 0, "it was not ended with the proxy");
    std::thread::sleep(Duration::from_secs(4));
    client.write_all(b"is anybody there?")?;
    wait_for("a reset", Duration::from_secs(5), || {
        Ok(client.take_error()?.is_some_and(|error| {
            matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
        }))
    })
}

fn expect_nothing_passes(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
    let connected = peer::connect(&lab.client, None, to, Duration::from_secs(2));
    ensure!(connected.is_err(), "with `fail = closed` and no proxy, a connection reached the server");
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    ensure!(
        peer::exchange(&socket, to, b"is anybody there?").is_err(),
        "with `fail = closed` and no proxy, a datagram reached the server"
    );
    // What is not captured is none of its business.
    lab.client.cmd("ping").args(["-n", "-c", "1", "-W", &pace::seconds(2), &to.ip().to_string()]).check()?;
    Ok(())
}

/// Things of other programs, which must be there afterwards.
fn strangers(lab: &Lab) -> Result<()> {
    lab.router.sh("tc qdisc add dev lan clsact")?;
    for direction in ["ingress", "egress"] {
        lab.router.sh(&format!(
            "tc filter add dev lan {direction} pref 5 protocol ip u32 match ip protocol 254 0xff"
        ))?;
    }
    for command in [
        "ip rule add pref 500 fwmark 0x500 lookup 500",
        "ip -6 rule add pref 500 fwmark 0x500 lookup 500",
        "ip route add 100.64.0.0/10 dev wan table 500",
    ] {
        lab.router.sh(command)?;
    }
    Ok(())
}

pub(crate) fn terminated(lab: &Lab, family: Family, flags: &str, signal: Signal) -> Result<()> {
    needs_proxy()?;
    strangers(lab)?;
    let before = Snapshot::take(lab)?;
    let _server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let mut proxy = start_proxy(lab, flags)?;
    let (code, report) = under_load(lab, family, || {
        let ended = proxy.daemon.stop(signal, Duration::from_secs(15))?;
        // What comes now is forwarded.
        std::thread::sleep(Duration::from_millis(500));
        Ok(ended)
    })?;
    ensure!(code.0 == 0, "exit code {} after {signal}, {}", code.0, proxy.daemon.describe());
    Snapshot::take(lab)?.expect_same(&before).with_context(|| format!("after {signal}"))?;
    ensure!(
        report.completed > pace::share(50),
        "only {} connections completed before and after {signal}",
        report.completed
    );
    ensure!(
        report.failed.is_empty(),
        "{signal} broke some of {} connections: {:?}",
        report.completed,
        report.failed
    );
    Ok(())
}

/// A connection that is open at SIGTERM goes on until its end; the proxy then ends.
fn drained(lab: &Lab, family: Family, from: &Namespace, flags: &str) -> Result<()> {
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let mut proxy = start_proxy(lab, &format!("{flags} --drain-timeout 10s"))?;
    let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
    let mut stream = peer::connect(from, None, to, Duration::from_secs(5))?;
    peer::ask(&mut stream, "before")?;
    proxy.daemon.signal(Signal::SIGTERM)?;
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(200));
        let (echo, _) = peer::ask(&mut stream, "during")
            .context("an open connection was cut, 10 s of drain time notwithstanding")?;
        ensure!(echo == "during", "the echo was {echo:?}");
        ensure!(
            proxy.daemon.ended()?.is_none(),
            "the proxy ended while a connection was open, {}",
            proxy.daemon.describe()
        );
    }
    expect_service(lab, family).context("new connections while the proxy drains")?;
    drop(stream);
    let started = Instant::now();
    wait_for("the end of the proxy after its last connection", Duration::from_secs(3), || {
        Ok(proxy.daemon.ended()?.is_some())
    })?;
    let status = proxy.daemon.ended()?.context("the proxy is still there")?;
    ensure!(status.code() == Some(0), "the drained proxy ended with {status} after {:?}", started.elapsed());
    Snapshot::take(lab)?.expect_same(&before)
}

/// The proxy has answered a SYN when SIGTERM comes; the client believes itself
/// connected, and its acknowledgement is still on its way.
fn handshake(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let mut proxy = start_proxy(lab, "--iface lan")?;
    let rules = "add table inet hold; \
        add chain inet hold out { type filter hook output priority 0; }; \
        add rule inet hold out tcp flags & (syn | ack) == ack drop";
    if lab.client.cmd("nft").arg(rules).run()?.code() != 0 {
        bail!(Skip("nft, which holds packets back here, does not work".into()));
    }
    let to = at(family.anywhere(7), SERVICE_PORT);
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    proxy.daemon.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_millis(100));
    lab.client.cmd("nft").args(["delete", "table", "inet", "hold"]).check()?;
    let (echo, _) = peer::ask(&mut stream, "late, but here").context("a connection begun before SIGTERM")?;
    ensure!(echo == "late, but here", "the echo was {echo:?}");
    drop(stream);
    wait_for("the end of the proxy", Duration::from_secs(5), || Ok(proxy.daemon.ended()?.is_some()))
}

fn second_signal(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let mut proxy = start_proxy(lab, "--iface lan --drain-timeout 60s")?;
    let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    peer::ask(&mut stream, "hello")?;
    proxy.daemon.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        proxy.daemon.ended()?.is_none(),
        "the proxy did not wait for its open connection, {}",
        proxy.daemon.describe()
    );
    let (_, took) = proxy.daemon.stop(Signal::SIGTERM, Duration::from_secs(5))?;
    ensure!(took < patience(Duration::from_secs(2)), "the second signal took {took:?}");
    let mut rest = Vec::new();
    let end = stream.write_all(b"still there?\n").and_then(|()| stream.read_to_end(&mut rest));
    ensure!(rest.is_empty(), "the connection outlived its proxy: {end:?}");
    Snapshot::take(lab)?.expect_same(&before).context("after a second SIGTERM")
}

//! Reloads while traffic goes on.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use super::{reload, rule};
use crate::common::at;
use crate::matching::unused;
use crate::policy::{
    Client,
    Fate::{Passed, Rejected},
    all_reflectors, other_networks, start_with_rules, target, tcp_fate, within,
};

const RELOADS: u64 = 200;

/// Sets its flag when it is dropped, so that threads end also where a check fails.
pub(super) struct Stop<'a>(pub(super) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const LOAD: u16 = 9500;
pub(super) const ECHO: u16 = 9501;

/// New connections, transfers that go on, datagrams of old and of new flows: some go
/// through the proxy and some are passed, by both configurations alike.
pub(super) fn under_load(lab: &Lab, _: Family) -> Result<()> {
    fs::write(lab.dir().join("a.txt"), other_networks(300))?;
    fs::write(lab.dir().join("b.txt"), other_networks(900))?;
    let passed = rule(1, "pass");
    let a = format!("{passed}{}[[rule]]\nto_file = 'a.txt'\naction = 'drop'\n", rule(8, "reject"));
    let b = format!("{}[[rule]]\nto_file = 'b.txt'\naction = 'reject'\n{passed}", rule(9, "drop"));
    // Rule 1 or 3 passes the first network, none is for the second.
    let networks = [1, 2];
    let servers = Family::ALL
        .map(|family| LoadServer::start(&lab.server, at(family.unspecified(), LOAD), family.client()));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let of_all = |port| {
        Family::ALL.into_iter().flat_map(move |family| networks.map(|net| at(within(family, net, 1), port)))
    };
    let _echo = of_all(ECHO)
        .map(|to| Ok((TcpServer::echo(&lab.server, to)?, UdpServer::echo(&lab.server, to)?)))
        .collect::<Result<Vec<_>>>()?;
    let (proxy, config) = start_with_rules(lab, "", &a)?;
    let load = Load {
        targets: of_all(LOAD).collect(),
        concurrency: 2,
        connections: u64::MAX,
        duration: Duration::from_mins(1),
        reset: false,
    };
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let transferred = AtomicU64::new(0);
    let exchanged = AtomicU64::new(0);
    let report = thread::scope(|scope| -> Result<_> {
        let ends = Stop(stop);
        let load = scope.spawn(|| load.run(&lab.client, stop));
        let mut others = Vec::new();
        for to in of_all(ECHO) {
            let (bytes, datagrams) = (&transferred, &exchanged);
            others.push(scope.spawn(move || {
                transfer(lab, to, stop, bytes).with_context(|| format!("a transfer by {to}"))
            }));
            others.push(scope.spawn(move || {
                exchanges(lab, to, stop, datagrams).with_context(|| format!("datagrams to {to}"))
            }));
        }
        for number in 1..=pace::share(RELOADS) {
            config.write(if number % 2 == 0 { &a } else { &b })?;
            reload(&proxy).with_context(|| format!("reload {number}"))?;
        }
        drop(ends);
        for other in others {
            other.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    })?;
    report.expect_all(report.completed)?;
    let (bytes, datagrams) = (transferred.into_inner(), exchanged.into_inner());
    ensure!(
        report.completed > 200 && bytes > 1 << 20 && datagrams > 200,
        "little happened meanwhile: {} connections, {bytes} bytes, {datagrams} datagrams",
        report.completed
    );
    // More than a retransmission of a SYN would take.
    ensure!(
        report.slowest < pace::patience(Duration::from_millis(900)),
        "one connection took {:?}",
        report.slowest
    );
    for server in servers {
        ensure!(server.foreign() == 0, "{} connections did not come from the client", server.foreign());
    }
    let (steered, passed) = (proxy.counter("steered_tcp_new")?, proxy.counter("pass_policy")?);
    ensure!(
        steered >= report.completed / 3
            && steered <= report.completed * 2 / 3 + 16
            && passed > report.completed,
        "of {} connections half should be proxied: {steered} were; {passed} packets were passed",
        report.completed
    );
    ensure!(!proxy.daemon.log().contains("WARN"), "the proxy warns:\n{}", proxy.daemon.log());
    Ok(())
}

/// Sends pieces through one connection and back again, until it is told to stop.
fn transfer(lab: &Lab, to: SocketAddr, stop: &AtomicBool, bytes: &AtomicU64) -> Result<()> {
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    let piece = peer::pattern(16 << 10);
    let mut back = vec![0; piece.len()];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&piece)?;
        stream.read_exact(&mut back)?;
        ensure!(back == piece, "the echo differs");
        bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Datagrams of one flow and each time of a new one, until it is told to stop.
fn exchanges(lab: &Lab, to: SocketAddr, stop: &AtomicBool, datagrams: &AtomicU64) -> Result<()> {
    let any = SocketAddr::new(if to.is_ipv4() { Family::V4 } else { Family::V6 }.client(), 0);
    let old = peer::udp(&lab.client, any)?;
    while !stop.load(Ordering::Relaxed) {
        for socket in [&old, &peer::udp(&lab.client, any)?] {
            let (_, from) = peer::exchange(socket, to, b"is anybody there?")?;
            ensure!(from == to, "{from} answered");
            datagrams.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// X and Y change places: a client is let through to one of them, never to the proxy.
pub(super) fn mixture(lab: &Lab, _: Family) -> Result<()> {
    // Below is what a packet would get that no rule of a half-loaded set is for.
    let a = format!("{}{}{}", rule(1, "pass"), rule(2, "reject"), rule(9, "drop"));
    let b = format!("{}{}", rule(1, "reject"), rule(2, "pass"));
    let _servers = all_reflectors(lab, &[1, 2])?;
    let (proxy, config) = start_with_rules(lab, "", &a)?;
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let probes = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        let ends = Stop(stop);
        let probe = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for to in Family::ALL.into_iter().flat_map(|family| [target(family, 1), target(family, 2)]) {
                    let from = unused(if to.is_ipv4() { Family::V4 } else { Family::V6 }.client());
                    let (fate, took) = tcp_fate(&lab.client, from, to, Duration::from_secs(5))?;
                    ensure!(matches!(fate, Passed | Rejected), "{from} to {to} was {fate:?} after {took:?}");
                    probes.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        });
        for number in 1..=pace::share(RELOADS) {
            let fates = if number % 2 == 0 { [Passed, Rejected] } else { [Rejected, Passed] };
            config.write(if number % 2 == 0 { &a } else { &b })?;
            reload(&proxy).with_context(|| format!("reload {number}"))?;
            let family = if number % 4 < 2 { Family::V4 } else { Family::V6 };
            for (net, fate) in [1, 2].into_iter().zip(fates) {
                Client::of(lab, family)
                    .expect_tcp(target(family, net), fate)
                    .with_context(|| format!("after reload {number}"))?;
            }
        }
        drop(ends);
        probe.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    let probes = probes.into_inner();
    ensure!(probes > pace::share(RELOADS), "only {probes} probes meanwhile");
    let flows = proxy.flows()?;
    let odd: Vec<_> = flows.iter().filter(|flow| flow.action != "pass" && flow.action != "reject").collect();
    ensure!(odd.is_empty() && !flows.is_empty(), "flows by no rule: {odd:#?}");
    ensure!(proxy.counter("steered_tcp_new")? == 0, "connections were proxied");
    Ok(())
}

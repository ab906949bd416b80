//! What one client can take is bounded: descriptors, flows, its share (F5).

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Proxy};

use crate::common::{Scenarios, at, needs_proxy, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("F5_10000_remotes_of_one_client_port", many_remotes),
    ("F5_the_least_recently_used_udp_flow_goes", full_table),
    ("F5_a_full_flow_table_keeps_what_is_in_use", full_flow_table),
    ("F5_one_client_cannot_take_everything", fair_share),
];

const PORT: u16 = 6000;

/// UDP flows that are open now.
fn udp_flows(proxy: &Proxy) -> Result<u64> {
    proxy.status()?["connections"]["udp"].as_u64().context("no connections.udp in `status --json`")
}

fn many_remotes(lab: &Lab, family: Family) -> Result<()> {
    const REMOTES: u16 = 10_000;
    let senders = Arc::new(Mutex::new((0_u32, BTreeSet::new())));
    let seen = senders.clone();
    // Every address of the server; a few of them answer, on a port beside it.
    let _sink = UdpServer::start(&lab.server, at(family.unspecified(), PORT), move |_, client| {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 += 1;
        seen.1.insert(client);
        None
    })?;
    let answering: Vec<_> = (1..=10).map(|n| at(family.anywhere(n * 1000), PORT + 1)).collect();
    let _servers =
        answering.iter().map(|to| UdpServer::echo(&lab.server, *to)).collect::<Result<Vec<_>>>()?;
    let proxy = start_proxy(lab, "--iface lan --workers 2")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    peer::exchange(&socket, answering[0], b"hello")?;
    let before = proxy.daemon.open_files()?;
    for n in 1..=REMOTES {
        socket.send_to(b"hello", at(family.anywhere(n), PORT))?;
        if n % 100 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for to in &answering {
        socket.send_to(b"hello", to)?;
    }
    let mut answers = BTreeSet::new();
    let mut buffer = [0; 100];
    while answers.len() < answering.len() {
        let (_, from) =
            peer::receive(&socket, &mut buffer).with_context(|| format!("only {answers:?} answered"))?;
        answers.insert(from);
    }
    ensure!(answers == answering.iter().copied().collect(), "answers came from {answers:?}");
    let opened = proxy.daemon.open_files()?.saturating_sub(before);
    ensure!(opened <= 4, "{REMOTES} remotes of one client port cost {opened} descriptors");
    ensure!(udp_flows(&proxy)? == 1, "one client port is {} flows", udp_flows(&proxy)?);
    let (arrived, mapped) = {
        let seen = senders.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.0, seen.1.clone())
    };
    // A full queue of a socket may cost a few of them; the kernel's bound, not the proxy's.
    ensure!(arrived > 9800, "of about 10,000 datagrams {arrived} arrived");
    ensure!(mapped.len() == 1, "the servers see one client port as {mapped:?}");
    Ok(())
}

/// More client ports than flows: the one that was quiet longest makes room, and
/// one that talks stays.
fn full_table(lab: &Lab, family: Family) -> Result<()> {
    const FLOWS: u64 = 50;
    const PORTS: u64 = 200;
    let to = at(family.anywhere(1), PORT);
    let _server = UdpServer::reflector(&lab.server, to)?;
    let proxy = start_proxy(lab, &format!("--iface lan --workers 1 --max-udp-flows {FLOWS}"))?;
    let talker = peer::udp(&lab.client, at(family.client(), 0))?;
    let quiet = peer::udp(&lab.client, at(family.client(), 0))?;
    let (talker_seen, _) = peer::exchange(&talker, to, b"hello")?;
    let (quiet_seen, _) = peer::exchange(&quiet, to, b"hello")?;
    let before = proxy.daemon.open_files()?;
    let mut others = Vec::new();
    for number in 0..PORTS {
        let other = peer::udp(&lab.client, at(family.client(), 0))?;
        peer::exchange(&other, to, b"hello").with_context(|| format!("port {number} of {PORTS}"))?;
        let (seen, _) = peer::exchange(&talker, to, b"still here")?;
        ensure!(seen == talker_seen, "the port that talks got another flow after {number} new ones");
        others.push(other);
    }
    ensure!(udp_flows(&proxy)? <= FLOWS, "{} flows are open, allowed are {FLOWS}", udp_flows(&proxy)?);
    let evicted = proxy.counter("udp_evictions")?;
    ensure!(evicted >= PORTS + 2 - FLOWS, "only {evicted} evictions are counted");
    let opened = proxy.daemon.open_files()?.saturating_sub(before);
    ensure!(opened as u64 <= FLOWS, "{opened} more descriptors than before are open");
    // Who had to go is served again, as a new flow.
    let (seen, _) = peer::exchange(&quiet, to, b"back again")?;
    ensure!(seen != quiet_seen, "the flow that was quiet longest was kept");
    Ok(())
}

/// The kernel's flow table is full many times over: a connection goes on by its
/// socket, a new flow finds room, and the table stays at its size.
fn full_flow_table(lab: &Lab, family: Family) -> Result<()> {
    const ENTRIES: usize = 1024;
    let _server = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let _sink = UdpServer::start(&lab.server, at(family.unspecified(), PORT), |_, _| None)?;
    let proxy = start_proxy(lab, &format!("--iface lan --max-flows {ENTRIES}"))?;
    let mut old = peer::connect(&lab.client, None, at(family.anywhere(1), PORT), Duration::from_secs(5))?;
    peer::ask(&mut old, "before")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for n in 1..=5000 {
        socket.send_to(b"hello", at(family.anywhere(n), PORT))?;
        if n % 100 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let (echo, _) = peer::ask(&mut old, "after").context("a connection whose entry had to go")?;
    ensure!(echo == "after", "the echo was {echo:?}");
    let mut new = peer::connect(&lab.client, None, at(family.anywhere(2), PORT), Duration::from_secs(5))?;
    peer::ask(&mut new, "new").context("a new connection with a full table")?;
    let flows = proxy.flows()?.len();
    ensure!(flows <= ENTRIES, "{flows} flows in a table of {ENTRIES}");
    let created = proxy.counter("flows_created")?;
    ensure!(created >= 5000, "flows_created is {created}");
    let new = new.local_addr()?.to_string();
    ensure!(
        proxy.flows()?.iter().any(|flow| flow.client == new),
        "the newest flow is not in the full flow table"
    );
    Ok(())
}

/// A client that opens all it can is held to its share, counted, and another is served.
fn fair_share(lab: &Lab, family: Family) -> Result<()> {
    const SHARE: u64 = 30;
    needs_proxy()?;
    let to = at(family.anywhere(1), PORT);
    let _tcp = TcpServer::echo(&lab.server, to)?;
    let _udp = UdpServer::echo(&lab.server, to)?;
    let flags = format!("--iface lan --iface lan2 --max-per-client {SHARE} --udp-timeout 1s");
    let proxy = start_proxy(lab, &flags)?;
    let greedy: Vec<_> =
        (0..100).map(|_| peer::udp(&lab.client, at(family.client(), 0))).collect::<Result<_>>()?;
    for socket in &greedy {
        socket.send_to(b"mine", to)?;
    }
    wait_for("the datagrams over the share", Duration::from_secs(5), || {
        Ok(proxy.counter("client_limit_udp")? >= 100 - SHARE)
    })?;
    ensure!(udp_flows(&proxy)? <= SHARE, "the client has {} flows", udp_flows(&proxy)?);
    let told = proxy.daemon.log().matches(&format!("{} has its share", family.client())).count();
    ensure!(told == 1, "told {told} times; {}", proxy.daemon.describe());
    let guest = peer::udp(&lab.guest, at(family.guest(), 0))?;
    peer::exchange(&guest, to, b"and mine?").context("another client, UDP")?;
    wait_for("the end of the client's flows", Duration::from_secs(5), || Ok(udp_flows(&proxy)? == 0))?;

    let connections: Vec<TcpStream> =
        (0..100).filter_map(|_| peer::connect(&lab.client, None, to, Duration::from_secs(2)).ok()).collect();
    wait_for("the connections over the share", Duration::from_secs(5), || {
        Ok(proxy.counter("client_limit_tcp")? >= 100 - SHARE)
    })?;
    let mut other = peer::connect(&lab.guest, None, to, Duration::from_secs(5))?;
    peer::ask(&mut other, "and mine?").context("another client, TCP")?;
    drop(connections);
    wait_for("service for the client after it has let go", Duration::from_secs(5), || {
        let stream = peer::connect(&lab.client, None, to, Duration::from_secs(2));
        Ok(stream.is_ok_and(|mut stream| peer::ask(&mut stream, "mine again").is_ok()))
    })
}

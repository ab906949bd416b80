//! What begins outside, or began before the proxy did, is none of its business
//! (H8, H9).

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{Scenarios, at, expect_service, service, start};
use crate::packet;
use crate::pass::expect_untouched;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H8_servers_behind_the_router", |lab, family| servers(lab, family, "--iface lan")),
    ("H8_servers_behind_dnat", |lab, family| {
        forward_ports(lab)?;
        reached_from_outside(lab, family, "--iface lan", at(family.uplink(), PUBLISHED))
    }),
    ("H8_servers_with_own_traffic", |lab, family| servers(lab, family, "--iface lan --own-traffic")),
    ("H9_connections_older_than_the_proxy_go_on", older),
    ("clsact_H8_servers_behind_the_router", |lab, family| {
        servers(lab, family, "--iface lan --attach clsact")
    }),
];

/// The port of the servers on the client, and the one that the router publishes for them.
const PORT: u16 = 7000;
const PUBLISHED: u16 = 8000;

/// The client's servers, under a port of the router's own outer address.
fn forward_ports(lab: &Lab) -> Result<()> {
    let rules = format!(
        "table inet published {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                iifname wan meta l4proto {{ tcp, udp }} th dport {PUBLISHED} dnat ip to {}:{PORT}
                iifname wan meta l4proto {{ tcp, udp }} th dport {PUBLISHED} dnat ip6 to [{}]:{PORT}
            }}
        }}\n",
        Family::V4.client(),
        Family::V6.client()
    );
    lab.router.cmd("nft").args(["-f", "-"]).stdin(rules).check().map(drop)
}

fn servers(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    reached_from_outside(lab, family, flags, at(family.client(), PORT))
}

/// The client has servers; hosts outside ask them at `target`.
fn reached_from_outside(lab: &Lab, family: Family, flags: &str, target: SocketAddr) -> Result<()> {
    let _tcp = TcpServer::echo(&lab.client, at(family.unspecified(), PORT))?;
    let _udp = UdpServer::echo(&lab.client, at(family.client(), PORT))?;
    let on_router = at(family.uplink(), 7001);
    let _router_tcp = TcpServer::echo(&lab.router, at(family.unspecified(), 7001))?;
    let _router_udp = UdpServer::echo(&lab.router, on_router)?;
    let running = start(lab, flags)?;
    for from in [family.server(), family.anywhere(1), family.anywhere(0x0102)] {
        for to in [target, on_router] {
            ask_both(&lab.server, from, to).with_context(|| format!("{from} asks {to}"))?;
        }
    }
    answer_in_reverse(lab, family)?;
    expect_untouched(&running)?;

    // The same client as a client: its own flows are captured, even to a host
    // that has asked it before, and even from the port of its server.
    let peer_address = at(family.anywhere(1), 5353);
    let _peer = UdpServer::reflector(&lab.server, peer_address)?;
    let own = at(family.client(), 1234);
    let (seen, _) = peer::exchange(&peer::udp(&lab.client, own)?, peer_address, b"who am I?")?;
    if running.proxy().is_some() {
        let seen = String::from_utf8_lossy(&seen).into_owned();
        ensure!(seen != own.to_string(), "the client's own flow went past the proxy");
    }
    running.expect_udp(1)
}

/// TCP with several lines, UDP in one packet and in fragments: each reply must
/// come from where the request went.
fn ask_both(namespace: &Namespace, from: IpAddr, to: SocketAddr) -> Result<()> {
    let mut stream = peer::connect(namespace, Some(at(from, 0)), to, Duration::from_secs(5))?;
    for line in ["one", "two", "three"] {
        let (echo, _) = peer::ask(&mut stream, line)?;
        ensure!(echo == line, "the echo of {line} was {echo:?}");
    }
    let socket = peer::udp(namespace, at(from, 0))?;
    for length in [10, 1000, 4000, 10] {
        let datagram = peer::pattern(length);
        let (echo, sender) = peer::exchange(&socket, to, &datagram)?;
        ensure!(sender == to, "{to} was asked and {sender} answered");
        ensure!(echo == datagram, "{length} bytes came back changed");
    }
    Ok(())
}

/// An answer of a server behind the router whose fragments arrive last one first.
fn answer_in_reverse(lab: &Lab, family: Family) -> Result<()> {
    let behind = peer::udp(&lab.client, at(family.client(), 7002))?;
    let outside = peer::udp(&lab.server, at(family.anywhere(3), 0))?;
    outside.send_to(b"anybody there?", behind.local_addr()?)?;
    let mut buffer = vec![0; 65_536];
    let (_, asker) = peer::receive(&behind, &mut buffer).context("no question from outside")?;
    let answer = peer::pattern(4000);
    let mut packets = packet::udp_fragments(behind.local_addr()?, asker, &answer, 1400, 7)?;
    packets.reverse();
    packet::send(&lab.client, asker.ip(), &packets)?;
    let (length, from) =
        peer::receive(&outside, &mut buffer).context("no answer of fragments in reverse order")?;
    ensure!(from == behind.local_addr()?, "the answer of fragments in reverse order came from {from}");
    ensure!(buffer[..length] == answer, "the answer of fragments in reverse order was changed");
    Ok(())
}

/// Keeps a line of talk going until told to stop: how often it went to and fro.
fn talk(mut stream: std::net::TcpStream, stop: &AtomicBool) -> Result<u32> {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        let line = format!("{rounds} {}", "x".repeat(3000));
        let (echo, _) = peer::ask(&mut stream, &line).with_context(|| format!("in round {rounds}"))?;
        ensure!(echo == line, "in round {rounds} the echo differs");
        rounds += 1;
    }
    Ok(rounds)
}

/// Busy and idle connections each way, and of the router itself, from before
/// the start of the proxy until after its end.
fn older(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let _behind = TcpServer::echo(&lab.client, at(family.client(), PORT))?;
    let (outward, inward) = (at(family.anywhere(7), crate::common::SERVICE_PORT), at(family.client(), PORT));
    let wait = Duration::from_secs(5);
    let connect_all = || -> Result<[std::net::TcpStream; 3]> {
        Ok([
            peer::connect(&lab.client, None, outward, wait)?,
            peer::connect(&lab.server, None, inward, wait)?,
            peer::connect(&lab.router, None, outward, wait)?,
        ])
    };
    let (busy, mut idle) = (connect_all()?, connect_all()?);
    for stream in &mut idle {
        peer::ask(stream, "before")?;
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let talks = busy.map(|stream| scope.spawn(move || talk(stream, stop)));
        let mut during = || -> Result<()> {
            std::thread::sleep(Duration::from_millis(300));
            let running = start(lab, "--iface lan --own-traffic")?;
            expect_service(lab, family).context("new ones while the proxy runs")?;
            std::thread::sleep(Duration::from_millis(500));
            for (stream, which) in idle.iter_mut().zip(["client", "server", "router"]) {
                let (echo, _) = peer::ask(stream, "while it runs")
                    .with_context(|| format!("a connection that the {which} had opened before"))?;
                ensure!(echo == "while it runs", "the echo was {echo:?}");
            }
            running.expect_tcp(1)?;
            if let Some(proxy) = running.proxy() {
                ensure!(proxy.counter("pass_midstream")? > 0, "nothing passed as older than the proxy");
            }
            running.terminate()?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        };
        let result = during();
        stop.store(true, Ordering::Relaxed);
        for (talk, which) in talks.into_iter().zip(["client", "server", "router"]) {
            let rounds = talk
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                .with_context(|| format!("a busy connection that the {which} had opened before"))?;
            ensure!(rounds > 10, "only {rounds} rounds on the connection of the {which}");
        }
        result
    })?;
    for stream in &mut idle {
        peer::ask(stream, "after").context("a connection older than the proxy, after its end")?;
    }
    Ok(())
}

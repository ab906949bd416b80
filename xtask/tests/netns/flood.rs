//! A flood from random sources (F6): memory stays bounded, what is there goes on,
//! and what is new is still served.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, at, start};
use crate::packet::{self, Segment};

pub(crate) const SCENARIOS: Scenarios = &[("F6_syn_and_udp_flood_from_random_sources", flood)];

const PORT: u16 = 6100;
const LENGTH: Duration = Duration::from_secs(10);
/// Packets in a burst, of each protocol, and bursts a second: 4,000 packets a second
/// in all, 40,000 sources.
const BURST: u32 = 20;
const BURSTS: u32 = 100;
/// How much larger the proxy may be during the flood than before.
const GROWTH: u64 = 128 << 20;

/// The `n`th source of the flood, anywhere in a network behind the client.
fn source(family: Family, n: u32) -> IpAddr {
    // Knuth's multiplicative hash: no two of them are alike, nor in order.
    let scattered = n.wrapping_mul(2_654_435_761);
    let bytes = scattered.to_be_bytes();
    let (high, low) = (u16::from_be_bytes([bytes[0], bytes[1]]), u16::from_be_bytes([bytes[2], bytes[3]]));
    family.pick(
        IpAddr::V4(Ipv4Addr::new(10, bytes[1], bytes[2], bytes[3])),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, high, low)),
    )
}

/// Sends bursts until told to stop; how many packets.
fn attack(lab: &Lab, family: Family, stop: &AtomicBool) -> Result<u32> {
    let to = at(family.anywhere(1), PORT);
    let socket = lab.client.try_enter(|| {
        // IPPROTO_RAW, raw(7): the packets bring their own header.
        Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::from(255)))
    })?;
    let (started, mut sent) = (Instant::now(), 0);
    for burst in 1.. {
        if stop.load(Ordering::Relaxed) || started.elapsed() >= LENGTH {
            break;
        }
        for _ in 0..BURST {
            sent += 1;
            let from = at(source(family, sent), u16::try_from(1024 + sent % 60_000)?);
            let syn = packet::tcp(from, to, &Segment { sequence: sent, syn: true, ..Segment::default() })?;
            let udp = packet::udp_fragments(from, to, b"flood", 1000, 1)?;
            for packet in std::iter::once(&syn).chain(&udp) {
                // A full queue loses it: that is what a flood does.
                let _ = socket.send_to(packet, &at(to.ip(), 0).into());
            }
        }
        std::thread::sleep(
            (started + Duration::from_secs(1) * burst / BURSTS).saturating_duration_since(Instant::now()),
        );
    }
    Ok(2 * sent)
}

fn flood(lab: &Lab, family: Family) -> Result<()> {
    // Answers to the flood find a way, as on the Internet, and nobody there.
    lab.router.sh(&format!(
        "ip route add {} via {}",
        family.pick("10.0.0.0/8", "2001:db8:bad::/48"),
        family.client()
    ))?;
    let to = at(family.anywhere(1), PORT);
    let _tcp = TcpServer::echo(&lab.server, to)?;
    let _sink = UdpServer::start(&lab.server, to, |_, _| None)?;
    let echo = at(family.anywhere(2), PORT);
    let _udp = UdpServer::reflector(&lab.server, echo)?;
    let running = start(lab, "--iface lan --udp-timeout-unreplied 2s")?;
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    peer::ask(&mut stream, "before")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (mapping, _) = peer::exchange(&socket, echo, b"before")?;
    let before = running.proxy().map(|proxy| proxy.daemon.memory()).transpose()?;
    let files_before = running.proxy().map(|proxy| proxy.daemon.open_files()).transpose()?;

    let stop = AtomicBool::new(false);
    let (mut rounds, mut largest) = (0, 0);
    let sent = std::thread::scope(|scope| {
        let attacker = scope.spawn(|| attack(lab, family, &stop));
        let mut during = || -> Result<()> {
            while !attacker.is_finished() {
                let (line, _) = peer::ask(&mut stream, "during").context("an open connection")?;
                ensure!(line == "during", "the echo was {line:?}");
                let (seen, _) = peer::exchange(&socket, echo, b"during").context("an open UDP flow")?;
                ensure!(seen == mapping, "the UDP flow that talks was thrown out by the flood");
                let mut new = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
                peer::ask(&mut new, "new").context("a new connection")?;
                let memory = running.proxy().map(|proxy| proxy.daemon.memory()).transpose()?;
                largest = largest.max(memory.unwrap_or(0));
                rounds += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        };
        let result = during();
        stop.store(true, Ordering::Relaxed);
        let sent = attacker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        result.with_context(|| format!("after {rounds} rounds and {sent} packets of the flood"))?;
        anyhow::Ok(sent)
    })?;
    ensure!(sent > 10_000, "a flood of {sent} packets is none");
    ensure!(rounds > 20, "only {rounds} rounds of service during the flood");
    let (Some(proxy), Some(before), Some(files_before)) = (running.proxy(), before, files_before) else {
        return Ok(());
    };
    let steered = (proxy.counter("steered_tcp_new")?, proxy.counter("steered_udp")?);
    ensure!(steered.0 > 5000 && steered.1 > 5000, "the flood went past the proxy: {steered:?}");
    ensure!(largest < before + GROWTH, "the proxy grew from {before} to {largest} bytes");
    xtask::lab::daemon::wait_for("the end of the flood's flows", Duration::from_secs(10), || {
        Ok(proxy.daemon.open_files()? <= files_before + 8)
    })
}

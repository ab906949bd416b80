//! Which traffic is captured: interfaces, protocols, ports, prefixes. What is
//! not captured is forwarded untouched, with the client's own port.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{Scenarios, at, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("captured_interfaces", interfaces),
    ("captured_interfaces_by_pattern", interface_pattern),
    ("captured_protocols", protocols),
    ("captured_families", families),
    ("captured_ports", ports),
    ("captured_destinations", destinations),
    ("captured_sources", sources),
    ("clsact_captured_destinations", |lab, family| destinations_with(lab, family, "--attach clsact ")),
    ("another_mark_table_and_port", other_numbers),
];

/// The way that traffic took to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Proxied,
    Forwarded,
}
use Way::{Forwarded, Proxied};

/// Servers on one port of every address that say what address and port they see.
pub(crate) struct Reflectors {
    _tcp: TcpServer,
    _udp: Vec<UdpServer>,
}

pub(crate) fn reflectors(namespace: &Namespace, targets: &[SocketAddr]) -> Result<Vec<Reflectors>> {
    let reflect = |to: &SocketAddr| {
        let tcp = TcpServer::start(namespace, *to, |mut stream, client| {
            // A failure shows at the client.
            let _ = stream.write_all(client.to_string().as_bytes());
        })?;
        Ok(Reflectors { _tcp: tcp, _udp: vec![UdpServer::reflector(namespace, *to)?] })
    };
    targets.iter().map(reflect).collect()
}

/// Outside every range of ephemeral ports, so that a proxy that chooses a port
/// never chooses the client's.
const PORTS: Range<u16> = 20_000..30_000;
static USED: AtomicU16 = AtomicU16::new(0);

/// An address with a port that has not been used for thousands of connections.
pub(crate) fn unused(address: IpAddr) -> SocketAddr {
    at(address, PORTS.start + USED.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start))
}

pub(crate) fn judge(seen: SocketAddr, from: SocketAddr) -> Result<Way> {
    ensure!(seen.ip() == from.ip(), "the server sees {seen} instead of {from}");
    Ok(if seen.port() == from.port() { Forwarded } else { Proxied })
}

fn tcp_way(client: &Namespace, address: IpAddr, to: SocketAddr) -> Result<Way> {
    let from = unused(address);
    let mut stream = peer::connect(client, Some(from), to, Duration::from_secs(5))?;
    let mut seen = String::new();
    stream.read_to_string(&mut seen)?;
    judge(seen.parse()?, from)
}

fn udp_way(client: &Namespace, address: IpAddr, to: SocketAddr) -> Result<Way> {
    let from = unused(address);
    let (seen, replied) = peer::exchange(&peer::udp(client, from)?, to, b"who am I?")?;
    ensure!(replied == to, "the reply to a datagram for {to} came from {replied}");
    judge(String::from_utf8_lossy(&seen).parse()?, from)
}

/// Makes sure of the way of both protocols.
pub(crate) fn expect(client: &Namespace, address: IpAddr, to: SocketAddr, expected: Way) -> Result<()> {
    for (protocol, way) in [("TCP", tcp_way(client, address, to)?), ("UDP", udp_way(client, address, to)?)] {
        ensure!(way == expected, "{protocol} from {address} to {to} was {way:?}, expected {expected:?}");
    }
    Ok(())
}

const SERVICE: u16 = 7070;

fn interfaces(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect(&lab.client, family.client(), to, Proxied)?;
    expect(&lab.guest, family.guest(), to, Forwarded)?;
    proxy.terminate(Duration::from_secs(10))?;
    expect(&lab.client, family.client(), to, Forwarded)?;
    let proxy = start_proxy(lab, "--iface lan --iface lan2")?;
    expect(&lab.client, family.client(), to, Proxied)?;
    expect(&lab.guest, family.guest(), to, Proxied)?;
    for (client, interface) in [(family.client(), "lan"), (family.guest(), "lan2")] {
        let flows = proxy.flows()?;
        let prefix = at(client, 0).to_string();
        let of_client: Vec<_> =
            flows.iter().filter(|flow| flow.client.starts_with(prefix.trim_end_matches('0'))).collect();
        ensure!(
            !of_client.is_empty() && of_client.iter().all(|flow| flow.iface.as_deref() == Some(interface)),
            "flows of {client} should be listed with interface {interface}: {of_client:#?}"
        );
    }
    Ok(())
}

fn interface_pattern(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    let _proxy = start_proxy(lab, "--iface lan*")?;
    expect(&lab.client, family.client(), to, Proxied)?;
    expect(&lab.guest, family.guest(), to, Proxied)
}

fn protocols(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    for (flags, tcp, udp) in [
        ("--proto tcp", Proxied, Forwarded),
        ("--proto udp", Forwarded, Proxied),
        ("--proto tcp,udp", Proxied, Proxied),
    ] {
        let proxy = start_proxy(lab, &format!("--iface lan {flags}"))?;
        let ways = (tcp_way(&lab.client, family.client(), to)?, udp_way(&lab.client, family.client(), to)?);
        ensure!(ways == (tcp, udp), "with {flags}, TCP and UDP were {ways:?}, expected {:?}", (tcp, udp));
        proxy.terminate(Duration::from_secs(10))?;
    }
    Ok(())
}

fn families(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    for (flag, captured) in [("-4", Family::V4), ("-6", Family::V6)] {
        let proxy = start_proxy(lab, &format!("--iface lan {flag}"))?;
        expect(&lab.client, family.client(), to, if captured == family { Proxied } else { Forwarded })?;
        proxy.terminate(Duration::from_secs(10))?;
    }
    Ok(())
}

fn ports(lab: &Lab, family: Family) -> Result<()> {
    let cases = [
        (52, Forwarded),
        (53, Proxied),
        (54, Forwarded),
        (79, Forwarded),
        (80, Proxied),
        (999, Forwarded),
        (1000, Proxied),
        (1500, Proxied),
        (2000, Proxied),
        (2001, Forwarded),
        (65_535, Forwarded),
    ];
    let targets: Vec<_> = cases.iter().map(|(port, _)| at(family.anywhere(1), *port)).collect();
    let _servers = reflectors(&lab.server, &targets)?;
    let _proxy = start_proxy(lab, "--iface lan --dport 53,80,1000-2000")?;
    for (port, way) in cases {
        expect(&lab.client, family.client(), at(family.anywhere(1), port), way)?;
    }
    Ok(())
}

fn destinations(lab: &Lab, family: Family) -> Result<()> {
    destinations_with(lab, family, "")
}

fn destinations_with(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let (inside, hole, outside) = (
        at(family.anywhere(0x0105), SERVICE),
        at(family.anywhere(0x0121), SERVICE),
        at(family.anywhere(0x0205), SERVICE),
    );
    let _servers = reflectors(&lab.server, &[inside, hole, outside])?;
    let net = family.anywhere_net(1);
    // 16 addresses in the middle of it.
    let part = format!("{}/{}", family.anywhere(0x0120), family.pick(28, 124));
    for (more, ways) in [
        (format!("--to {net}"), [Proxied, Proxied, Forwarded]),
        (format!("--not-to {net}"), [Forwarded, Forwarded, Proxied]),
        (format!("--to {net} --not-to {part}"), [Proxied, Forwarded, Forwarded]),
        // The order of flags means nothing, and what is excluded stays excluded.
        (format!("--not-to {net} --to {part}"), [Forwarded, Forwarded, Forwarded]),
        (format!("--to {}", inside.ip()), [Proxied, Forwarded, Forwarded]),
        // A prefix of the other family only: nothing of this one is meant.
        (
            format!("--to {}", family.pick(Family::V6, Family::V4).anywhere_net(1)),
            [Forwarded, Forwarded, Forwarded],
        ),
    ] {
        let proxy = start_proxy(lab, &format!("--iface lan {flags}{more}"))?;
        for (to, way) in [inside, hole, outside].into_iter().zip(ways) {
            expect(&lab.client, family.client(), to, way)
                .map_err(|error| error.context(format!("with {more}")))?;
        }
        proxy.terminate(Duration::from_secs(10))?;
    }
    Ok(())
}

fn sources(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    let net = family.pick("192.0.2.0/24", "2001:db8:1::/64");
    let client = family.client();
    for (more, ways) in [
        (format!("--from {net}"), [Proxied, Forwarded]),
        (format!("--not-from {net}"), [Forwarded, Proxied]),
        (format!("--from {net} --not-from {client}"), [Forwarded, Forwarded]),
        (format!("--from {client} --from {}", family.guest()), [Proxied, Proxied]),
    ] {
        let proxy = start_proxy(lab, &format!("--iface lan --iface lan2 {more}"))?;
        for ((namespace, address), way) in
            [(&lab.client, client), (&lab.guest, family.guest())].into_iter().zip(ways)
        {
            expect(namespace, address, to, way).map_err(|error| error.context(format!("with {more}")))?;
        }
        proxy.terminate(Duration::from_secs(10))?;
    }
    Ok(())
}

fn other_numbers(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), SERVICE);
    let _servers = reflectors(&lab.server, &[to])?;
    let flags = "--iface lan --tproxy-mark 0x4000/0xff00 --own-mark 0x77 --table 4242 --rule-priority 77 --on-port 16001";
    let proxy = start_proxy(lab, flags)?;
    let rules = lab.router.sh(&format!("ip {} rule show", family.flag()))?.stdout;
    let rule = rules.lines().find(|line| line.contains("lookup 4242")).unwrap_or_default();
    ensure!(
        rule.starts_with("77:") && rule.contains("fwmark 0x4000/0xff00"),
        "no rule of priority 77 for mark 0x4000/0xff00:\n{rules}"
    );
    expect(&lab.client, family.client(), to, Proxied)?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

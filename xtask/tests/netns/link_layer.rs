//! Devices of other kinds than Ethernet (H4).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::wire::{self, Wire};
use xtask::lab::{Family, Lab};

use crate::common::{Running, Scenarios, at, expect_service, service, start};

pub(crate) const SCENARIOS: Scenarios = &[
    ("H4_clients_behind_a_tun_device", tun_capture),
    ("H4_servers_behind_a_tun_device", tun_uplink),
    ("H4_own_traffic_leaves_by_a_tun_device", tun_own),
];

/// The client reaches the router by a tunnel.
fn tun_capture(lab: &Lab, family: Family) -> Result<()> {
    let _wire = Wire::lay(lab, (&lab.router, "tun0"), (&lab.client, "tun0"))?;
    for family in Family::ALL {
        let (client, anywhere) = (family.client(), family.anywhere_net(0));
        lab.router.ip_batch(&format!("route replace {client} dev tun0\n"))?;
        lab.client.ip_batch(&format!("route add {anywhere} dev tun0 src {client}\n"))?;
    }
    let _service = service(lab, family)?;
    let running = start(lab, "--iface tun0")?;
    expect_service(lab, family)?;
    expect_large_datagrams(lab, family)?;
    running.expect_tcp(1)?;
    running.expect_udp(2)
}

/// The router reaches the servers by a tunnel; their answers to the client's
/// address come back in by it.
fn tun_uplink(lab: &Lab, family: Family) -> Result<()> {
    let _wire = uplink(lab)?;
    let _service = service(lab, family)?;
    let running = start(lab, "--iface lan")?;
    expect_service(lab, family)?;
    expect_large_datagrams(lab, family)?;
    running.expect_tcp(1)?;
    running.expect_udp(2)?;
    running.expect("steered_udp_return", 2)
}

/// What the router itself sends leaves by the tunnel. The turn back to `lo`
/// needs an Ethernet header that a packet there does not have.
fn tun_own(lab: &Lab, family: Family) -> Result<()> {
    let _wire = uplink(lab)?;
    let to = at(family.anywhere(7), 9200);
    let _tcp = TcpServer::echo(&lab.server, at(family.unspecified(), 9200))?;
    let _udp = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, "--own-traffic")?;
    let mut stream = peer::connect(&lab.router, None, to, Duration::from_secs(5))?;
    // Segments as large as the device takes them.
    let line = "x".repeat(64 << 10);
    for _ in 0..4 {
        let (echo, _) = peer::ask(&mut stream, &line)?;
        ensure!(echo == line, "{} bytes over TCP came back as {}", line.len(), echo.len());
    }
    let socket = peer::udp(&lab.router, at(family.unspecified(), 0))?;
    for length in [0, 1000, 1500 - family.udp_overhead(), 4000] {
        let datagram = peer::pattern(length);
        let (echo, from) = peer::exchange(&socket, to, &datagram)?;
        ensure!(echo == datagram, "{length} bytes over UDP came back as {}", echo.len());
        ensure!(from == to, "the reply came from {from}, expected {to}");
    }
    expect_own_flow(&running, "tcp", family, to)?;
    expect_own_flow(&running, "udp", family, to)
}

fn uplink(lab: &Lab) -> Result<Wire> {
    let wire = Wire::lay(lab, (&lab.router, "tun0"), (&lab.server, "tun0"))?;
    for family in Family::ALL {
        let (anywhere, client) = (family.pick("198.18.0.0/15", "2001:db8:f000::/36"), family.client());
        lab.router.ip_batch(&format!("route replace {anywhere} dev tun0\n"))?;
        lab.server.ip_batch(&format!("route add {client} dev tun0\n"))?;
    }
    Ok(wire)
}

fn expect_large_datagrams(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for length in [1500 - family.udp_overhead(), 4000] {
        let datagram = peer::pattern(length);
        let (echo, _) = peer::exchange(&socket, to, &datagram)?;
        ensure!(echo == datagram, "{length} bytes over UDP came back as {}", echo.len());
    }
    Ok(())
}

/// Makes sure that a flow of the router itself went through the proxy.
fn expect_own_flow(running: &Running, protocol: &str, family: Family, to: SocketAddr) -> Result<()> {
    let Some(proxy) = running.proxy() else { return Ok(()) };
    let flows = proxy.flows()?;
    let own = flows.iter().find(|flow| {
        flow.protocol == protocol
            && flow.destination == to.to_string()
            && flow.client.contains(&wire::near(family).to_string())
    });
    ensure!(own.is_some_and(|flow| flow.action == "proxy"), "no proxied {protocol} flow to {to}: {flows:#?}");
    Ok(())
}

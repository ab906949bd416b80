//! Capture on every kind of link (H4): VLAN device and trunk, macvlan, bridge,
//! and links without a link-layer header.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Running, Scenarios, Skip, at, expect_service, service, start, start_proxy};
use crate::tun::Wire;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H4_vlan_device", vlan_device),
    ("H4_vlan_trunk", vlan_trunk),
    ("H4_macvlan", |lab, family| macvlan(lab, family, "--iface mac0")),
    ("H4_bridge", |lab, family| bridge(lab, family, "--iface br-lan")),
    ("H4_tun", tun),
    ("H4_point_to_point", point_to_point),
    ("H4_tun_as_uplink", tun_uplink),
    ("H4_tun_as_uplink_source_client_port", |lab, family| {
        uplink(lab, family, "--iface lan --source client-port")
    }),
    ("H4_own_traffic_by_a_tun_device", |lab, family| own(lab, family, "--own-traffic")),
    ("clsact_H4_own_traffic_by_a_tun_device", |lab, family| {
        own(lab, family, "--own-traffic --attach clsact")
    }),
    ("clsact_H4_tun", |lab, family| tunnel(lab, family, Form::Subnet, "--iface tun0 --attach clsact")),
];

/// Which network of the lab is moved to other devices.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Between client and router.
    Lan,
    /// Between router and server.
    Wan,
}

/// How the ends of a link are addressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Both in one subnet, as on Ethernet.
    Subnet,
    /// Each end knows the other's address and no subnet, as on a PPP line.
    PointToPoint,
}

/// Moves addresses and routes of a network to another device at each end.
pub(crate) fn relink(
    lab: &Lab,
    side: Side,
    edge_device: &str,
    router_device: &str,
    form: Form,
) -> Result<()> {
    type Address = fn(Family) -> IpAddr;
    let (edge, old, own, router): (_, _, Address, Address) = match side {
        Side::Lan => (&lab.client, "lan", Family::client, Family::router),
        Side::Wan => (&lab.server, "wan", Family::server, Family::uplink),
    };
    for (namespace, device) in [(edge, "eth0"), (&lab.router, old)] {
        for command in ["ip -4 route flush dev", "ip -6 route flush dev", "ip addr flush dev"] {
            namespace.sh(&format!("{command} {device}"))?;
        }
    }
    let addresses = |device: &str, own: Address, peer: Address| {
        let line = |family: Family| match form {
            Form::Subnet => format!("addr add {}/{} dev {device}", own(family), family.pick(24, 64)),
            Form::PointToPoint => {
                format!(
                    "addr add {} peer {}/{} dev {device}",
                    own(family),
                    peer(family),
                    family.pick(32, 128)
                )
            }
        };
        format!("link set {device} up\n{}\n{} nodad\n", line(Family::V4), line(Family::V6))
    };
    let route = |to: &str, via: IpAddr, device: &str| match form {
        // On link: the carrier may still be on its way up.
        Form::Subnet => format!("route add {to} via {via} dev {device} onlink\n"),
        Form::PointToPoint => format!("route add {to} dev {device}\n"),
    };
    edge.ip_batch(&format!(
        "{}{}{}",
        addresses(edge_device, own, router),
        route("default", router(Family::V4), edge_device),
        route("::/0", router(Family::V6), edge_device)
    ))?;
    lab.router.ip_batch(&addresses(router_device, router, own))?;
    if side == Side::Wan {
        lab.router.ip_batch(&format!(
            "{}{}",
            route("198.18.0.0/15", own(Family::V4), router_device),
            route("2001:db8:f000::/36", own(Family::V6), router_device)
        ))?;
    }
    Ok(())
}

/// Makes sure that both protocols work over the changed link, in small and in
/// large, that the proxy takes them and that the server sees the client.
fn expect_captured(lab: &Lab, family: Family, running: &Running, iface: &str) -> Result<()> {
    const PORT: u16 = 5400;
    expect_service(lab, family)?;
    let to = at(family.anywhere(9), PORT);
    let _tcp = TcpServer::start(&lab.server, to, |mut stream, client| {
        // A failure shows at the client.
        let _ = stream.write_all(format!("{client}\n").as_bytes());
        let _ = peer::read(&mut stream, &mut [0; 16]);
    })?;
    let _udp = UdpServer::start(&lab.server, to, |datagram, client| {
        let mut reply = format!("{client}\n").into_bytes();
        reply.extend_from_slice(datagram);
        Some(reply)
    })?;
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    let seen: SocketAddr = peer::read_line(&mut stream)?.parse()?;
    ensure!(seen.ip() == family.client(), "over TCP the server sees {seen}");
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    // In one packet and in fragments.
    for length in [100, 4000] {
        let datagram = peer::pattern(length);
        let (reply, from) = peer::exchange(&socket, to, &datagram)?;
        let seen: SocketAddr = peer::read_line(&mut reply.as_slice())?.parse()?;
        ensure!(seen.ip() == family.client() && from == to, "over UDP {from} sees {seen}");
        ensure!(reply.ends_with(&datagram), "{length} bytes came back changed");
    }
    running.expect_tcp(2)?;
    running.expect_udp(3)?;
    if let Some(proxy) = running.proxy() {
        let flow = proxy.flow("tcp", &stream.local_addr()?.to_string(), &to.to_string())?;
        ensure!(flow.iface.as_deref() == Some(iface), "the flow is told to have arrived on {:?}", flow.iface);
        ensure!(flow.packets_up > 0 && flow.packets_down > 0, "one direction was not counted: {flow:?}");
    }
    Ok(())
}

/// Makes `name` from `link` with identifier 10, or skips where the kernel cannot.
fn vlan(lab: &Lab) -> Result<()> {
    for (namespace, link) in [(&lab.client, "eth0"), (&lab.router, "lan")] {
        let name = format!("{link}.10");
        let made = namespace
            .cmd("ip")
            .args(["link", "add", "link", link, "name", &name, "type", "vlan", "id", "10"])
            .run()?;
        if made.stderr.contains("Unknown device type") {
            bail!(Skip("this kernel makes no VLAN devices (it lacks CONFIG_VLAN_8021Q)".into()));
        }
        made.expect_code(0)?;
    }
    relink(lab, Side::Lan, "eth0.10", "lan.10", Form::Subnet)
}

fn vlan_device(lab: &Lab, family: Family) -> Result<()> {
    vlan(lab)?;
    let _service = service(lab, family)?;
    let running = start(lab, "--iface lan.10")?;
    expect_captured(lab, family, &running, "lan.10")
}

/// Tagged frames of a trunk belong to its VLAN devices: capture on the trunk
/// leaves them alone.
fn vlan_trunk(lab: &Lab, family: Family) -> Result<()> {
    vlan(lab)?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    expect_service(lab, family)?;
    let (passed, steered) = (proxy.counter("pass_vlan")?, proxy.counter("steered_tcp_new")?);
    ensure!(passed > 0 && steered == 0, "pass_vlan is {passed}, steered_tcp_new {steered}");
    Ok(())
}

pub(crate) fn macvlan(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    // Else `lan` answers for the address of its macvlan as well.
    lab.router.set_sysctls(&[("net/ipv4/conf/all/arp_ignore", "1")])?;
    lab.router.sh("ip link add mac0 link lan type macvlan mode bridge")?;
    relink(lab, Side::Lan, "eth0", "mac0", Form::Subnet)?;
    let _service = service(lab, family)?;
    let running = start(lab, flags)?;
    expect_captured(lab, family, &running, "mac0")
}

pub(crate) fn bridge(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    lab.router.ip_batch("link add br-lan type bridge\nlink set lan master br-lan\n")?;
    relink(lab, Side::Lan, "eth0", "br-lan", Form::Subnet)?;
    let _service = service(lab, family)?;
    let running = start(lab, flags)?;
    expect_captured(lab, family, &running, "br-lan")
}

fn tun(lab: &Lab, family: Family) -> Result<()> {
    tunnel(lab, family, Form::Subnet, "--iface tun0")
}

fn point_to_point(lab: &Lab, family: Family) -> Result<()> {
    tunnel(lab, family, Form::PointToPoint, "--iface tun0")
}

pub(crate) fn tunnel(lab: &Lab, family: Family, form: Form, flags: &str) -> Result<()> {
    let _wire = Wire::lay((&lab.client, "tun0"), (&lab.router, "tun0"))?;
    relink(lab, Side::Lan, "tun0", "tun0", form)?;
    let _service = service(lab, family)?;
    let running = start(lab, flags)?;
    expect_captured(lab, family, &running, "tun0")
}

fn tun_uplink(lab: &Lab, family: Family) -> Result<()> {
    uplink(lab, family, "--iface lan --source client")
}

fn uplink(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _wire = Wire::lay((&lab.router, "tun0"), (&lab.server, "tun0"))?;
    relink(lab, Side::Wan, "tun0", "tun0", Form::PointToPoint)?;
    let _service = service(lab, family)?;
    let running = start(lab, flags)?;
    expect_captured(lab, family, &running, "lan").context("over an uplink without a link-layer header")
}

/// What the router itself sends leaves by the tunnel. The turn back to `lo`
/// needs an Ethernet header that a packet there does not have.
pub(crate) fn own(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _wire = Wire::lay((&lab.router, "tun0"), (&lab.server, "tun0"))?;
    relink(lab, Side::Wan, "tun0", "tun0", Form::PointToPoint)?;
    let to = at(family.anywhere(7), 9200);
    let _tcp = TcpServer::echo(&lab.server, at(family.unspecified(), to.port()))?;
    let _udp = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, flags)?;
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
    let Some(proxy) = running.proxy() else { return Ok(()) };
    for (protocol, port) in [("tcp", stream.local_addr()?.port()), ("udp", socket.local_addr()?.port())] {
        let flow = proxy.flow(protocol, &at(family.uplink(), port).to_string(), &to.to_string())?;
        ensure!(flow.action == "proxy", "the router's own flow went past the proxy: {flow:?}");
    }
    Ok(())
}

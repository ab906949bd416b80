//! ICMP errors of the upstream side: they reach the proxy's own sockets and,
//! for relayed UDP, the client (T5, F11).

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, at, start};
use crate::nat::Nat;
use crate::sockopt;

pub(crate) const SCENARIOS: Scenarios = &[
    ("ICMP_closed_udp_port_is_refused", |lab, family| refused(lab, family, "--iface lan")),
    ("ICMP_closed_udp_port_is_refused_source_proxy", |lab, family| {
        refused(lab, family, "--iface lan --source proxy")
    }),
    ("ICMP_closed_udp_port_is_refused_through_nat", |lab, family| {
        Nat::Masquerade.apply(lab, family)?;
        refused(lab, family, "--iface lan")
    }),
    ("ICMP_no_route_for_udp", no_route),
    ("ICMP_small_mtu_beyond_the_gateway_tcp", |lab, family| bulk(lab, family, 1280)),
    ("ICMP_mtu_of_1400_beyond_the_gateway_tcp", |lab, family| bulk(lab, family, 1400)),
    ("ICMP_small_mtu_beyond_the_gateway_and_nat_tcp", |lab, family| {
        Nat::Masquerade.apply(lab, family)?;
        bulk(lab, family, 1280)
    }),
    ("ICMP_small_mtu_beyond_the_gateway_udp", mtu_for_udp),
    ("ICMP_small_mtu_of_the_uplink_udp", mtu_of_uplink),
    ("T5_unreachable_beyond_the_next_hop", unreachable),
    ("T5_unreachable_beyond_the_next_hop_and_nat", |lab, family| {
        Nat::Masquerade.apply(lab, family)?;
        unreachable(lab, family)
    }),
    ("F11_a_flow_goes_on_after_errors", flow_goes_on),
];

const PORT: u16 = 9800;

/// A UDP socket of the client, connected: the kernel tells it of errors.
fn connected(lab: &Lab, to: SocketAddr, family: Family) -> Result<UdpSocket> {
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    socket.connect(to)?;
    // All errors, also those that may pass.
    let (level, option) = family.pick((libc::SOL_IP, libc::IP_RECVERR), (libc::SOL_IPV6, libc::IPV6_RECVERR));
    sockopt::set(socket.as_fd(), level, option, 1)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    Ok(socket)
}

fn expect_error(socket: &UdpSocket, expected: ErrorKind) -> Result<()> {
    socket.send(b"anybody there?")?;
    match peer::receive(socket, &mut [0; 16]) {
        Err(error) if error.kind() == expected => Ok(()),
        other => bail!("the client was told {other:?}, expected {expected:?}"),
    }
}

fn refused(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let running = start(lab, flags)?;
    let socket = connected(lab, at(family.anywhere(1), PORT), family)?;
    for _ in 0..3 {
        expect_error(&socket, ErrorKind::ConnectionRefused)?;
    }
    running.expect_udp(3)
}

fn no_route(lab: &Lab, family: Family) -> Result<()> {
    lab.router.ip_batch(&format!("route add unreachable {}\n", family.anywhere_net(9)))?;
    let running = start(lab, "--iface lan")?;
    let socket = connected(lab, at(family.anywhere(0x0901), PORT), family)?;
    expect_error(&socket, family.pick(ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable))?;
    running.expect_udp(1)
}

/// The destination of [`narrow`].
fn far(family: Family) -> std::net::IpAddr {
    family.anywhere(0x1401)
}

/// Puts another hop behind the server: `guest` is reached through it, over a
/// route of a smaller MTU. The links themselves are as large as all others, so
/// that no end knows of it.
fn narrow(lab: &Lab, family: Family, mtu: u16) -> Result<()> {
    lab.server.set_sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
    lab.guest.set_sysctls(&[("net/ipv6/ip_nonlocal_bind", "1")])?;
    let (near, there) = family.pick(("10.77.0.1", "10.77.0.2"), ("fd77::1", "fd77::2"));
    let prefix = family.pick(24, 64);
    let nodad = family.pick("", "nodad");
    let net = family.anywhere_net(20);
    lab.server.ip_batch(&format!(
        "link add far type veth peer name near netns {guest}\n\
         link set far up\n\
         addr add {near}/{prefix} dev far {nodad}\n",
        guest = lab.guest.name()
    ))?;
    lab.guest.ip_batch(&format!(
        "link set near up\n\
         addr add {there}/{prefix} dev near {nodad}\n\
         route add local {net} dev lo\n\
         route replace default via {near} dev near\n"
    ))?;
    // Before the local table, which has all of "anywhere".
    let flag = family.flag();
    lab.server.sh(&format!("ip {flag} route add {net} via {there} dev far mtu {mtu} table 77"))?;
    lab.server.sh(&format!("ip {flag} rule add to {net} lookup 77 priority 0"))?;
    lab.server.sh(&format!("ip {flag} rule add lookup local priority 1"))?;
    lab.server.sh(&format!("ip {flag} rule del lookup local priority 0"))?;
    Ok(())
}

/// Without the error the sender never learns of the MTU, and nothing arrives
/// but the handshake.
fn bulk(lab: &Lab, family: Family, mtu: u16) -> Result<()> {
    const BYTES: usize = 2 << 20;
    narrow(lab, family, mtu)?;
    let _server = TcpServer::start(&lab.guest, at(family.unspecified(), PORT), |mut stream, _| {
        let mut bytes = Vec::new();
        if (&stream).take(BYTES as u64).read_to_end(&mut bytes).is_ok() && bytes == peer::pattern(BYTES) {
            // The client may be gone by now.
            let _ = stream.write_all(b"all of it\n");
        }
    })?;
    let running = start(lab, "--iface lan")?;
    let mut stream = peer::connect(&lab.client, None, at(far(family), PORT), Duration::from_secs(3))?;
    stream.write_all(&peer::pattern(BYTES)).context("the transfer stalls")?;
    let word = peer::read_line(&mut stream).context("not all arrived")?;
    ensure!(word == "all of it", "the server says {word:?}");
    running.expect_tcp(1)
}

/// A sender that forbids fragments is told the MTU, and keeps to it.
fn mtu_for_udp(lab: &Lab, family: Family) -> Result<()> {
    const MTU: usize = 1280;
    narrow(lab, family, u16::try_from(MTU)?)?;
    let to = at(far(family), PORT);
    let _echo = UdpServer::echo(&lab.guest, to)?;
    let running = start(lab, "--iface lan")?;
    expect_mtu(&connected(lab, to, family)?, to, family, MTU)?;
    running.expect_udp(2)
}

/// The proxy's own link is too small for the datagram, as for the router that it stands for.
/// Documented: over IPv6 the proxy's kernel fragments then.
fn mtu_of_uplink(lab: &Lab, family: Family) -> Result<()> {
    const MTU: usize = 1300;
    let to = at(family.anywhere(1), PORT);
    let _echo = UdpServer::echo(&lab.server, to)?;
    for (namespace, device) in [(&lab.router, "wan"), (&lab.server, "eth0")] {
        namespace.sh(&format!("ip link set {device} mtu {MTU}"))?;
    }
    let running = start(lab, "--iface lan")?;
    let socket = connected(lab, to, family)?;
    if family == Family::V6 && running.proxy().is_some() {
        let (echo, _) = peer::exchange(&socket, to, &peer::pattern(1400))?;
        ensure!(echo == peer::pattern(1400), "the echo of 1,400 bytes differs");
        return running.expect_udp(1);
    }
    expect_mtu(&socket, to, family, MTU)?;
    running.expect_udp(2)
}

/// The client of a connected socket is told that 1,400 bytes do not fit, and what does.
fn expect_mtu(socket: &UdpSocket, to: SocketAddr, family: Family, mtu: usize) -> Result<()> {
    sockopt::set_dont_fragment(socket.as_fd(), family, true)?;
    socket.send(&peer::pattern(1400))?;
    match peer::receive(socket, &mut [0; 2000]) {
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
        other => bail!("1,400 bytes do not fit; the client was told {other:?}"),
    }
    let largest = mtu - family.udp_overhead();
    let error = socket.send(&peer::pattern(largest + 1)).err().and_then(|error| error.raw_os_error());
    ensure!(error == Some(libc::EMSGSIZE), "{} bytes: {error:?}", largest + 1);
    let (echo, _) = peer::exchange(socket, to, &peer::pattern(largest)).context("the largest that fits")?;
    ensure!(echo == peer::pattern(largest), "the echo of {largest} bytes differs");
    Ok(())
}

fn unreachable(lab: &Lab, family: Family) -> Result<()> {
    lab.server.set_sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
    lab.server.ip_batch(&format!("route add unreachable {} table local\n", family.anywhere_net(9)))?;
    let running = start(lab, "--iface lan")?;
    let started = Instant::now();
    let to = at(family.anywhere(0x0901), 80);
    let told = lab.client.enter(|| -> std::io::Result<usize> {
        let mut stream = peer::try_connect(None, to, Duration::from_secs(5))?;
        peer::read(&mut stream, &mut [0; 16])
    })?;
    let took = started.elapsed();
    match told {
        Err(error)
            if peer::is_reset(&error)
                || matches!(error.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => {}
        other => bail!("the client was told {other:?} after {took:?}"),
    }
    ensure!(took < Duration::from_secs(2), "the client was told after {took:?}");
    running.expect_tcp(1)
}

/// One port talks to a closed port and to an open one in turn.
fn flow_goes_on(lab: &Lab, family: Family) -> Result<()> {
    let (closed, open) = (at(family.anywhere(1), PORT), at(family.anywhere(2), PORT));
    let _echo = UdpServer::echo(&lab.server, open)?;
    let running = start(lab, "--iface lan")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for round in 0..50_u32 {
        socket.send_to(b"nobody there", closed)?;
        // The error is back at the proxy before or after the next datagram.
        std::thread::sleep(Duration::from_millis(u64::from(round % 3)));
        let datagram = format!("round {round}");
        let (echo, from) = peer::exchange(&socket, open, datagram.as_bytes())?;
        ensure!(from == open && echo == datagram.as_bytes(), "round {round}: {from} answered {echo:?}");
    }
    running.expect_udp(100)
}

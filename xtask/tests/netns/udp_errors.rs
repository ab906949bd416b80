//! An error of one datagram ends neither the listener nor the flow (F11).

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, at, needs_proxy, start};
use crate::host::counters_named;
use crate::sockopt;

pub(crate) const SCENARIOS: Scenarios = &[
    ("F11_destinations_that_cannot_be_reached", unreachable),
    ("F11_datagrams_that_are_too_long_on_the_way", too_long),
    ("F11_clients_that_do_not_wait", gone),
    ("F11_an_uplink_that_goes_and_comes", uplink),
];

const PORT: u16 = 6300;

/// Asks the server what it sees; the flow must be the same as before.
fn expect_same_flow(socket: &std::net::UdpSocket, to: SocketAddr, mapping: &[u8]) -> Result<()> {
    let (seen, from) = peer::exchange(socket, to, b"who am I?")?;
    ensure!(from == to, "the answer came from {from}");
    ensure!(
        seen == mapping,
        "the server saw the client as {:?} and now as {:?}: the flow was ended",
        String::from_utf8_lossy(mapping),
        String::from_utf8_lossy(&seen)
    );
    Ok(())
}

/// Every kind of "no" that sending meets: by the routing table, by the packet
/// filter, and by nobody listening there.
fn unreachable(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), PORT);
    let _server = UdpServer::reflector(&lab.server, to)?;
    for (n, kind) in [(1, "unreachable"), (2, "prohibit"), (3, "blackhole")] {
        lab.router.sh(&format!("ip route add {kind} {}", family.anywhere_net(0x80 + n)))?;
    }
    let rules = format!(
        "table inet no {{\nchain out {{\ntype filter hook output priority filter\n{} {} drop\n}}\n}}\n",
        family.pick("ip daddr", "ip6 daddr"),
        family.anywhere_net(0x84)
    );
    lab.router.cmd("nft").args(["-f", "-"]).stdin(rules).check()?;
    let running = start(lab, "--iface lan --workers 1")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (mapping, _) = peer::exchange(&socket, to, b"who am I?")?;
    for round in 0..5 {
        for net in 0x81..=0x84_u16 {
            socket.send_to(b"lost", at(family.anywhere(net << 8 | 1), PORT))?;
            expect_same_flow(&socket, to, &mapping)
                .with_context(|| format!("round {round}, after a datagram for network {net:#x}"))?;
        }
        // Nobody listens there: an ICMP error comes back.
        socket.send_to(b"lost", at(family.anywhere(9), 9))?;
        std::thread::sleep(Duration::from_millis(20));
        expect_same_flow(&socket, to, &mapping)
            .with_context(|| format!("round {round}, after a closed port"))?;
    }
    if let Some(proxy) = running.proxy() {
        let errors = counters_named(proxy, "udp_send_errors")?;
        ensure!(errors.1 >= 15, "20 datagrams could not be sent; counted are {errors:?}");
    }
    running.expect_udp(40)
}

/// The way to the server is narrower than the datagrams, which may be fragmented: the
/// proxy's kernel cuts them. (Over IPv6 a router would tell the client, which has to try again.)
fn too_long(lab: &Lab, family: Family) -> Result<()> {
    if family == Family::V6 {
        needs_proxy()?;
    }
    let to = at(family.anywhere(1), PORT);
    let _server = UdpServer::echo(&lab.server, to)?;
    for (namespace, device) in [(&lab.router, "wan"), (&lab.server, "eth0")] {
        namespace.sh(&format!("ip link set {device} mtu 1300"))?;
    }
    let running = start(lab, "--iface lan --workers 1")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    sockopt::set_dont_fragment(socket.as_fd(), family, false)?;
    for round in 0..3 {
        for length in [1272, 1400, 1472, 100, 4000, 65_000] {
            let datagram = peer::pattern(length);
            let (echo, from) = peer::exchange(&socket, to, &datagram)
                .with_context(|| format!("round {round}, {length} bytes"))?;
            ensure!(echo == datagram && from == to, "{length} bytes came back changed, or from {from}");
        }
    }
    running.expect_udp(9)
}

/// Clients close their port before the answer comes: the router hears of it
/// by ICMP, for an address that is not its own.
fn gone(lab: &Lab, family: Family) -> Result<()> {
    let slow = at(family.anywhere(2), PORT);
    let _slow = UdpServer::start(&lab.server, slow, |datagram, _| {
        std::thread::sleep(Duration::from_millis(30));
        Some(datagram.to_vec())
    })?;
    let to = at(family.anywhere(1), PORT);
    let _server = UdpServer::reflector(&lab.server, to)?;
    let running = start(lab, "--iface lan --workers 1")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (mapping, _) = peer::exchange(&socket, to, b"who am I?")?;
    for _ in 0..30 {
        let hasty = peer::udp(&lab.client, at(family.client(), 0))?;
        hasty.send_to(b"bye", slow)?;
    }
    std::thread::sleep(Duration::from_millis(1200));
    for _ in 0..3 {
        expect_same_flow(&socket, to, &mapping).context("after 30 clients that did not wait")?;
    }
    running.expect_udp(33)
}

/// Without an uplink nothing can be sent; with it again everything works.
fn uplink(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), PORT);
    let _server = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, "--iface lan --workers 1")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    peer::exchange(&socket, to, b"before")?;
    lab.server.sh("ip link set eth0 down")?;
    for _ in 0..20 {
        socket.send_to(b"during", to)?;
        std::thread::sleep(Duration::from_millis(10));
    }
    lab.server.ip_batch(&format!(
        "link set eth0 up\naddr replace {}/64 dev eth0 nodad\nroute replace default via {} dev eth0 onlink\nroute replace ::/0 via {} dev eth0 onlink\n",
        Family::V6.server(),
        Family::V4.uplink(),
        Family::V6.uplink()
    ))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    xtask::lab::daemon::wait_for("answers after the link came back", Duration::from_secs(5), || {
        Ok(peer::exchange(&socket, to, b"after").is_ok())
    })?;
    // Another client too.
    peer::exchange(&peer::udp(&lab.client, at(family.client(), 0))?, to, b"after")?;
    running.expect_udp(3)
}

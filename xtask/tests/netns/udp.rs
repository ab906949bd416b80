//! UDP: sources of replies, sizes, fragments, many peers of one port (T2, T10, T14).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use xtask::lab::pace;
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab, Namespace, server};

use crate::common::{Scenarios, at, start};
use crate::packet;
use crate::sockopt;
use crate::wire::Wire;

pub(crate) const SCENARIOS: Scenarios = &[
    ("T2_dns_answers_come_from_the_server_asked", dns),
    ("T2_udp_reply_source", reply_source),
    ("T2_udp_source_client", |lab, family| source(lab, family, "", family.client())),
    ("T2_udp_source_proxy", source_proxy),
    ("T2_udp_source_client_port", source_client_port),
    ("T2_udp_from_a_port_that_the_proxy_uses_too", port_of_both),
    ("T10_datagrams_of_0_to_65000_bytes", sizes),
    ("T10_do_not_fragment", do_not_fragment),
    ("T10_do_not_fragment_on_the_wire", |lab, family| {
        df_on_the_wire(lab, family, &lab.client, family.client(), "--iface lan")
    }),
    ("T10_do_not_fragment_of_own_traffic_on_the_wire", |lab, family| {
        df_on_the_wire(lab, family, &lab.router, family.uplink(), "--own-traffic")
    }),
    ("T10_fragments_in_reverse_order", reverse_fragments),
    ("T14_many_servers_from_one_port", endpoint_independent),
    ("clsact_T2_udp_reply_source", |lab, family| replies(lab, family, "--iface lan --attach clsact")),
    ("clsact_T10_datagrams_of_0_to_65000_bytes", |lab, family| {
        all_sizes(lab, family, "--iface lan --attach clsact")
    }),
];

const PORT: u16 = 5300;

/// `dig` refuses answers from any other address or port than it asked.
fn dns(lab: &Lab, family: Family) -> Result<()> {
    let answer = family.anywhere(80);
    let dnsmasq = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let running = start(lab, "--iface lan")?;
    for resolver in [family.anywhere(1), family.anywhere(0x0808), family.server()] {
        // Over TCP, dnsmasq answers on addresses of its interfaces only.
        let over_tcp = (resolver == family.server()).then_some(Protocol::Tcp);
        for protocol in [Protocol::Udp].into_iter().chain(over_tcp) {
            let got = server::dig(&lab.client, resolver, family, protocol)?;
            ensure!(got == answer, "{resolver} answered {got}, expected {answer}");
        }
    }
    ensure!(
        dnsmasq.log().contains(&family.client().to_string()),
        "the DNS server did not see the client's address: {}",
        dnsmasq.describe()
    );
    running.expect_udp(3)?;
    running.expect_tcp(1)
}

fn reply_source(lab: &Lab, family: Family) -> Result<()> {
    replies(lab, family, "--iface lan")
}

fn replies(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let targets = [
        at(family.anywhere(1), PORT),
        at(family.anywhere(2), PORT),
        at(family.anywhere(1), 1),
        at(family.server(), 65_535),
    ];
    let _servers = targets.iter().map(|to| UdpServer::echo(&lab.server, *to)).collect::<Result<Vec<_>>>()?;
    let running = start(lab, flags)?;
    let one = peer::udp(&lab.client, at(family.client(), 0))?;
    for round in 0..3 {
        for to in targets {
            let other = peer::udp(&lab.client, at(family.client(), 0))?;
            for socket in [&one, &other] {
                let datagram = format!("round {round} to {to}");
                let (echo, from) = peer::exchange(socket, to, datagram.as_bytes())?;
                ensure!(from == to, "the reply to a datagram for {to} came from {from}");
                ensure!(
                    echo == datagram.as_bytes(),
                    "the reply was {:?}, expected {datagram:?}",
                    String::from_utf8_lossy(&echo)
                );
            }
        }
    }
    running.expect_udp(24)
}

fn source_proxy(lab: &Lab, family: Family) -> Result<()> {
    crate::common::needs_proxy()?;
    source(lab, family, "--source proxy", family.uplink())
}

/// What socat on the server says that it sees, asked by nc.
fn source(lab: &Lab, family: Family, flags: &str, expected: std::net::IpAddr) -> Result<()> {
    let to = family.anywhere(5);
    let _socat = server::socat_udp(lab, &lab.server, to, PORT, "read line; echo \"$SOCAT_PEERADDR\"")?;
    let running = start(lab, &format!("--iface lan {flags}"))?;
    let patience = pace::seconds(2);
    let nc =
        lab.client.cmd("nc").args(["-u", "-w", &patience, family.flag(), &to.to_string(), &PORT.to_string()]);
    let output = nc.stdin("who am I?\n").check()?;
    let seen: std::net::IpAddr =
        output.stdout.trim().trim_matches(['[', ']']).parse().with_context(|| {
            let counters =
                running.proxy().map(|proxy| proxy.status().map(|status| status["counters"].clone()));
            format!("socat said no address, {}\n  counters: {counters:?}", output.describe())
        })?;
    ensure!(seen == expected, "the server sees {seen}, expected {expected}");
    running.expect_udp(1)
}

/// By chance a client picks the port by which the proxy speaks for it: what it sends is no
/// datagram of the proxy that has come back.
fn port_of_both(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(5), PORT);
    let _reflector = UdpServer::reflector(&lab.server, to)?;
    let running = start(lab, "--iface lan")?;
    let seen = |from| -> Result<SocketAddr> {
        let (seen, _) = peer::exchange(&peer::udp(&lab.client, from)?, to, b"who am I?")?;
        let seen = String::from_utf8_lossy(&seen).into_owned();
        seen.parse().with_context(|| format!("the server says {seen:?}"))
    };
    let first = seen(at(family.client(), 0))?;
    ensure!(first.ip() == family.client(), "the server sees {first}");
    let second = seen(first).with_context(|| format!("from {first}, which the proxy uses"))?;
    ensure!(second != first, "two flows have one source");
    running.expect_udp(2)
}

fn source_client_port(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(5), PORT);
    let _reflector = UdpServer::reflector(&lab.server, to)?;
    let running = start(lab, "--iface lan --source client-port")?;
    for port in [40_123, 1025] {
        let from = at(family.client(), port);
        let (seen, _) = peer::exchange(&peer::udp(&lab.client, from)?, to, b"who am I?")?;
        let seen = String::from_utf8_lossy(&seen).into_owned();
        ensure!(seen == from.to_string(), "the server sees {seen}, expected the client's own {from}");
    }
    running.expect_udp(2)
}

fn sizes(lab: &Lab, family: Family) -> Result<()> {
    all_sizes(lab, family, "--iface lan")
}

fn all_sizes(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let to = at(family.anywhere(10), PORT);
    let _echo = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, flags)?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    sockopt::set_dont_fragment(socket.as_fd(), family, false)?;
    // Around the largest that fits a packet of either family, and around one, two and more fragments.
    for length in [0, 1, 512, 1451, 1452, 1453, 1472, 1473, 2952, 2953, 4000, 30_000, 65_000, 0, 1472] {
        let datagram = peer::pattern(length);
        let (echo, from) = peer::exchange(&socket, to, &datagram)
            .with_context(|| format!("a datagram of {length} bytes"))?;
        ensure!(from == to, "the reply of {length} bytes came from {from}, expected {to}");
        ensure!(echo == datagram, "{length} bytes came back as {} bytes, or they differ", echo.len());
    }
    running.expect_udp(5)
}

fn do_not_fragment(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(10), PORT);
    let _echo = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, "--iface lan")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    sockopt::set_dont_fragment(socket.as_fd(), family, true)?;
    let largest = 1500 - family.udp_overhead();
    for length in [0, 100, largest] {
        let datagram = peer::pattern(length);
        let (echo, _) = peer::exchange(&socket, to, &datagram)
            .with_context(|| format!("a datagram of {length} bytes that must not be fragmented"))?;
        ensure!(echo == datagram, "{length} bytes came back as {} bytes, or they differ", echo.len());
    }
    ensure!(
        socket.send_to(&peer::pattern(largest + 1), to).is_err(),
        "the client's own kernel sent {} bytes in one packet",
        largest + 1
    );
    running.expect_udp(3)
}

/// One flow forbids fragments and allows them in turn, and each datagram arrives as it was sent.
fn df_on_the_wire(lab: &Lab, family: Family, sender: &Namespace, from: IpAddr, flags: &str) -> Result<()> {
    let to = at(family.anywhere(10), PORT);
    let _echo = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, flags)?;
    let socket = peer::udp(sender, at(from, 0))?;
    let wire = Wire::watch(&lab.server, "eth0")?;
    for forbidden in [false, true, true, false, true, false, false] {
        sockopt::set_dont_fragment(socket.as_fd(), family, forbidden)?;
        peer::exchange(&socket, to, &peer::pattern(1000))?;
        let seen = wire.next_to(to)?.dont_fragment;
        let expected = forbidden && family == Family::V4;
        ensure!(seen == expected, "a datagram with DF {expected} arrived with DF {seen}");
    }
    running.expect_udp(7)
}

fn reverse_fragments(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(11), PORT);
    let _echo = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, "--iface lan")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let from = socket.local_addr()?;
    for (id, length) in [(1, 4000), (2, 1473), (3, 4000), (4, 30_000)] {
        let datagram = peer::pattern(length);
        let mut packets = packet::udp_fragments(from, to, &datagram, 1400, id)?;
        // Last one first; and once with only the first one late.
        if id == 3 {
            packets.rotate_left(1);
        } else {
            packets.reverse();
        }
        packet::send(&lab.client, to.ip(), &packets)?;
        let mut buffer = vec![0; 65_536];
        let (count, sender) = peer::receive(&socket, &mut buffer).with_context(|| {
            format!("no reply to {} fragments out of order, {length} bytes", packets.len())
        })?;
        ensure!(sender == to, "the reply came from {sender}, expected {to}");
        ensure!(
            buffer[..count] == datagram,
            "{length} bytes in fragments came back as {count} bytes, or they differ"
        );
    }
    running.expect("steered_fragment", 4)
}

/// One client port, many servers: each sees the same address and port (the
/// mapping does not depend on the destination), and each answer comes from its
/// true sender.
fn endpoint_independent(lab: &Lab, family: Family) -> Result<()> {
    let targets: Vec<_> = (1..=20).map(|n| at(family.anywhere(n * 256), 3478 + n % 3)).collect();
    let _servers =
        targets.iter().map(|to| UdpServer::reflector(&lab.server, *to)).collect::<Result<Vec<_>>>()?;
    let running = start(lab, "--iface lan --workers 2")?;
    for port in [0, 50_001, 50_002] {
        let socket = peer::udp(&lab.client, at(family.client(), port))?;
        let mut mappings = std::collections::BTreeSet::new();
        for to in &targets {
            let (mapping, from) = peer::exchange(&socket, *to, b"binding request")?;
            ensure!(from == *to, "the answer of {to} came from {from}");
            mappings.insert(String::from_utf8_lossy(&mapping).into_owned());
        }
        ensure!(
            mappings.len() == 1,
            "servers see one client port as {mappings:?}: the mapping depends on the destination"
        );
        // All at once: replies must not be mixed up either.
        for to in &targets {
            socket.send_to(b"binding request", to)?;
        }
        let mut waiting: std::collections::BTreeSet<_> = targets.iter().copied().collect();
        let mut buffer = [0; 100];
        while !waiting.is_empty() {
            let (_, from) =
                peer::receive(&socket, &mut buffer).with_context(|| format!("no answer from {waiting:?}"))?;
            ensure!(waiting.remove(&from), "an answer too many from {from}");
        }
    }
    running.expect_udp(120)
}

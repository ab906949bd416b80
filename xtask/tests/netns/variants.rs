//! Clients whose packets are not plain: Multipath TCP, Fast Open, ECN (T11).

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::lab::kernel::Version;
use xtask::lab::peer::{self, TcpServer};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{Scenarios, Skip, at, needs_linux, start};
use crate::sockopt;
use crate::wire::Wire;

pub(crate) const SCENARIOS: Scenarios = &[
    ("T11_multipath_tcp_client_falls_back", multipath),
    ("T11_fast_open_client", fast_open),
    ("T11_ecn_of_tcp", ecn),
    ("T11_ecn_and_dscp_of_udp", class_of_udp),
];

const PORT: u16 = 5800;

/// One of the kernel's counters for a namespace, `/proc/net/netstat`.
fn netstat(namespace: &Namespace, group: &str, name: &str) -> Result<u64> {
    let text = namespace.try_enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))?;
    let mut lines = text.lines().filter(|line| line.split(':').next() == Some(group));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let found = names.split_whitespace().zip(values.split_whitespace()).find(|(found, _)| *found == name);
    let (_, value) = found.with_context(|| format!("this kernel counts no {group} {name}"))?;
    Ok(value.parse()?)
}

/// Says lines of several sizes and hears them back.
fn converse(stream: &mut TcpStream) -> Result<()> {
    for length in [1, 100, 5000, 60_000] {
        let line = "x".repeat(length);
        let (echo, _) = peer::ask(stream, &line)?;
        ensure!(echo == line, "{length} bytes came back as {}", echo.len());
    }
    Ok(())
}

fn connect(client: &Namespace, to: SocketAddr, protocol: Protocol, fast_open: bool) -> Result<TcpStream> {
    client.try_enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
        if fast_open {
            sockopt::set(socket.as_fd(), libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
            socket.connect(&to.into())?;
        } else {
            socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
        }
        socket.set_read_timeout(Some(peer::PATIENCE))?;
        socket.set_write_timeout(Some(peer::PATIENCE))?;
        Ok(socket.into())
    })
}

fn multipath(lab: &Lab, family: Family) -> Result<()> {
    if netstat(&lab.client, "MPTcpExt", "MPCapableSYNTX").is_err() {
        // Linux has had it since 5.6, Debian's 5.10 without it.
        needs_linux(Version(6, 1), "Multipath TCP in Debian's kernels")?;
        bail!(Skip("this kernel has no Multipath TCP (CONFIG_MPTCP)".into()));
    }
    let to = at(family.anywhere(1), PORT);
    let _server = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let running = start(lab, "--iface lan")?;
    for _ in 0..3 {
        converse(&mut connect(&lab.client, to, Protocol::MPTCP, false)?)?;
    }
    let asked = netstat(&lab.client, "MPTcpExt", "MPCapableSYNTX")?;
    ensure!(asked >= 3, "the client has asked for Multipath TCP {asked} times only");
    running.expect_tcp(3)
}

/// `net.ipv4.tcp_fastopen`: for clients (1), and for every listener without asking it (2 and 0x400).
const CLIENT: &str = "1";
const LISTENERS: &str = "1027";

fn fast_open(lab: &Lab, family: Family) -> Result<()> {
    lab.client.set_sysctls(&[("net/ipv4/tcp_fastopen", CLIENT)])?;
    lab.server.set_sysctls(&[("net/ipv4/tcp_fastopen", LISTENERS)])?;
    let to = at(family.anywhere(1), PORT);
    let _server = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let few = || -> Result<()> {
        for _ in 0..3 {
            converse(&mut connect(&lab.client, to, Protocol::TCP, true)?)?;
        }
        Ok(())
    };
    // The client now has a cookie of the server, and brings it to the proxy.
    few().context("without a proxy")?;
    let active = netstat(&lab.client, "TcpExt", "TCPFastOpenActive")?;
    ensure!(active > 0, "the client has opened no connection the fast way: this would prove nothing");
    for setting in [CLIENT, LISTENERS] {
        lab.router.set_sysctls(&[("net/ipv4/tcp_fastopen", setting)])?;
        let running = start(lab, "--iface lan")?;
        few().with_context(|| format!("with tcp_fastopen={setting} on the router"))?;
        running.expect_tcp(3)?;
        running.terminate()?;
    }
    Ok(())
}

/// Whether the only connection of a namespace to or from `port` has negotiated ECN.
fn has_ecn(namespace: &Namespace, filter: &str) -> Result<bool> {
    let output = namespace.cmd("ss").args(["-tinoH", "state", "established", filter]).check()?;
    ensure!(output.stdout.contains("cubic"), "ss shows no connection, {}", output.describe());
    Ok(output.stdout.split_whitespace().any(|word| word == "ecn"))
}

/// A client that wants ECN gets it from the proxy, whose kernel answers the marks of
/// its side; the side of the server is asked only where the router's own
/// setting says so. So each side has a loop of its own, and none is cut.
fn ecn(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), PORT);
    let _server = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    lab.client.set_sysctls(&[("net/ipv4/tcp_ecn", "1")])?;
    lab.server.set_sysctls(&[("net/ipv4/tcp_ecn", "2")])?;
    // Everything the client sends has met congestion by the time it arrives.
    let mark = family.pick("ip ecn set ce", "ip6 ecn set ce");
    let only = family.pick("ip ecn ect0", "ip6 ecn ect0");
    lab.client
        .cmd("nft")
        .args(["-f", "-"])
        .stdin(format!(
            "table inet congested {{\nchain out {{\ntype filter hook output priority filter\n{only} {mark}\n}}\n}}\n"
        ))
        .check()?;
    let running = start(lab, "--iface lan")?;
    let of_client = format!("dport = :{PORT}");
    let of_server = format!("sport = :{PORT}");
    for (setting, expected) in [("2", running.proxy().is_none()), ("1", true)] {
        lab.router.set_sysctls(&[("net/ipv4/tcp_ecn", setting)])?;
        let mut stream = connect(&lab.client, to, Protocol::TCP, false)?;
        converse(&mut stream)?;
        ensure!(has_ecn(&lab.client, &of_client)?, "the client has asked for ECN and did not get it");
        let server_side = has_ecn(&lab.server, &of_server)?;
        ensure!(
            server_side == expected,
            "with tcp_ecn={setting} on the router, ECN with the server: {server_side}, expected {expected}"
        );
    }
    running.expect_tcp(2)
}

/// Both bits of ECN and all of DSCP, both ways, as plain forwarding keeps them.
fn class_of_udp(lab: &Lab, family: Family) -> Result<()> {
    /// Not capable of ECN, ECT(1), ECT(0), congestion experienced; expedited forwarding and CS1 with and without.
    const CLASSES: [u8; 7] = [0x00, 0x01, 0x02, 0x03, 0xb8, 0xba, 0x23];
    let to = at(family.anywhere(1), PORT);
    let server = peer::udp(&lab.server, to)?;
    let client = peer::udp(&lab.client, at(family.client(), 0))?;
    let (server_side, client_side) = (Wire::watch(&lab.server, "eth0")?, Wire::watch(&lab.client, "eth0")?);
    let running = start(lab, "--iface lan")?;
    let mut buffer = [0; 16];
    for (asked, answered) in CLASSES.into_iter().zip(CLASSES.into_iter().rev()) {
        sockopt::set_traffic_class(client.as_fd(), family, asked)?;
        client.send_to(b"question", to)?;
        let (_, from) = peer::receive(&server, &mut buffer)?;
        let seen = server_side.next_to(to)?.class;
        ensure!(seen == asked, "{asked:#04x} of the client arrived as {seen:#04x}");
        sockopt::set_traffic_class(server.as_fd(), family, answered)?;
        server.send_to(b"answer", from)?;
        peer::receive(&client, &mut buffer)?;
        let seen = client_side.next_to(client.local_addr()?)?.class;
        ensure!(seen == answered, "{answered:#04x} of the server arrived as {seen:#04x}");
    }
    running.expect_udp(7)
}

//! Fit into a real host: its services, its sysctls, its own traffic (H1, H2, H10, T8).

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use xtask::lab::pace::patience;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab, Namespace, server};

use crate::common::{Scenarios, at, expect_service, service, start, start_proxy};
use crate::sockopt;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H1_dnsmasq_on_the_router", dnsmasq_on_router),
    ("H1_port_53_held_without_reuseaddr", port_53_held),
    ("H2_src_valid_mark_1", |lab, family| sysctls(lab, family, &[("src_valid_mark", "1")])),
    ("H2_rp_filter_1", |lab, family| sysctls(lab, family, &[("rp_filter", "1")])),
    ("H2_rp_filter_2", |lab, family| sysctls(lab, family, &[("rp_filter", "2")])),
    ("H2_rp_filter_1_and_src_valid_mark_1", |lab, family| {
        sysctls(lab, family, &[("rp_filter", "1"), ("src_valid_mark", "1")])
    }),
    ("H2_ip_forward_0", no_forwarding),
    ("H2_early_demux_off", |lab, family| no_early_demux(lab, family, "ip_early_demux")),
    ("H2_tcp_early_demux_off", |lab, family| no_early_demux(lab, family, "tcp_early_demux")),
    ("T8_client_and_destination_on_the_proxy_host", local_to_local),
    ("T8_client_port_that_is_taken", client_port_taken),
    ("H10_own_tcp", own_tcp),
    ("H10_own_udp", own_udp),
    ("H10_own_and_captured_traffic_together", |lab, family| own_and_captured(lab, family, OWN)),
    ("H10_own_traffic_with_src_valid_mark_1", |lab, family| own_with_valid_mark(lab, family, OWN)),
    ("H10_the_proxys_own_port_is_dialled", own_port_dialled),
];

/// The router's own dnsmasq holds port 53 of every address.
fn dnsmasq_on_router(lab: &Lab, family: Family) -> Result<()> {
    let (outside, inside) = (
        [Family::V4.anywhere(80), Family::V6.anywhere(80)],
        [Family::V4.anywhere(81), Family::V6.anywhere(81)],
    );
    let _outside = server::dns(lab, &lab.server, outside)?;
    let _inside = server::dns(lab, &lab.router, inside)?;
    let running = start(lab, "--iface lan")?;
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        for (resolver, expected) in [
            (family.anywhere(1), outside),
            (family.server(), outside),
            (family.router(), inside),
            (family.uplink(), inside),
        ] {
            // Over TCP, dnsmasq answers on addresses of its interfaces only.
            if protocol == Protocol::Tcp && resolver == family.anywhere(1) {
                continue;
            }
            let answer = server::dig(&lab.client, resolver, family, protocol)?;
            ensure!(
                expected.contains(&answer),
                "{resolver} answered {answer} over {}: that was the other server",
                protocol.name()
            );
        }
        let answer = server::dig(&lab.router, family.loopback(), family, protocol)?;
        ensure!(inside.contains(&answer), "the router's own question was answered by the other server");
    }
    running.expect_udp(2)
}

/// Sockets without `SO_REUSEADDR` refuse every other socket on their port.
fn port_53_held(lab: &Lab, family: Family) -> Result<()> {
    let _holder =
        UdpServer::start(&lab.router, at(family.unspecified(), 53), |_, _| Some(b"the router".to_vec()))?;
    let _tcp_holder = lab.router.try_enter(|| {
        let socket = Socket::new(Domain::for_address(at(family.unspecified(), 53)), Type::STREAM, None)?;
        if family == Family::V6 {
            socket.set_only_v6(true)?;
        }
        socket.bind(&at(family.unspecified(), 53).into())?;
        socket.listen(16)?;
        Ok(socket)
    })?;
    let targets = [at(family.anywhere(1), 53), at(family.anywhere(2), 53)];
    let _servers = targets
        .iter()
        .map(|to| UdpServer::start(&lab.server, *to, |_, _| Some(b"the server".to_vec())))
        .collect::<Result<Vec<_>>>()?;
    let _tcp = TcpServer::echo(&lab.server, at(family.unspecified(), 53))?;
    let running = start(lab, "--iface lan")?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    for _ in 0..3 {
        for to in targets {
            let (answer, from) = peer::exchange(&socket, to, b"who is there?")?;
            ensure!(
                from == to && answer == b"the server",
                "{to} was asked; {from} answered {:?}",
                String::from_utf8_lossy(&answer)
            );
        }
        let router = at(family.router(), 53);
        let (answer, from) = peer::exchange(&socket, router, b"who is there?")?;
        ensure!(
            from == router && answer == b"the router",
            "{router} was asked; {from} answered {:?}",
            String::from_utf8_lossy(&answer)
        );
    }
    let mut stream = peer::connect(&lab.client, None, targets[0], Duration::from_secs(5))?;
    let (echo, _) = peer::ask(&mut stream, "over TCP too")?;
    ensure!(echo == "over TCP too", "the echo over TCP was {echo:?}");
    running.expect_udp(6)?;
    running.expect_tcp(1)
}

fn sysctls(lab: &Lab, family: Family, settings: &[(&str, &str)]) -> Result<()> {
    with_sysctls(lab, family, "--iface lan", settings)
}

pub(crate) fn with_sysctls(lab: &Lab, family: Family, flags: &str, settings: &[(&str, &str)]) -> Result<()> {
    for interface in ["all", "default", "lan", "wan"] {
        for (name, value) in settings {
            lab.router.set_sysctls(&[(&format!("net/ipv4/conf/{interface}/{name}"), value)])?;
        }
    }
    let _service = service(lab, family)?;
    let running = start(lab, flags)?;
    expect_service(lab, family)?;
    running.expect_tcp(1)?;
    running.expect_udp(2)
}

/// The stack does not look for sockets before routes: the program assigns them.
fn no_early_demux(lab: &Lab, family: Family, sysctl: &str) -> Result<()> {
    lab.router.set_sysctls(&[(&format!("net/ipv4/{sysctl}"), "0")])?;
    let _service = service(lab, family)?;
    let running = start(lab, "--iface lan")?;
    expect_service(lab, family)?;
    running.expect_tcp(1)?;
    running.expect_udp(2)
}

fn no_forwarding(lab: &Lab, family: Family) -> Result<()> {
    crate::common::needs_proxy()?;
    lab.router.set_sysctls(&[("net/ipv4/ip_forward", "0"), ("net/ipv6/conf/all/forwarding", "0")])?;
    let _service = service(lab, family)?;
    let running = start(lab, "--iface lan")?;
    expect_service(lab, family)?;
    running.expect_tcp(1)?;
    running.expect_udp(2)
}

/// Source and destination are one address of the proxy's host.
fn local_to_local(lab: &Lab, family: Family) -> Result<()> {
    for flags in ["--iface lan", "--iface lan --own-traffic"] {
        let _tcp = TcpServer::echo(&lab.router, at(family.unspecified(), 8080))?;
        let running = start(lab, flags)?;
        for address in [family.router(), family.uplink(), family.loopback()] {
            let _udp = UdpServer::echo(&lab.router, at(address, 8080))?;
            let mut stream =
                peer::connect(&lab.router, Some(at(address, 0)), at(address, 8080), Duration::from_secs(5))?;
            let (echo, _) = peer::ask(&mut stream, "myself")?;
            ensure!(echo == "myself", "{flags}: the echo from {address} to itself over TCP was {echo:?}");
            let socket = peer::udp(&lab.router, at(address, 0))?;
            let (echo, from) = peer::exchange(&socket, at(address, 8080), b"myself")?;
            ensure!(
                echo == b"myself" && from.ip() == address,
                "{flags}: the echo from {address} to itself over UDP was {echo:?}"
            );
        }
        running.terminate()?;
    }
    Ok(())
}

/// Another program on the router holds the very address and port that
/// `client-port` would use.
fn client_port_taken(lab: &Lab, family: Family) -> Result<()> {
    let (tcp, udp) = (at(family.client(), 20_001), at(family.client(), 20_002));
    let hold = |address: SocketAddr, kind: Type| {
        lab.router.try_enter(|| {
            let socket = Socket::new(Domain::for_address(address), kind, None)?;
            sockopt::set_transparent(socket.as_fd(), family)?;
            socket.bind(&address.into())?;
            if kind == Type::STREAM {
                socket.listen(1)?;
            }
            Ok(socket)
        })
    };
    let (_tcp_holder, _udp_holder) = (hold(tcp, Type::STREAM)?, hold(udp, Type::DGRAM)?);
    let to = at(family.anywhere(1), 9200);
    let _server = reflector(&lab.server, family)?;
    let _udp_server = UdpServer::reflector(&lab.server, to)?;
    let proxy = start_proxy(lab, "--iface lan --source client-port")?;
    let mut stream = peer::connect(&lab.client, Some(tcp), to, Duration::from_secs(5))?;
    let seen: SocketAddr = peer::read_line(&mut stream)
        .context("no connection where the client's port is taken on the proxy's host")?
        .parse()?;
    ensure!(
        seen.ip() == tcp.ip() && seen.port() != tcp.port(),
        "the server sees {seen}; expected {} with another port",
        tcp.ip()
    );
    let (seen, _) = peer::exchange(&peer::udp(&lab.client, udp)?, to, b"who am I?")?;
    let seen: SocketAddr = String::from_utf8_lossy(&seen).parse()?;
    ensure!(
        seen.ip() == udp.ip() && seen.port() != udp.port(),
        "the server sees {seen}; expected {} with another port",
        udp.ip()
    );
    let fallbacks = counters_named(&proxy, "fallback")?;
    ensure!(fallbacks.1 >= 2, "two fallbacks to a free port, but status counts {fallbacks:?}");
    Ok(())
}

/// A server that tells each client its address and port, then gives back lines.
fn reflector(namespace: &Namespace, family: Family) -> Result<TcpServer> {
    TcpServer::start(namespace, at(family.unspecified(), 9200), |mut stream, client| {
        // A failure shows at the client.
        let _ = stream.write_all(format!("{client}\n").as_bytes());
        let _ = peer::read(&mut stream, &mut [0; 16]);
    })
}

/// Names and sum of the counters whose name has `part` in it.
pub(crate) fn counters_named(proxy: &xtask::lab::Proxy, part: &str) -> Result<(Vec<String>, u64)> {
    let status = proxy.status()?;
    let counters = status["counters"].as_object().context("no counters in `status --json`")?;
    let named: Vec<_> = counters.iter().filter(|(name, _)| name.contains(part)).collect();
    Ok((
        named.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        named.iter().filter_map(|(_, value)| value.as_u64()).sum(),
    ))
}

const OWN: &str = "--iface lan --own-traffic";

fn own_tcp(lab: &Lab, family: Family) -> Result<()> {
    let accepted = Arc::new(AtomicU64::new(0));
    let count = accepted.clone();
    let _server =
        TcpServer::start(&lab.server, at(family.unspecified(), 9200), move |mut stream, client| {
            count.fetch_add(1, Ordering::Relaxed);
            // A failure shows at the client.
            let _ = stream.write_all(format!("{client}\n").as_bytes());
        })?;
    let running = start(lab, OWN)?;
    for (bound, expected) in [
        (None, family.uplink()),
        (Some(family.uplink()), family.uplink()),
        (Some(family.router()), family.router()),
    ] {
        let from = bound.map(|address| at(address, 0));
        let mut stream =
            peer::connect(&lab.router, from, at(family.anywhere(1), 9200), Duration::from_secs(5))?;
        let seen: SocketAddr = peer::read_line(&mut stream)?.parse()?;
        ensure!(
            seen.ip() == expected,
            "a socket of the router bound to {bound:?} is seen as {seen}, expected {expected}"
        );
    }
    let connections = accepted.load(Ordering::Relaxed);
    ensure!(connections == 3, "3 connections of the router arrived as {connections}");
    expect_own(&running, "tcp", family)
}

/// Makes sure that the host's own traffic was captured, and once only.
fn expect_own(running: &crate::common::Running, protocol: &str, family: Family) -> Result<()> {
    let Some(proxy) = running.proxy() else {
        return Ok(());
    };
    ensure!(proxy.counter("own_redirected")? > 0, "the router's own traffic went past the proxy");
    let flows = proxy.flows()?;
    let prefix = SocketAddr::new(family.uplink(), 0).to_string();
    let prefix = prefix.trim_end_matches('0');
    let own = flows
        .iter()
        .filter(|flow| flow.protocol == protocol && flow.client.starts_with(prefix) && flow.action == "proxy")
        .count();
    ensure!(own > 0, "no {protocol} flow of the router itself is listed: {flows:#?}");
    Ok(())
}

fn own_udp(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), 9201);
    let _reflector = UdpServer::reflector(&lab.server, to)?;
    let _dns = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let running = start(lab, OWN)?;
    let answer = server::dig(&lab.router, family.anywhere(2), family, Protocol::Udp)?;
    ensure!(answer == family.anywhere(80), "the router's own DNS question got {answer}");
    for (bound, expected) in [(family.unspecified(), family.uplink()), (family.router(), family.router())] {
        let socket = peer::udp(&lab.router, at(bound, 0))?;
        for _ in 0..3 {
            let (seen, from) = peer::exchange(&socket, to, b"who am I?")?;
            let seen: SocketAddr = String::from_utf8_lossy(&seen).parse()?;
            ensure!(from == to, "the reply to the router's own datagram for {to} came from {from}");
            ensure!(
                seen.ip() == expected,
                "a socket of the router bound to {bound} is seen as {seen}, expected {expected}"
            );
        }
    }
    expect_own(&running, "udp", family)
}

fn own_and_captured(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _service = service(lab, family)?;
    let _inside = UdpServer::echo(&lab.router, at(family.router(), 5300))?;
    let running = start(lab, flags)?;
    for _ in 0..3 {
        expect_service(lab, family)?;
        let to = at(family.anywhere(7), crate::common::SERVICE_PORT);
        let mut stream = peer::connect(&lab.router, None, to, Duration::from_secs(5))?;
        peer::ask(&mut stream, "the router too")?;
        let socket = peer::udp(&lab.router, at(family.unspecified(), 0))?;
        let (_, from) = peer::exchange(&socket, to, b"the router too")?;
        ensure!(from == to, "the reply to the router's own datagram for {to} came from {from}");
        // What the router answers to its clients is not its own new traffic.
        let socket = peer::udp(&lab.client, at(family.client(), 0))?;
        peer::exchange(&socket, at(family.router(), 5300), b"hello, router")?;
    }
    running.expect_tcp(6)?;
    expect_own(&running, "tcp", family)
}

pub(crate) fn own_with_valid_mark(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    for interface in ["all", "default", "lan", "wan", "lo"] {
        lab.router.set_sysctls(&[
            (&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1"),
            (&format!("net/ipv4/conf/{interface}/rp_filter"), "1"),
        ])?;
    }
    own_and_captured(lab, family, flags)
}

/// A program that connects to the port of the proxy itself: refused and
/// counted, without a loop.
fn own_port_dialled(lab: &Lab, family: Family) -> Result<()> {
    let mut proxy = start_proxy(lab, OWN)?;
    let dial = |namespace: &Namespace, address: IpAddr| -> Result<()> {
        let started = Instant::now();
        let ended = namespace.enter(|| {
            let mut stream = peer::try_connect(None, at(address, 15_001), Duration::from_secs(5))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            peer::read(&mut stream, &mut [0; 16])
        })?;
        let (took, refused) = (started.elapsed(), !matches!(ended, Ok(1..)));
        ensure!(
            refused && took < patience(Duration::from_secs(2)),
            "port 15001 of {address}, dialled on the {}: {ended:?} after {took:?}",
            namespace.role()
        );
        Ok(())
    };
    dial(&lab.router, family.loopback())?;
    dial(&lab.router, family.router())?;
    dial(&lab.client, family.router())?;
    let used = proxy.daemon.cpu_time()?;
    std::thread::sleep(Duration::from_secs(1));
    let idle = proxy.daemon.cpu_time()?.saturating_sub(used);
    ensure!(
        idle < patience(Duration::from_millis(200)).min(Duration::from_millis(700)),
        "the proxy uses {idle:?} of processor time in a second after that: a loop"
    );
    ensure!(proxy.daemon.ended()?.is_none(), "the proxy has ended, {}", proxy.daemon.describe());
    let loops = counters_named(&proxy, "loop")?;
    ensure!(
        loops.1 >= 1,
        "no counter tells of the connection that the proxy refused: {loops:?} of {}",
        proxy.status()?["counters"]
    );
    let _service = service(lab, family)?;
    expect_service(lab, family)
}

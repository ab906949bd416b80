//! Source NAT on the uplink while the proxy keeps the client's address (T9).

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Running, Scenarios, at, start};

pub(crate) const SCENARIOS: Scenarios = &[
    ("T9_nft_masquerade", |lab, family| both_ways(lab, family, Nat::Masquerade, "--iface lan")),
    ("T9_iptables_masquerade", |lab, family| both_ways(lab, family, Nat::Iptables, "--iface lan")),
    ("T9_snat_to_an_address_of_no_interface", |lab, family| {
        both_ways(lab, family, Nat::Source, "--iface lan")
    }),
    ("T9_masquerade_on_an_interface_that_is_captured_too", |lab, family| {
        both_ways(lab, family, Nat::Masquerade, "--iface lan --iface wan")
    }),
    ("T9_masquerade_and_own_traffic", |lab, family| {
        both_ways(lab, family, Nat::Masquerade, "--iface lan --own-traffic")
    }),
    ("T9_ports_change_too", |lab, family| both_ways(lab, family, Nat::Ports, "--iface lan")),
    ("T9_source_client_port", client_port),
    ("T9_a_client_port_is_used_again_at_once", reused_port),
    ("T9_services_on_the_same_port", same_port),
    ("clsact_T9_nft_masquerade", |lab, family| {
        both_ways(lab, family, Nat::Masquerade, "--iface lan --attach clsact")
    }),
];

const PORT: u16 = 9900;

/// Ways to change the source of what leaves by `wan`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Nat {
    /// nft, to the address of the interface.
    Masquerade,
    /// The same by iptables.
    Iptables,
    /// nft, to an address that is only routed to the router.
    Source,
    /// nft, to the address of the interface and to ports that no socket has chosen.
    Ports,
}

impl Nat {
    /// Sets the rule; the address that servers see from now on.
    pub(crate) fn apply(self, lab: &Lab, family: Family) -> Result<IpAddr> {
        let elsewhere = family.pick("198.51.100.77", "2001:db8:2::77");
        let nft = |statement: &str| {
            let table = format!(
                "table inet nat {{\nchain out {{\ntype nat hook postrouting priority srcnat\noifname wan {statement}\n}}\n}}\n"
            );
            lab.router.cmd("nft").args(["-f", "-"]).stdin(table).check()
        };
        match self {
            Self::Masquerade => nft("masquerade")?,
            Self::Ports => nft("meta l4proto { tcp, udp } masquerade to :10000-14999")?,
            Self::Iptables => {
                let iptables = family.pick("iptables", "ip6tables");
                lab.router.sh(&format!("{iptables} -t nat -A POSTROUTING -o wan -j MASQUERADE"))?
            }
            Self::Source => {
                lab.server.ip_batch(&format!("route add {elsewhere} via {}\n", family.uplink()))?;
                nft(&format!(
                    "{} snat to {elsewhere}",
                    family.pick("meta nfproto ipv4", "meta nfproto ipv6")
                ))?
            }
        };
        Ok(match self {
            Self::Source => elsewhere.parse()?,
            _ => family.uplink(),
        })
    }
}

/// A server that says whom it sees, and then gives back what it gets.
fn telling_echo(lab: &Lab, family: Family) -> Result<TcpServer> {
    TcpServer::start(&lab.server, at(family.unspecified(), PORT), |mut stream, client| {
        if writeln!(stream, "{client}").is_ok() {
            let (mut reader, mut writer) = (&stream, &stream);
            // The client may be gone by now.
            let _ = std::io::copy(&mut reader, &mut writer);
        }
    })
}

/// Sends a lot each way; the address and port that the server sees.
fn exchange(stream: &mut TcpStream) -> Result<std::net::SocketAddr> {
    let seen = peer::read_line(stream).context("no word from the server")?.parse()?;
    let sent = peer::pattern(200_000);
    stream.write_all(&sent)?;
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == sent, "the bytes came back changed");
    Ok(seen)
}

fn both_ways(lab: &Lab, family: Family, nat: Nat, flags: &str) -> Result<()> {
    let seen = nat.apply(lab, family)?;
    let running = start(lab, flags)?;
    tcp(lab, family, seen, &running)?;
    udp(lab, family, seen, &running)
}

fn tcp(lab: &Lab, family: Family, nat: IpAddr, running: &Running) -> Result<()> {
    const CONNECTIONS: u64 = 1000;
    let _server = telling_echo(lab, family)?;
    let to = at(family.anywhere(1), PORT);
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(3))?;
    let seen = exchange(&mut stream)?;
    ensure!(seen.ip() == nat, "the server sees {seen}, expected {nat}");
    if let Some(proxy) = running.proxy() {
        let flow = proxy.flow("tcp", &stream.local_addr()?.to_string(), &to.to_string())?;
        ensure!(
            flow.state == "established" && flow.bytes_up > 200_000 && flow.bytes_down > 200_000,
            "200,000 bytes went each way, and the flow is {flow:?}"
        );
    }
    drop(stream);
    let _load = LoadServer::start(&lab.server, at(family.unspecified(), PORT + 1), nat)?;
    let load = Load {
        targets: vec![at(family.anywhere(1), PORT + 1), at(family.anywhere(2), PORT + 1)],
        concurrency: 32,
        connections: CONNECTIONS,
        duration: Duration::from_secs(20),
        reset: false,
    };
    load.run(&lab.client, &AtomicBool::new(false))?.expect_all(CONNECTIONS)?;
    running.expect_tcp(1 + CONNECTIONS)
}

fn udp(lab: &Lab, family: Family, nat: IpAddr, running: &Running) -> Result<()> {
    let (reflector, echo) = (at(family.anywhere(3), PORT), at(family.anywhere(4), PORT));
    let _reflector = UdpServer::reflector(&lab.server, reflector)?;
    let _echo = UdpServer::echo(&lab.server, echo)?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (seen, _) = peer::exchange(&socket, reflector, b"who am I?")?;
    let seen: std::net::SocketAddr = String::from_utf8_lossy(&seen).parse()?;
    ensure!(seen.ip() == nat, "the server sees {seen}, expected {nat}");
    // The last is sent in fragments, and comes back so.
    for length in [0, 10, 1200, 4000] {
        let datagram = peer::pattern(length);
        let (back, from) = peer::exchange(&socket, echo, &datagram)?;
        ensure!(from == echo && back == datagram, "{length} bytes came back changed, from {from}");
    }
    running.expect_udp(4)
}

/// One client port makes both halves of a connection alike to connection
/// tracking; without tracking of the client's half NAT sees the other one.
fn client_port(lab: &Lab, family: Family) -> Result<()> {
    let untracked = "table inet untracked {\n\
        chain prerouting {\n\
        type filter hook prerouting priority raw\n\
        iifname lan meta mark & 0x1 == 0x1 notrack\n\
        }\n\
        chain output {\n\
        type filter hook output priority raw\n\
        oifname lan meta mark & 0x2 == 0x2 notrack\n\
        }\n\
        }\n";
    lab.router.cmd("nft").args(["-f", "-"]).stdin(untracked).check()?;
    both_ways(lab, family, Nat::Masquerade, "--iface lan --source client-port")
}

fn reused_port(lab: &Lab, family: Family) -> Result<()> {
    let nat = Nat::Masquerade.apply(lab, family)?;
    let _server = telling_echo(lab, family)?;
    let running = start(lab, "--iface lan")?;
    for round in 0..10 {
        let from = at(family.client(), 12_345);
        let to = at(family.anywhere(1), PORT);
        let mut stream = peer::connect(&lab.client, Some(from), to, Duration::from_millis(900))
            .with_context(|| format!("round {round}"))?;
        let seen = exchange(&mut stream)?;
        ensure!(seen.ip() == nat, "the server sees {seen}, expected {nat}");
        peer::reset(stream)?;
        // A reset is under way a moment longer than a SYN that follows it by another route.
        std::thread::sleep(Duration::from_millis(20));
    }
    running.expect_tcp(10)
}

/// Services of the router on the address and the very ports that NAT gave to a
/// connection and a flow of the proxy.
fn same_port(lab: &Lab, family: Family) -> Result<()> {
    let nat = Nat::Masquerade.apply(lab, family)?;
    let _server = telling_echo(lab, family)?;
    let to = at(family.anywhere(3), PORT);
    let _reflector = UdpServer::reflector(&lab.server, to)?;
    let running = start(lab, "--iface lan")?;
    let mut stream = peer::connect(&lab.client, None, at(family.anywhere(1), PORT), Duration::from_secs(3))?;
    let tcp = exchange(&mut stream)?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (seen, _) = peer::exchange(&socket, to, b"who am I?")?;
    let udp: std::net::SocketAddr = String::from_utf8_lossy(&seen).parse()?;
    ensure!(tcp.ip() == nat && udp.ip() == nat, "the server sees {tcp} and {udp}, expected {nat}");
    let _tcp_service = TcpServer::echo(&lab.router, tcp)?;
    let _udp_service = UdpServer::echo(&lab.router, udp)?;
    for _ in 0..3 {
        // From outside, and from the very host that the client talks to.
        let mut asking =
            peer::connect(&lab.server, Some(at(family.anywhere(1), 0)), tcp, Duration::from_secs(3))?;
        let (word, _) = peer::ask(&mut asking, "service?")?;
        ensure!(word == "service?", "the router's TCP service answered {word:?}");
        let asking = peer::udp(&lab.server, at(family.anywhere(3), 0))?;
        let (word, _) = peer::exchange(&asking, udp, b"service?")?;
        ensure!(word == b"service?", "the router's UDP service answered {word:?}");
        // And the client goes on.
        let (word, _) = peer::ask(&mut stream, "still there?")?;
        ensure!(word == "still there?", "the server's echo was {word:?}");
        let (again, from) = peer::exchange(&socket, to, b"who am I?")?;
        ensure!(from == to && again == seen, "the server sees another port than before");
    }
    running.expect_tcp(1)?;
    running.expect_udp(4)
}

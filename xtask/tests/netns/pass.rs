//! What is none of the proxy's business passes as if it was not there (T12).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Family, Lab, Namespace, server, url};

use crate::common::{Running, Scenarios, at, start};
use crate::packet;

pub(crate) const SCENARIOS: Scenarios = &[
    ("T12_icmp", |lab, family| icmp(lab, family, "--iface lan")),
    ("T12_arp_and_neighbour_discovery", neighbours),
    ("T12_sctp_esp_gre_and_unknown_protocols", other_protocols),
    ("T12_multicast", multicast),
    ("T12_broadcast_and_link_local", link_wide),
    ("T12_igmp_and_mld", group_management),
    ("this_host_is_reached_directly", this_host),
    ("clsact_T12_icmp", |lab, family| icmp(lab, family, "--iface lan --attach clsact")),
];

/// Makes sure that nothing was captured.
pub(crate) fn expect_untouched(running: &Running) -> Result<()> {
    let Some(proxy) = running.proxy() else {
        return Ok(());
    };
    for counter in ["steered_tcp_new", "steered_udp", "steered_established", "steered_fragment"] {
        let count = proxy.counter(counter)?;
        ensure!(
            count == 0,
            "{counter} is {count}: something was captured that is none of the proxy's business"
        );
    }
    Ok(())
}

fn ping(from: &Namespace, more: &[&str], to: &str) -> Result<()> {
    let output = from
        .cmd("ping")
        .args(["-n", "-c", "3", "-i", "0.2", "-W", &pace::seconds(2)])
        .args(more)
        .arg(to)
        .check()?;
    ensure!(output.stdout.contains("3 received"), "some packets were lost, {}", output.describe());
    Ok(())
}

fn icmp(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let running = start(lab, flags)?;
    for to in [family.anywhere(1), family.server(), family.router(), family.uplink()] {
        ping(&lab.client, &[family.flag()], &to.to_string())?;
    }
    // In fragments, and the other way.
    ping(&lab.client, &[family.flag(), "-s", "4000"], &family.anywhere(1).to_string())?;
    ping(&lab.server, &[family.flag()], &family.client().to_string())?;
    // Errors: a closed port on the client is reported to a server that tries it.
    let probe = peer::udp(&lab.server, at(family.server(), 0))?;
    probe.connect(at(family.client(), 9))?;
    probe.send(b"is this port open?")?;
    let error = peer::receive(&probe, &mut [0; 16]).err().context("somebody answered on a closed port")?;
    ensure!(
        error.kind() == std::io::ErrorKind::ConnectionRefused,
        "expected ICMP port unreachable, got {error}"
    );
    expect_untouched(&running)
}

fn neighbours(lab: &Lab, family: Family) -> Result<()> {
    let running = start(lab, "--iface lan")?;
    for namespace in [&lab.client, &lab.router] {
        namespace.sh("ip neigh flush all")?;
    }
    ping(&lab.client, &[family.flag()], &family.anywhere(1).to_string())?;
    lab.router.sh("ip neigh flush all")?;
    ping(&lab.router, &[family.flag()], &family.client().to_string())?;
    expect_untouched(&running)
}

/// Protocol numbers by IANA.
const PROTOCOLS: [(u8, &str); 6] = [
    (132, "SCTP"),
    (50, "ESP"),
    (47, "GRE"),
    (136, "UDP-Lite"),
    (33, "DCCP"),
    (253, "an experimental protocol"),
];

fn other_protocols(lab: &Lab, family: Family) -> Result<()> {
    let running = start(lab, "--iface lan")?;
    let (from, to) = (family.client(), family.anywhere(1));
    for (protocol, name) in PROTOCOLS {
        let mut receiver = packet::receiver(&lab.server, to, protocol, patience(Duration::from_secs(3)))?;
        let data = format!("these bytes look like nothing that {name} knows");
        packet::send(&lab.client, to, &[packet::other(from, to, protocol, data.as_bytes())?])?;
        let mut buffer = [0; 256];
        let length = peer::read(&mut receiver, &mut buffer)
            .with_context(|| format!("a packet of {name} (protocol {protocol}) did not arrive"))?;
        // raw(7): IPv4 comes with its header, IPv6 without.
        ensure!(buffer[..length].ends_with(data.as_bytes()), "a packet of {name} arrived changed");
    }
    expect_untouched(&running)
}

fn multicast(lab: &Lab, family: Family) -> Result<()> {
    let group: IpAddr = family.pick(
        IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3)),
        IpAddr::V6(Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, 0, 0x123)),
    );
    let port = 5007;
    let receiver = peer::udp(&lab.router, at(family.unspecified(), port))?;
    let index = |namespace: &Namespace, name: &str| -> Result<u32> {
        Ok(namespace.enter(|| nix::net::if_::if_nametoindex(name))??)
    };
    let (lan, eth0) = (index(&lab.router, "lan")?, index(&lab.client, "eth0")?);
    match group {
        IpAddr::V4(group) => receiver.join_multicast_v4(&group, &Ipv4Addr::new(192, 0, 2, 1))?,
        IpAddr::V6(group) => receiver.join_multicast_v6(&group, lan)?,
    }
    let running = start(lab, "--iface lan")?;
    let sender = peer::udp(&lab.client, at(family.client(), 0))?;
    let reference = socket2::SockRef::from(&sender);
    match family {
        Family::V4 => reference.set_multicast_if_v4(&Ipv4Addr::new(192, 0, 2, 2))?,
        Family::V6 => reference.set_multicast_if_v6(eth0)?,
    }
    expect_datagram(&sender, at(group, port), &receiver)?;
    expect_untouched(&running)
}

/// Sends a datagram: it must arrive, with its sender's address and port.
fn expect_datagram(
    sender: &std::net::UdpSocket,
    to: SocketAddr,
    receiver: &std::net::UdpSocket,
) -> Result<()> {
    sender.send_to(b"to whom it may concern", to)?;
    let mut buffer = [0; 100];
    let (length, from) = peer::receive(receiver, &mut buffer)
        .with_context(|| format!("a datagram for {to} did not arrive"))?;
    ensure!(buffer[..length] == *b"to whom it may concern", "a datagram for {to} arrived changed");
    let sent_from = sender.local_addr()?;
    ensure!(
        from.port() == sent_from.port() && from.ip() == sent_from.ip(),
        "a datagram for {to} was sent by {sent_from} and arrived from {from}"
    );
    Ok(())
}

fn link_wide(lab: &Lab, family: Family) -> Result<()> {
    let port = 5008;
    let receiver = peer::udp(&lab.router, at(family.unspecified(), port))?;
    let running = start(lab, "--iface lan")?;
    match family {
        Family::V4 => {
            let sender = peer::udp(&lab.client, at(family.client(), 0))?;
            sender.set_broadcast(true)?;
            expect_datagram(&sender, at(Ipv4Addr::new(192, 0, 2, 255).into(), port), &receiver)?;
            expect_datagram(&sender, at(Ipv4Addr::BROADCAST.into(), port), &receiver)?;
        }
        Family::V6 => {
            let output = lab.router.sh("ip -oneline -6 addr show dev lan scope link")?;
            let mut words = output.stdout.split_whitespace();
            words.find(|word| *word == "inet6");
            let router = words
                .next()
                .and_then(|prefix| prefix.split('/').next())
                .context("the router has no link-local address")?;
            ping(&lab.client, &["-6"], &format!("{router}%eth0"))?;
            let nc = lab.client.cmd("nc").args([
                "-u",
                "-w",
                "1",
                "-6",
                &format!("{router}%eth0"),
                &port.to_string(),
            ]);
            nc.stdin("to whom it may concern").run()?;
            let mut buffer = [0; 100];
            let (_, from) = peer::receive(&receiver, &mut buffer)
                .context("a datagram for a link-local address did not arrive")?;
            ensure!(
                from.to_string().starts_with("[fe80:"),
                "a datagram between link-local addresses arrived from {from}"
            );
        }
    }
    expect_untouched(&running)
}

fn group_management(lab: &Lab, family: Family) -> Result<()> {
    let running = start(lab, "--iface lan")?;
    match family {
        Family::V4 => {
            let all_hosts = Ipv4Addr::new(224, 0, 0, 1).into();
            let mut receiver = packet::receiver(&lab.router, all_hosts, 2, Duration::from_secs(3))?;
            // IGMPv2 report for 239.1.2.3, RFC 2236.
            let report = [0x16, 0x00, 0xf9, 0xfa, 239, 1, 2, 3];
            packet::send(&lab.client, all_hosts, &[packet::other(family.client(), all_hosts, 2, &report)?])?;
            let mut buffer = [0; 100];
            let length = peer::read(&mut receiver, &mut buffer)
                .context("an IGMP report did not arrive at the router")?;
            ensure!(buffer[..length].ends_with(&report), "an IGMP report arrived changed");
        }
        // All nodes of the link, by way of multicast ICMPv6.
        Family::V6 => ping(&lab.client, &["-6"], "ff02::1%eth0")?,
    }
    expect_untouched(&running)
}

fn this_host(lab: &Lab, family: Family) -> Result<()> {
    let _nginx = server::web(lab, &lab.router, &[80])?;
    let _echo = UdpServer::echo(&lab.router, at(family.router(), 5300))?;
    let running = start(lab, "--iface lan")?;
    for (to, port) in [(family.router(), 20_001), (family.uplink(), 20_002)] {
        let output = lab
            .client
            .cmd("curl")
            .args(["--silent", "--show-error", "--max-time", &pace::seconds(5)])
            .args(["--local-port", &port.to_string(), &url(to, 80, "/")])
            .check()?;
        ensure!(
            output.stdout.starts_with(&format!("{} {port} ", family.client())),
            "the router's own web server does not see the client's address and port, {}",
            output.describe()
        );
    }
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (echo, from) = peer::exchange(&socket, at(family.router(), 5300), b"hello")?;
    ensure!(
        echo == b"hello" && from == at(family.router(), 5300),
        "the router's own UDP service answered {echo:?} from {from}"
    );
    expect_untouched(&running)
}

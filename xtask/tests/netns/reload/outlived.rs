//! Flows that are older than the rules of now.

use std::io::Write;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Proxy};

use super::load::ECHO;
use super::{reload, rule};
use crate::common::at;
use crate::matching::unused;
use crate::policy::{
    Client,
    Fate::{self, Dropped, Passed, Proxied, Rejected},
    all_reflectors, start_with_rules, target, tcp_fate, within,
};
use crate::tcp;

/// A connection and a UDP flow that go on.
struct Open {
    stream: TcpStream,
    socket: UdpSocket,
    from: SocketAddr,
    to: SocketAddr,
}

impl Open {
    fn new(lab: &Lab, family: Family, to: SocketAddr) -> Result<Self> {
        let from = unused(family.client());
        let mut open = Self {
            stream: peer::connect(&lab.client, Some(from), to, Duration::from_secs(5))?,
            socket: peer::udp(&lab.client, from)?,
            from,
            to,
        };
        open.expect_alive()?;
        Ok(open)
    }

    fn expect_alive(&mut self) -> Result<()> {
        let (echo, _) = peer::ask(&mut self.stream, "still there?").context("the connection")?;
        ensure!(echo == "still there?", "the connection's echo was {echo:?}");
        let (echo, from) = peer::exchange(&self.socket, self.to, b"still there?").context("the UDP flow")?;
        ensure!(echo == b"still there?" && from == self.to, "{from} answered {echo:?}");
        Ok(())
    }

    fn expect_action(&self, proxy: &Proxy, action: &str) -> Result<()> {
        for protocol in ["tcp", "udp"] {
            let flow = proxy.flow(protocol, &self.from.to_string(), &self.to.to_string())?;
            ensure!(flow.action == action, "expected action {action}: {flow:#?}");
        }
        Ok(())
    }
}

pub(super) fn outlive(lab: &Lab, _: Family) -> Result<()> {
    // Echoes beside the reflectors of new flows.
    let echo = |family, net| at(within(family, net, 1), ECHO);
    let all = || Family::ALL.into_iter().flat_map(|family| [(family, 1, "proxy"), (family, 2, "pass")]);
    let _echoes = all()
        .map(|(family, net, _)| {
            let to = echo(family, net);
            Ok((TcpServer::echo(&lab.server, to)?, UdpServer::echo(&lab.server, to)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let _servers = all_reflectors(lab, &[1, 2])?;
    let (proxy, config) = start_with_rules(lab, "", &rule(2, "pass"))?;
    let mut open = all()
        .map(|(family, net, action)| Ok((Open::new(lab, family, echo(family, net))?, action)))
        .collect::<Result<Vec<_>>>()?;
    let actions: [(&str, Fate, &str, Fate); 4] = [
        ("pass", Passed, "proxy", Proxied),
        ("reject", Rejected, "reject", Rejected),
        ("drop", Dropped, "drop", Dropped),
        ("proxy", Proxied, "pass", Passed),
    ];
    for (first, fate_of_first, second, fate_of_second) in actions {
        config.write(&(rule(1, first) + &rule(2, second)))?;
        reload(&proxy)?;
        for (open, action) in &mut open {
            open.expect_alive().with_context(|| format!("{} ({action}) after {first}, {second}", open.to))?;
            open.expect_action(&proxy, action)?;
        }
        for family in Family::ALL {
            let client = Client::of(lab, family);
            client.expect(target(family, 1), fate_of_first)?;
            client.expect(target(family, 2), fate_of_second)?;
        }
    }
    Ok(())
}

/// The name of a target, over TCP and UDP.
fn named(lab: &Lab, name: &'static str, port: u16) -> Result<(TcpServer, UdpServer)> {
    let address = at(Family::V4.loopback(), port);
    let tcp = TcpServer::start(&lab.router, address, move |mut stream, _| {
        while peer::read_line(&mut stream).is_ok() {
            // A failure shows at the client.
            let _ = stream.write_all(format!("{name}\n").as_bytes());
        }
    })?;
    Ok((tcp, UdpServer::start(&lab.router, address, move |_, _| Some(name.into()))?))
}

pub(super) fn targets(lab: &Lab, _: Family) -> Result<()> {
    let _targets = [named(lab, "first", 7001)?, named(lab, "second", 7002)?];
    let to_target = |port| format!("{}target = '127.0.0.1:{port}'\n", rule(1, "divert"));
    let (proxy, config) = start_with_rules(lab, "", &to_target(7001))?;
    let open = |family: Family| -> Result<_> {
        let to = target(family, 1);
        let stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
        Ok((stream, peer::udp(&lab.client, unused(family.client()))?, to))
    };
    let expect = |(stream, socket, to): &mut (TcpStream, UdpSocket, SocketAddr), name: &str| -> Result<()> {
        let (answer, _) = peer::ask(stream, "who is there?")?;
        let (over_udp, from) = peer::exchange(socket, *to, b"who is there?")?;
        ensure!(
            answer == name && over_udp == name.as_bytes() && from == *to,
            "expected {name}: {answer} over TCP, {:?} from {from} over UDP",
            String::from_utf8_lossy(&over_udp)
        );
        Ok(())
    };
    let mut old = Family::ALL.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    for flow in &mut old {
        expect(flow, "first")?;
    }
    for rules in [to_target(7002), rule(1, "drop"), to_target(7002)] {
        config.write(&rules)?;
        reload(&proxy)?;
        for flow in &mut old {
            expect(flow, "first").with_context(|| rules.clone())?;
        }
    }
    for family in Family::ALL {
        expect(&mut open(family)?, "second")?;
    }
    Ok(())
}

/// The proxy's socket of the connection before is in `TIME_WAIT`: the stack finds it for
/// the SYN, and does not forward a packet that has a socket.
pub(super) fn port_used_again(lab: &Lab, _: Family) -> Result<()> {
    let _servers =
        Family::ALL.map(|family| tcp::closes_first(lab, family)).into_iter().collect::<Result<Vec<_>>>()?;
    let (proxy, config) = start_with_rules(lab, "", "")?;
    for family in Family::ALL {
        tcp::rounds(lab, family, 1)?;
    }
    config.write("[[rule]]\naction = 'pass'\n")?;
    reload(&proxy)?;
    for family in Family::ALL {
        let times = tcp::rounds(lab, family, 2)?;
        let slow = pace::patience(Duration::from_millis(800));
        ensure!(times.iter().all(|time| *time < slow), "connections from the same port took {times:?}");
    }
    Ok(())
}

/// The proxy may take the port of a client's connection that has passed, once that has ended:
/// what the server answers is then the proxy's.
pub(super) fn port_of_passed(lab: &Lab, _: Family) -> Result<()> {
    const PORTS: [u16; 2] = [40_000, 40_001];
    let _servers = all_reflectors(lab, &[1])?;
    let (proxy, config) = start_with_rules(lab, "", "[[rule]]\naction = 'pass'\n")?;
    lab.router
        .set_sysctls(&[("net/ipv4/ip_local_port_range", &PORTS.map(|port| port.to_string()).join(" "))])?;
    let patient = Duration::from_secs(5);
    for family in Family::ALL {
        for port in PORTS {
            let (fate, _) = tcp_fate(&lab.client, at(family.client(), port), target(family, 1), patient)?;
            ensure!(fate == Passed, "by a rule that lets all pass: {fate:?}");
        }
    }
    config.write("")?;
    reload(&proxy)?;
    for family in Family::ALL {
        let (fate, _) = tcp_fate(&lab.client, unused(family.client()), target(family, 1), patient)?;
        ensure!(fate == Proxied, "by no rule: {fate:?}");
    }
    Ok(())
}

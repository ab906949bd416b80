//! What servers and targets are told of the client (PROXY protocol).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use xtask::lab::pace;
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Family, Lab, server, upstream, url};

use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios =
    &[("send_proxy_to_local_targets", send_proxy), ("send_proxy_of_datagrams", send_proxy_udp)];

/// nginx and `HAProxy` on this host, to which flows are diverted, and a server that they go to
/// learn client and destination.
fn send_proxy(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let told = [8080, 8081].map(|port| at(family.loopback(), port));
    let _nginx = upstream::nginx_that_is_told(lab, &lab.router, told[0])?;
    let _haproxy = upstream::haproxy_that_is_told(lab, &lab.router, told[1])?;
    let curl = |from: u16, port: u16| -> Result<String> {
        let page = url(family.anywhere(80), port, "/");
        let port = from.to_string();
        let curl =
            lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), "--local-port", &port, &page]);
        Ok(curl.check()?.stdout)
    };
    let expected =
        |from: u16, port: u16| format!("{} {from} {} {port}", family.client(), family.anywhere(80));
    for (number, version) in (0..).zip(["v1", "v2"]) {
        let rule = |port: u16, target: SocketAddr| {
            format!(
                "[[rule]]\nto_port = {port}\naction = 'divert'\ntarget = '{target}'\nsend_proxy = '{version}'\n"
            )
        };
        let rules = rule(80, told[0]) + &rule(81, told[1]);
        let proxy = ConfigFile::new(lab, &rules)?.launch(lab, "--iface lan").start()?;
        for port in [80, 81] {
            let from = 30_000 + 10 * number + port;
            let seen = curl(from, port)?;
            ensure!(seen == expected(from, port), "{version}, port {port}: it is told {seen:?}");
        }
        proxy.terminate(Duration::from_secs(15))?;
    }
    // Straight to a server, and a target that is told nothing.
    let _server = upstream::nginx_that_is_told(lab, &lab.server, at(family.unspecified(), 80))?;
    let _web = server::web(lab, &lab.router, &[8082])?;
    let rules = format!(
        "[source]\nsend_proxy = 'v2'\n[[rule]]\nto_port = 81\naction = 'divert'\ntarget = '{}'\nsend_proxy = 'off'\n",
        at(family.loopback(), 8082)
    );
    let _proxy = ConfigFile::new(lab, &rules)?.launch(lab, "--iface lan").start()?;
    let seen = curl(31_000, 80)?;
    ensure!(seen == expected(31_000, 80), "the server is told {seen:?}");
    let page = curl(31_001, 81)?;
    ensure!(page.starts_with(&format!("{} ", family.loopback())), "{page:?}");
    Ok(())
}

/// Each datagram brings client and destination along.
fn send_proxy_udp(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let target = at(family.loopback(), 5300);
    let _target = UdpServer::start(&lab.router, target, |datagram, _| Some(datagram.to_vec()))?;
    let rules =
        format!("[[rule]]\nto_port = 53\naction = 'divert'\ntarget = '{target}'\nsend_proxy = 'v2'\n");
    let _proxy = ConfigFile::new(lab, &rules)?.launch(lab, "--iface lan").start()?;
    let client = at(family.client(), 4000);
    let socket = peer::udp(&lab.client, client)?;
    for (to, payload) in [(family.anywhere(53), &b"one"[..]), (family.anywhere(54), b"another")] {
        let (seen, from) = peer::exchange(&socket, at(to, 53), payload)?;
        ensure!(from == at(to, 53), "{from} answers");
        let signature = b"\r\n\r\n\0\r\nQUIT\n\x21";
        let octets = |address: std::net::IpAddr| match address {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let addresses = [octets(client.ip()), octets(to)].concat();
        let length = u16::try_from(addresses.len() + 4)?.to_be_bytes();
        let ports = [client.port().to_be_bytes(), 53_u16.to_be_bytes()].concat();
        let expected =
            [&signature[..], &[family.pick(0x12, 0x22)], &length, &addresses, &ports, payload].concat();
        ensure!(seen == expected, "the target got {seen:02x?}, expected {expected:02x?}");
    }
    Ok(())
}

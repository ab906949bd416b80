//! Servers that are asked for destinations by their names: QUIC.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::proxy::Proxy;
use xtask::lab::{Family, Lab, upstream};

use super::exit;
use crate::common::{Scenarios, at, needs_proxy};
use crate::domains::initials;
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("quic_is_asked_by_name", |lab, family| quic(lab, family, "")),
    ("quic_is_asked_by_name_and_rule", |lab, family| {
        // The rule asks for the name as well.
        quic(lab, family, "[[rule]]\ndomain = 'example.net'\naction = 'reject'\n")
    }),
];

/// Where the server finds the name; nobody is at the address that clients take it for.
fn named(family: Family) -> IpAddr {
    family.anywhere(9)
}

fn quic(lab: &Lab, family: Family, rules: &str) -> Result<()> {
    needs_proxy()?;
    let _v2ray = upstream::v2ray(lab, &lab.server, exit(family), &[("example.com", named(family))])?;
    let _named = UdpServer::echo(&lab.server, at(named(family), 443))?;
    let _other = UdpServer::reflector(&lab.server, at(family.anywhere(7), 7))?;
    let config = format!(
        "[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = 'socks5://{}'\nnames = true\n{rules}",
        exit(family)
    );
    let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
    let initials = initials()?;
    // In one datagram, and in two.
    for datagrams in [&initials[..1], &initials[1..]] {
        let socket = peer::udp(&lab.client, at(family.client(), 0))?;
        let to = at(family.anywhere(443), 443);
        for datagram in datagrams {
            socket.send_to(datagram, to)?;
        }
        for datagram in datagrams {
            expect(&socket, to.ip(), datagram, &proxy)?;
        }
        // What follows tells no name, and belongs to it.
        socket.send_to(b"and more", to)?;
        expect(&socket, to.ip(), b"and more", &proxy)?;
        // Another destination of that port is asked for by its address.
        let (seen, from) = peer::exchange(&socket, at(family.anywhere(7), 7), b"who am I?")?;
        ensure!(from == at(family.anywhere(7), 7), "{from} answers");
        let seen = String::from_utf8(seen)?;
        ensure!(!seen.contains(&family.client().to_string()), "it goes straight, from {seen}");
    }
    ensure!(proxy.counter("udp_named")? == 2, "names are not counted; {}", proxy.daemon.describe());
    Ok(())
}

/// The next that comes is this, from whom it was sent to.
fn expect(socket: &UdpSocket, from: IpAddr, expected: &[u8], proxy: &Proxy) -> Result<()> {
    let mut back = [0; 2000];
    let (length, sender) = peer::receive(socket, &mut back).with_context(|| proxy.daemon.describe())?;
    ensure!(sender.ip() == from, "{sender} answers");
    ensure!(back[..length] == *expected, "{length} other bytes come back");
    Ok(())
}

//! Options of IPv4 and extension headers of IPv6: what carries them is found,
//! and captured where it is TCP or UDP (H12).

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::common::{Running, Scenarios, at, start};
use crate::packet::{self, Extension};
use crate::sockopt;

pub(crate) const SCENARIOS: Scenarios = &[("H12_options_and_extension_headers", options)];

const PORT: u16 = 5600;

/// An option that a socket puts in every packet: its name, level, number and value.
type Sticky = (&'static str, libc::c_int, libc::c_int, &'static [u8]);

/// RFC 791 and RFC 2113. A full record route option has no room left to record.
const V4: [Sticky; 3] = [
    ("no-operation", libc::SOL_IP, libc::IP_OPTIONS, &[1, 1, 1, 0]),
    ("router alert", libc::SOL_IP, libc::IP_OPTIONS, &[0x94, 4, 0, 0]),
    ("record route", libc::SOL_IP, libc::IP_OPTIONS, &[7, 7, 4, 0, 0, 0, 0, 0]),
];

/// RFC 8200 and RFC 2711; the first byte is the kernel's to fill in.
const V6: [Sticky; 3] = [
    ("hop-by-hop", libc::SOL_IPV6, libc::IPV6_HOPOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]),
    ("router alert", libc::SOL_IPV6, libc::IPV6_HOPOPTS, &[0, 0, 5, 2, 0, 0, 1, 0]),
    ("destination", libc::SOL_IPV6, libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]),
];

fn options(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), PORT);
    let _tcp = TcpServer::echo(&lab.server, to)?;
    let _udp = UdpServer::echo(&lab.server, to)?;
    let running = start(lab, "--iface lan")?;
    let kinds = family.pick(V4, V6);
    for kind in kinds {
        sticky(lab, family, to, kind).with_context(|| format!("with the {} option", kind.0))?;
    }
    running.expect_tcp(kinds.len() as u64)?;
    running.expect_udp(2 * kinds.len() as u64)?;
    if family == Family::V6 {
        extension_headers(lab, &running)?;
    }
    Ok(())
}

fn sticky(lab: &Lab, family: Family, to: SocketAddr, (_, level, option, value): Sticky) -> Result<()> {
    let mut stream = lab.client.try_enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        sockopt::set_bytes(socket.as_fd(), level, option, value)?;
        socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
        socket.set_read_timeout(Some(peer::PATIENCE))?;
        Ok(std::net::TcpStream::from(socket))
    })?;
    let line = "x".repeat(5000);
    let (echo, _) = peer::ask(&mut stream, &line)?;
    ensure!(echo == line, "the echo over TCP differs");
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    sockopt::set_bytes(socket.as_fd(), level, option, value)?;
    for length in [10, 1200, 4000] {
        let datagram = peer::pattern(length);
        let (echo, from) = peer::exchange(&socket, to, &datagram)?;
        ensure!(echo == datagram && from == to, "{length} bytes over UDP came back changed, or from {from}");
    }
    Ok(())
}

const HOP_BY_HOP: Extension = (0, [0, 1, 4, 0, 0, 0, 0]);
const DESTINATION: Extension = (60, [0, 1, 4, 0, 0, 0, 0]);
/// Of an experimental type (RFC 3692), with no segment left: at its destination.
const ROUTED: Extension = (43, [0, 253, 0, 0, 0, 0, 0]);
/// One that still has to be routed to another address.
const ROUTING: Extension = (43, [0, 253, 1, 0, 0, 0, 0]);
/// A fragment that is all of its datagram (RFC 6946).
const ATOMIC: Extension = (44, [0, 0, 0, 0, 0, 0, 9]);

/// Headers that no socket option makes.
fn extension_headers(lab: &Lab, running: &Running) -> Result<()> {
    let family = Family::V6;
    let to = at(family.anywhere(2), PORT);
    let _reflector = UdpServer::reflector(&lab.server, to)?;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let from = socket.local_addr()?;
    let send = |extensions: &[Extension]| -> Result<()> {
        packet::send(&lab.client, to.ip(), &[packet::udp_with_extensions(from, to, extensions, b"hello")?])
    };
    let ask = |extensions: &[Extension]| -> Result<String> {
        send(extensions)?;
        let mut buffer = [0; 100];
        let (length, sender) = peer::receive(&socket, &mut buffer)
            .with_context(|| format!("no answer with headers {extensions:?}"))?;
        ensure!(sender == to, "the answer came from {sender}");
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    };
    for extensions in [
        &[ROUTED][..],
        &[ATOMIC],
        &[HOP_BY_HOP, DESTINATION],
        &[HOP_BY_HOP, DESTINATION, ROUTED, ATOMIC],
        &[HOP_BY_HOP, DESTINATION, ROUTED, ATOMIC, DESTINATION, DESTINATION],
    ] {
        let seen = ask(extensions)?;
        if running.proxy().is_some() {
            ensure!(seen != from.to_string(), "headers {extensions:?}: the datagram went past the proxy");
        }
    }
    // Documented: a longer chain passes, and so does what is still being routed,
    // which the server refuses.
    let passed = running.proxy().map(|proxy| proxy.counter("pass_protocol")).transpose()?;
    let seen = ask(&[DESTINATION; 7])?;
    ensure!(seen == from.to_string(), "seven headers: the server sees {seen}");
    send(&[ROUTING])?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    ensure!(peer::receive(&socket, &mut [0; 100]).is_err(), "a datagram with segments left was answered");
    if let (Some(proxy), Some(before)) = (running.proxy(), passed) {
        let now = proxy.counter("pass_protocol")?;
        ensure!(now >= before + 2, "pass_protocol went from {before} to {now}, expected 2 more");
    }
    Ok(())
}

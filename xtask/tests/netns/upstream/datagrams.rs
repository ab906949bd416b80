//! A long exchange of datagrams through each server that carries them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use xtask::lab::pace::{patience, share};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Daemon, Family, Lab, upstream};

use super::{Kind, SHADOWSOCKS, V2RAY, by_dante, dante, exit, through};
use crate::common::{Scenarios, at};

pub(super) const SCENARIOS: Scenarios = &[
    ("long_udp_by_dante", |lab, family| exchange(lab, family, by_dante(family), &dante(lab, family)?)),
    ("long_udp_by_shadowsocks", |lab, family| {
        let [_server, local] = upstream::shadowsocks(lab, &lab.server, exit(family))?;
        exchange(lab, family, SHADOWSOCKS, &local)
    }),
    ("long_udp_by_v2ray", |lab, family| {
        exchange(lab, family, V2RAY, &upstream::v2ray(lab, &lab.server, exit(family), &[])?)
    }),
];

/// How long it goes on, and how many datagrams have been answered by then.
const LASTS: Duration = Duration::from_secs(4);
const AT_LEAST: u64 = 2000;

/// Client ports that exchange at the same time.
const PORTS: u16 = 4;

/// What fits into a packet.
const USUAL: usize = 1472;

/// What each has under way: so many datagrams, and bytes of them, where they are several.
const WINDOW: usize = 8;
const WINDOW_BYTES: usize = 60_000;

/// After which a datagram counts as lost.
const LOST: Duration = Duration::from_secs(1);

/// Where the servers are.
const PORT: u16 = 7;

/// Several ports exchange datagrams of all sizes with several servers. Each is answered by whom it was sent to, by
/// what belongs to it, and none is lost.
fn exchange(lab: &Lab, family: Family, kind: Kind, exit: &Daemon) -> Result<()> {
    let _servers: Vec<_> = (1..=kind.hosts)
        .map(|n| {
            let answer = |datagram: &[u8], _| Some(datagram.iter().map(|byte| !byte).collect());
            UdpServer::start(&lab.server, at(family.anywhere(n), PORT), answer)
        })
        .collect::<Result<_>>()?;
    let proxy = through(lab, family, "socks5", "")?;
    let answered: u64 = thread::scope(|scope| {
        let clients: Vec<_> =
            (0..PORTS).map(|number| scope.spawn(move || client(lab, family, kind, 4000 + number))).collect();
        let answered = clients.into_iter().map(|client| client.join().expect("no panic"));
        answered.sum::<Result<u64>>()
    })
    .with_context(|| format!("{}; {}", exit.describe(), proxy.daemon.describe()))?;
    ensure!(answered >= share(AT_LEAST), "{answered} datagrams were exchanged within {LASTS:?}");
    let flows = proxy.status()?["connections"]["udp"].as_u64();
    ensure!(flows == Some(PORTS.into()), "one association a client port, not {flows:?}");
    Ok(())
}

/// How many were answered.
fn client(lab: &Lab, family: Family, kind: Kind, port: u16) -> Result<u64> {
    let socket = peer::udp(&lab.client, at(family.client(), port))?;
    socket.set_read_timeout(Some(patience(LOST)))?;
    let text = peer::pattern(1 << 16);
    // Sizes as most datagrams have them, and now and then one that comes in fragments.
    let (usual, long): (Vec<usize>, Vec<usize>) =
        kind.sizes.iter().filter(|size| **size >= size_of::<u64>()).partition(|size| **size <= USUAL);
    // Where the `number`th goes, and what it says: its number, and what differs from that of those before and after.
    let datagram = |number: u64| {
        let turn = usize::try_from(number).unwrap_or_default();
        let host = 1 + u16::try_from(turn % usize::from(kind.hosts)).unwrap_or_default();
        let length = match turn % 32 {
            31 if !long.is_empty() => long[turn / 32 % long.len()],
            _ => usual[turn % usual.len()],
        };
        let number = number.to_be_bytes();
        let from = turn % (text.len() - length);
        let payload = [&number, &text[from..from + length - number.len()]].concat();
        (at(family.anywhere(host), PORT), payload)
    };
    let began = Instant::now();
    let mut next = 0;
    let mut under_way: BTreeMap<u64, (SocketAddr, Vec<u8>)> = BTreeMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        while began.elapsed() < LASTS && under_way.len() < WINDOW {
            let (to, payload) = datagram(next);
            let bytes: usize = under_way.values().map(|(_, payload)| payload.len()).sum();
            if !under_way.is_empty() && bytes + payload.len() > WINDOW_BYTES {
                break;
            }
            socket.send_to(&payload, to)?;
            under_way.insert(next, (to, payload));
            next += 1;
        }
        if under_way.is_empty() {
            return Ok(next);
        }
        let (length, from) = match peer::receive(&socket, &mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let lost: Vec<_> = under_way.iter().map(|(n, (to, said))| (n, to, said.len())).collect();
                bail!("port {port}: of {next} datagrams no answer to {lost:?}");
            }
            Err(error) => return Err(error.into()),
        };
        let answer: Vec<u8> = buffer[..length].iter().map(|byte| !byte).collect();
        let number = answer.first_chunk().map(|number| u64::from_be_bytes(*number));
        let (to, payload) = number
            .and_then(|number| under_way.remove(&number))
            .with_context(|| format!("port {port}: {length} bytes from {from} that answer {number:?}"))?;
        ensure!(from == to, "port {port}: {to} answers as {from}");
        ensure!(
            answer == payload,
            "port {port}: the answer to {} bytes differs: {length} bytes",
            payload.len()
        );
    }
}

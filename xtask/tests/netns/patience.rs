//! Peers that vanish, stall or drip (F7): time-outs reap what is dead, and
//! nothing that lives.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Proxy};

use crate::common::{Scenarios, at, expect_service, service, start_proxy};

pub(crate) const SCENARIOS: Scenarios =
    &[("F7_peers_that_vanish", vanish), ("F7_peers_that_stall", stall), ("F7_peers_that_drip", drip)];

const PORT: u16 = 6200;
/// Time-outs that a test can wait for.
const SHORT: &str = "--iface lan --tcp-idle-timeout 2s --half-close-timeout 2s --udp-timeout 2s \
    --udp-timeout-unreplied 1s";

fn open_now(proxy: &Proxy) -> Result<(u64, u64)> {
    let connections = &proxy.status()?["connections"];
    let read = |name: &str| connections[name].as_u64().with_context(|| format!("no connections.{name}"));
    Ok((read("tcp")?, read("udp")?))
}

/// No connection is left, and no socket that was not there before. Pipes are, for the next.
fn expect_reaped(proxy: &Proxy, before: usize) -> Result<()> {
    wait_for("the time-outs", Duration::from_secs(6), || Ok(open_now(proxy)? == (0, 0)))
        .with_context(|| format!("open (TCP, UDP): {:?}", open_now(proxy)))?;
    wait_for("sockets to be closed", Duration::from_secs(1), || Ok(proxy.daemon.open_sockets()? <= before))
        .with_context(|| format!("{before} before and {:?} now", proxy.daemon.open_sockets()))
}

fn connect_all(lab: &Lab, family: Family, count: usize) -> Result<Vec<TcpStream>> {
    let to = at(family.anywhere(1), PORT);
    (0..count).map(|_| peer::connect(&lab.client, None, to, Duration::from_secs(5))).collect()
}

/// The client's link goes: no FIN and no reset ever comes.
fn vanish(lab: &Lab, family: Family) -> Result<()> {
    let to = at(family.anywhere(1), PORT);
    let _tcp = TcpServer::echo(&lab.server, to)?;
    let _udp = UdpServer::echo(&lab.server, to)?;
    let proxy = start_proxy(lab, SHORT)?;
    let before = proxy.daemon.open_sockets()?;
    let mut connections = connect_all(lab, family, 40)?;
    for (number, stream) in connections.iter_mut().enumerate() {
        peer::ask(stream, "hello")?;
        // Some have said good-bye to one direction before.
        if number % 4 == 0 {
            stream.shutdown(Shutdown::Write)?;
        }
    }
    let sockets: Vec<_> =
        (0..40).map(|_| peer::udp(&lab.client, at(family.client(), 0))).collect::<Result<_>>()?;
    for socket in &sockets {
        peer::exchange(socket, to, b"hello")?;
    }
    ensure!(open_now(&proxy)?.0 >= 30 && open_now(&proxy)?.1 == 40, "open: {:?}", open_now(&proxy)?);
    lab.client.sh("ip link set eth0 down")?;
    expect_reaped(&proxy, before)?;
    let idle = proxy.counter("tcp_idle_timeouts")?;
    ensure!(idle >= 30, "{idle} connections are counted as idle");
    ensure!(proxy.counter("udp_timeouts")? >= 40, "the UDP flows are not counted");
    Ok(())
}

/// Nobody reads at the other end, first the server, then the client: what is under
/// way stays in bounded buffers, and the connection is ended.
fn stall(lab: &Lab, family: Family) -> Result<()> {
    const COUNT: usize = 20;
    let to = at(family.anywhere(1), PORT);
    let chatty = at(family.anywhere(2), PORT);
    let _deaf = TcpServer::start(&lab.server, to, |stream, _| {
        std::thread::sleep(Duration::from_secs(8));
        drop(stream);
    })?;
    let _chatty =
        TcpServer::start(&lab.server, chatty, |mut stream, _| while stream.write_all(&[0; 8192]).is_ok() {})?;
    let proxy = start_proxy(lab, SHORT)?;
    let (before, memory) = (proxy.daemon.open_sockets()?, proxy.daemon.memory()?);
    let deaf = connect_all(lab, family, COUNT)?;
    for stream in &deaf {
        stream.set_nonblocking(true)?;
    }
    let _mute: Vec<_> = (0..COUNT)
        .map(|_| peer::connect(&lab.client, None, chatty, Duration::from_secs(5)))
        .collect::<Result<_>>()?;
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        for stream in &deaf {
            // Full, or ended: both are what this is about.
            let _ = (&mut &*stream).write(&[0; 8192]);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let grown = proxy.daemon.memory()?.saturating_sub(memory);
    // 40 connections with both directions' buffers, and what the allocator keeps.
    ensure!(grown < 64 << 20, "{} stalled connections cost {grown} bytes", 2 * COUNT);
    expect_reaped(&proxy, before)?;
    let idle = proxy.counter("tcp_idle_timeouts")?;
    ensure!(idle == 2 * COUNT as u64, "{idle} of {} connections are counted as idle", 2 * COUNT);
    Ok(())
}

/// A byte now and then is life: such a connection goes on for longer than every
/// time-out, half closed or not. One that stops is reaped.
fn drip(lab: &Lab, family: Family) -> Result<()> {
    let _service = service(lab, family)?;
    let to = at(family.anywhere(1), PORT);
    // Drips as long as the other side is there, whether that sends or not.
    let _dripper = TcpServer::start(&lab.server, to, |mut stream, _| {
        for _ in 0..6 {
            if stream.write_all(b".").is_err() {
                return;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        std::thread::sleep(Duration::from_secs(5));
    })?;
    let proxy = start_proxy(lab, SHORT)?;
    let before = proxy.daemon.open_sockets()?;
    let mut connections = connect_all(lab, family, 20)?;
    for stream in &connections[..10] {
        stream.shutdown(Shutdown::Write)?;
    }
    let used = proxy.daemon.cpu_time()?;
    for second in 1..=6 {
        for (number, stream) in connections.iter_mut().enumerate() {
            let mut byte = [0];
            stream
                .read_exact(&mut byte)
                .with_context(|| format!("connection {number} in second {second}: cut while it dripped"))?;
        }
        if second == 3 {
            expect_service(lab, family).context("while others drip")?;
        }
    }
    let used = proxy.daemon.cpu_time()?.saturating_sub(used);
    ensure!(used < Duration::from_millis(500), "20 drips a second cost {used:?} of processor time in 5 s");
    expect_reaped(&proxy, before)?;
    let reaped = (proxy.counter("tcp_idle_timeouts")?, proxy.counter("tcp_half_close_timeouts")?);
    ensure!(reaped == (10, 10), "counted as idle and as half closed: {reaped:?}, expected ten each");
    Ok(())
}

//! How TCP connections end, or fail to begin (T4, T5, T13).

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer};
use xtask::lab::{Family, Lab, server, url};

use crate::capture::Capture;
use crate::common::{Scenarios, at, start, start_proxy};
use crate::packet::{self, Segment};

pub(crate) const SCENARIOS: Scenarios = &[
    ("T4_client_closes_its_half", client_half_close),
    ("T4_server_closes_its_half", server_half_close),
    ("T4_reset_by_the_server", server_reset),
    ("T4_reset_by_the_client", client_reset),
    ("T4_bytes_before_a_close_arrive", bytes_before_close),
    ("T5_refused_destination", refused),
    ("T5_unreachable_destination", unreachable),
    ("T5_silent_destination", silent),
    ("T13_late_packets_stay_here", late_packets),
    ("T13_nothing_leaks_under_load", no_leak_under_load),
    ("clsact_T4_client_closes_its_half", |lab, family| {
        half_close(lab, family, "--iface lan --attach clsact")
    }),
    ("clsact_T13_late_packets_stay_here", |lab, family| late(lab, family, "--iface lan --attach clsact")),
];

const PORT: u16 = 9100;
const LARGE: usize = 4 << 20;

fn client_half_close(lab: &Lab, family: Family) -> Result<()> {
    half_close(lab, family, "--iface lan")
}

/// `nc -N` sends all, closes its half, and must still get the answer, which the
/// server can only give after the end of the input.
pub(crate) fn half_close(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _counter = server::socat_tcp(lab, &lab.server, family, PORT, "wc -c")?;
    let running = start(lab, flags)?;
    let input = peer::pattern(300_000);
    let nc = lab.client.cmd("nc").args([
        "-N",
        "-w",
        "10",
        family.flag(),
        &family.anywhere(1).to_string(),
        &PORT.to_string(),
    ]);
    let output = nc.stdin(input.clone()).check()?;
    ensure!(
        output.stdout.trim() == input.len().to_string(),
        "the server counted {:?} of {} bytes",
        output.stdout.trim(),
        input.len()
    );
    running.expect_tcp(1)
}

/// What a server's handler found, as soon as it is known.
fn reporting<T: Send + 'static>(
    lab: &Lab,
    family: Family,
    serve: impl Fn(std::net::TcpStream) -> T + Clone + Send + 'static,
) -> Result<(TcpServer, Receiver<T>)> {
    let (tell, told) = mpsc::channel();
    let server = TcpServer::start(&lab.server, at(family.unspecified(), PORT), move |stream, _| {
        // Nobody listens any more where the scenario has failed already.
        let _ = tell.send(serve(stream));
    })?;
    Ok((server, told))
}

fn connect(lab: &Lab, family: Family) -> Result<std::net::TcpStream> {
    peer::connect(&lab.client, None, at(family.anywhere(1), PORT), Duration::from_secs(5))
}

fn server_half_close(lab: &Lab, family: Family) -> Result<()> {
    let (_server, told) = reporting(lab, family, |mut stream| -> io::Result<Vec<u8>> {
        stream.write_all(b"that is all from here\n")?;
        stream.shutdown(Shutdown::Write)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok(bytes)
    })?;
    let running = start(lab, "--iface lan")?;
    let mut stream = connect(lab, family)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("the server's end did not arrive")?;
    ensure!(text == "that is all from here\n", "the server's words arrived as {text:?}");
    let sent = peer::pattern(300_000);
    stream.write_all(&sent).context("the client could not send after the server had closed its half")?;
    drop(stream);
    let received = told.recv_timeout(patience(peer::PATIENCE)).context("the server never saw the end")??;
    ensure!(
        received == sent,
        "the server received {} bytes that differ from the {} sent",
        received.len(),
        sent.len()
    );
    running.expect_tcp(1)
}

fn server_reset(lab: &Lab, family: Family) -> Result<()> {
    reset_by_server(lab, family, "--iface lan")
}

pub(crate) fn reset_by_server(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let (_server, _told) = reporting(lab, family, |mut stream| {
        let heard = peer::read_line(&mut stream).is_ok();
        heard && peer::reset(stream).is_ok()
    })?;
    let running = start(lab, flags)?;
    let mut stream = connect(lab, family)?;
    stream.write_all(b"reset, please\n")?;
    match peer::read(&mut stream, &mut [0; 16]) {
        Err(error) if peer::is_reset(&error) => {}
        other => bail!("the server reset the connection; the client saw {other:?}"),
    }
    running.expect_tcp(1)
}

fn client_reset(lab: &Lab, family: Family) -> Result<()> {
    reset_by_client(lab, family, "--iface lan")
}

pub(crate) fn reset_by_client(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let (_server, told) = reporting(lab, family, |mut stream| {
        let first = peer::read_line(&mut stream)?;
        stream.write_all(b"heard\n")?;
        peer::read(&mut stream, &mut [0; 16]).map(|bytes| format!("{bytes} bytes after {first:?}"))
    })?;
    let running = start(lab, flags)?;
    let mut stream = connect(lab, family)?;
    peer::ask(&mut stream, "hello")?;
    peer::reset(stream)?;
    match told
        .recv_timeout(patience(peer::PATIENCE))
        .context("the server never saw the end of the connection")?
    {
        Err(error) if peer::is_reset(&error) => {}
        other => bail!("the client reset the connection; the server saw {other:?}"),
    }
    running.expect_tcp(1)
}

/// The sender closes at once while most of what it sent is still under way,
/// and the receiver is slow.
fn bytes_before_close(lab: &Lab, family: Family) -> Result<()> {
    const ROUNDS: usize = 5;
    let (_server, told) = reporting(lab, family, |mut stream| -> io::Result<Vec<u8>> {
        if peer::read_line(&mut stream)? == "send" {
            stream.write_all(&peer::pattern(LARGE))?;
            return Ok(Vec::new());
        }
        std::thread::sleep(Duration::from_millis(50));
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        Ok(bytes)
    })?;
    let running = start(lab, "--iface lan")?;
    let expected = peer::pattern(LARGE);
    for round in 1..=ROUNDS {
        let mut stream = connect(lab, family)?;
        stream.write_all(b"send\n")?;
        std::thread::sleep(Duration::from_millis(50));
        let mut bytes = Vec::new();
        stream
            .read_to_end(&mut bytes)
            .with_context(|| format!("round {round}, after {} of {LARGE} bytes", bytes.len()))?;
        ensure!(
            bytes == expected,
            "round {round}: {} of the server's {LARGE} bytes arrived, or they differ",
            bytes.len()
        );
        drop(stream);
        told.recv_timeout(patience(peer::PATIENCE)).context("the server did not end")??;

        let mut stream = connect(lab, family)?;
        stream.write_all(b"take\n")?;
        stream.write_all(&expected)?;
        drop(stream);
        let bytes = told.recv_timeout(patience(peer::PATIENCE)).context("the server never saw the end")??;
        ensure!(
            bytes == expected,
            "round {round}: {} of the client's {LARGE} bytes arrived, or they differ",
            bytes.len()
        );
    }
    running.expect_tcp(2 * ROUNDS as u64)
}

/// The client must be told within `allowed`: refused at once, or reset after
/// the proxy found out.
fn expect_told(lab: &Lab, to: SocketAddr, allowed: Duration) -> Result<()> {
    let started = Instant::now();
    let told = lab.client.enter(|| -> io::Result<usize> {
        let mut stream = peer::try_connect(None, to, allowed * 2)?;
        peer::read(&mut stream, &mut [0; 16])
    })?;
    let took = started.elapsed();
    match told {
        Err(error)
            if peer::is_reset(&error)
                || error.kind() == io::ErrorKind::HostUnreachable
                || error.kind() == io::ErrorKind::NetworkUnreachable => {}
        other => bail!(
            "a connection to {to}, which cannot be made, ended after {took:?} with {other:?}; expected a refusal or a reset"
        ),
    }
    let allowed = patience(allowed);
    ensure!(took < allowed, "the client was told after {took:?}, allowed {allowed:?}");
    Ok(())
}

fn refused(lab: &Lab, family: Family) -> Result<()> {
    let running = start(lab, "--iface lan")?;
    expect_told(lab, at(family.anywhere(1), 4), Duration::from_secs(1))?;
    let curl = lab
        .client
        .cmd("curl")
        .args(["--silent", "--show-error", "--max-time", &pace::seconds(5), &url(family.anywhere(1), 4, "/")])
        .run()?;
    // curl(1): 7 is a refused connection, 56 a reset one; 55 is sending that failed, for one reason or
    // another: the reset has come before, or already when curl asked who its peer is.
    let told_late = ["reset", "not connected"].iter().any(|reason| curl.stderr.contains(reason));
    ensure!(
        matches!(curl.code(), 7 | 56) || curl.code() == 55 && told_late,
        "expected a refused or a reset connection: {}",
        curl.describe()
    );
    running.expect_tcp(2)
}

fn unreachable(lab: &Lab, family: Family) -> Result<()> {
    lab.router.ip_batch(&format!("route add unreachable {}\n", family.anywhere_net(9)))?;
    let running = start(lab, "--iface lan")?;
    expect_told(lab, at(family.anywhere(0x0901), 80), Duration::from_secs(2))?;
    running.expect_tcp(1)
}

fn silent(lab: &Lab, family: Family) -> Result<()> {
    lab.server.ip_batch(&format!("route add blackhole {} table local\n", family.anywhere_net(9)))?;
    let proxy = start_proxy(lab, "--iface lan --connect-timeout 2s")?;
    let started = Instant::now();
    expect_told(lab, at(family.anywhere(0x0901), 80), Duration::from_secs(4))?;
    let took = started.elapsed();
    ensure!(
        took > Duration::from_millis(1500),
        "the proxy gave up after {took:?}; its connect time-out is 2 s"
    );
    ensure!(proxy.counter("steered_tcp_new")? > 0, "the connection went past the proxy");
    Ok(())
}

/// Ways for a connection to end, each of which leaves other sockets behind.
#[derive(Clone, Copy, Debug)]
enum End {
    ClientFirst,
    ServerFirst,
    Reset,
}

fn late_packets(lab: &Lab, family: Family) -> Result<()> {
    late(lab, family, "--iface lan")
}

pub(crate) fn late(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let (_server, told) = reporting(lab, family, |mut stream| -> io::Result<()> {
        while peer::read_line(&mut stream)? != "close" {
            stream.write_all(b"go on\n")?;
        }
        Ok(())
    })?;
    let proxy = start_proxy(lab, flags)?;
    let uplink = Capture::start(&lab.router, "wan")?;
    for (end, port) in [(End::ClientFirst, 43_001), (End::ServerFirst, 43_002), (End::Reset, 43_003)] {
        let (from, to) = (at(family.client(), port), at(family.anywhere(1), PORT));
        let mut stream = peer::connect(&lab.client, Some(from), to, Duration::from_secs(5))?;
        peer::ask(&mut stream, "hello")?;
        match end {
            End::ClientFirst => drop(stream),
            End::ServerFirst => {
                stream.write_all(b"close\n")?;
                stream.read_to_end(&mut Vec::new())?;
                drop(stream);
            }
            End::Reset => peer::reset(stream)?,
        }
        // The server's handler ends with the connection, in error or not.
        let _ = told.recv_timeout(patience(peer::PATIENCE)).context("the server never saw the end")?;
        std::thread::sleep(Duration::from_millis(300));
        let before = uplink.count(6, from, to);
        let segments = [
            Segment { sequence: 1_000_000, acknowledgment: Some(2_000_000), ..Segment::default() },
            Segment {
                sequence: 1_000_000,
                acknowledgment: Some(2_000_000),
                data: b"hello\n",
                ..Segment::default()
            },
            Segment { sequence: 1_000_006, acknowledgment: Some(2_000_000), fin: true, ..Segment::default() },
        ];
        let packets =
            segments.iter().map(|segment| packet::tcp(from, to, segment)).collect::<Result<Vec<_>>>()?;
        for _ in 0..3 {
            packet::send(&lab.client, to.ip(), &packets)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(200));
        let leaked = uplink.count(6, from, to).packets - before.packets;
        ensure!(
            leaked == 0,
            "{leaked} of 9 late packets leaked past the proxy to the server; the connection had ended by {end:?}"
        );
    }
    ensure!(proxy.counter("steered_tcp_new")? >= 3, "the connections went past the proxy");
    Ok(())
}

/// Under churn: nothing leaves by the uplink with the client's own address and port.
fn no_leak_under_load(lab: &Lab, family: Family) -> Result<()> {
    let count = pace::share(9000);
    let _server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let uplink = Capture::start(&lab.router, "wan")?;
    for reset in [false, true] {
        let load = Load {
            targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
            concurrency: 64,
            connections: count / 2,
            duration: Duration::from_secs(30),
            reset,
        };
        load.run(&lab.client, &AtomicBool::new(false))?.expect_all(count / 2)?;
    }
    std::thread::sleep(Duration::from_millis(500));
    uplink.expect_complete()?;
    ensure!(proxy.counter("steered_tcp_new")? >= count / 2 * 2, "the connections went past the proxy");
    // The client's own ports and those that the router chooses do not overlap.
    let leaked: Vec<_> = uplink
        .directions()
        .into_iter()
        .filter(|(protocol, from, _)| *protocol == 6 && from.ip() == family.client() && from.port() < 20_000)
        .map(|(_, from, to)| format!("{from} → {to}"))
        .collect();
    ensure!(
        leaked.is_empty(),
        "packets of {} connections out of {count} leaked to the server: {leaked:?}",
        leaked.len()
    );
    Ok(())
}

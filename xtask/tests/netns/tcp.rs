//! TCP: whose address is seen, who speaks first, ports in quick reuse (T1, T3, T6, T7).

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer};
use xtask::lab::{Family, Lab, server, sockets, url};

use crate::capture::Capture;
use crate::common::{Scenarios, at, start, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("T1_tcp_source_client", source_client),
    ("T1_tcp_source_client_port", source_client_port),
    ("T1_tcp_source_proxy", source_proxy),
    ("T1_tcp_bulk_transfer_both_ways", bulk),
    ("T3_server_speaks_first", server_speaks_first),
    ("T6_60000_connections_from_one_address", many_connections),
    ("T6_one_port_serves_two_destinations", shared_ports),
    ("T7_client_port_reused_at_once", port_reuse),
    ("one_client_port_six_connections", six_connections),
    ("clsact_T1_tcp_source_client", |lab, family| seen(lab, family, "--attach clsact", family.client())),
    ("clsact_T7_client_port_reused_at_once", |lab, family| reuse(lab, family, "--iface lan --attach clsact")),
];

/// What nginx on the server says that it sees.
struct Seen {
    client: IpAddr,
    client_port: u16,
    server: SocketAddr,
}

fn curl(lab: &Lab, family: Family, to: SocketAddr, more: &[&str]) -> Result<Seen> {
    let output = lab
        .client
        .cmd("curl")
        .args(["--silent", "--show-error", "--max-time", &pace::seconds(5), family.flag()])
        .args(more)
        .arg(url(to.ip(), to.port(), "/"))
        .check()?;
    let words: Vec<&str> = output.stdout.split_whitespace().collect();
    let [client, client_port, address, port] = words[..] else {
        anyhow::bail!("not what nginx was told to say: {}", output.describe())
    };
    Ok(Seen {
        client: client.parse()?,
        client_port: client_port.parse()?,
        server: at(address.parse()?, port.parse()?),
    })
}

fn source_client(lab: &Lab, family: Family) -> Result<()> {
    seen(lab, family, "", family.client())
}

fn source_proxy(lab: &Lab, family: Family) -> Result<()> {
    crate::common::needs_proxy()?;
    seen(lab, family, "--source proxy", family.uplink())
}

pub(crate) fn seen(lab: &Lab, family: Family, flags: &str, expected: IpAddr) -> Result<()> {
    let _nginx = server::web(lab, &lab.server, &[80, 8443, 65_535])?;
    let running = start(lab, &format!("--iface lan {flags}"))?;
    let targets = [(family.anywhere(1), 80), (family.anywhere(0xfe03), 8443), (family.server(), 65_535)];
    for (address, port) in targets {
        let to = at(address, port);
        let seen = curl(lab, family, to, &[])?;
        ensure!(
            seen.client == expected,
            "the server sees {}, expected {expected}, on the way to {to}",
            seen.client
        );
        ensure!(seen.server == to, "the client asked for {to} and reached {}", seen.server);
    }
    running.expect_tcp(3)
}

fn source_client_port(lab: &Lab, family: Family) -> Result<()> {
    let _nginx = server::web(lab, &lab.server, &[80])?;
    let running = start(lab, "--iface lan --source client-port")?;
    for (port, n) in [(40_123, 1), (40_124, 2), (1025, 1)] {
        let seen = curl(lab, family, at(family.anywhere(n), 80), &["--local-port", &port.to_string()])?;
        ensure!(
            seen.client == family.client(),
            "the server sees {}, expected {}",
            seen.client,
            family.client()
        );
        ensure!(
            seen.client_port == port,
            "the server sees port {}, expected the client's own {port}",
            seen.client_port
        );
    }
    running.expect_tcp(3)
}

/// 32 MiB down and up (less on a slow machine), compared byte by byte.
fn bulk(lab: &Lab, family: Family) -> Result<()> {
    let content = peer::pattern(usize::try_from(pace::share(32 << 20))?);
    let _nginx = server::web(lab, &lab.server, &[80])?;
    std::fs::write(lab.dir().join("www/file"), &content)?;
    let (tell, told) = std::sync::mpsc::channel();
    let _upload = TcpServer::start(&lab.server, at(family.unspecified(), 81), move |mut stream, _| {
        let mut bytes = Vec::new();
        // Nobody listens any more where the scenario has failed already.
        let _ = tell.send(stream.read_to_end(&mut bytes).map(|_| bytes));
    })?;
    let running = start(lab, "--iface lan")?;
    let copy = lab.dir().join("copy");
    let download = lab
        .client
        .cmd("curl")
        .args(["--silent", "--show-error", "--max-time", &pace::seconds(15), "--output"])
        .arg(&copy);
    download.arg(url(family.anywhere(3), 80, "/files/file")).check()?;
    ensure!(std::fs::read(&copy)? == content, "the downloaded file differs from the server's");
    let upload = lab.client.cmd("nc").args(["-N", family.flag(), &family.anywhere(3).to_string(), "81"]);
    upload.stdin(content.clone()).check()?;
    let received = told.recv_timeout(patience(peer::PATIENCE)).context("the server got no upload")??;
    ensure!(
        received == content,
        "the server received {} bytes that differ from the {} sent",
        received.len(),
        content.len()
    );
    running.expect_tcp(2)
}

fn server_speaks_first(lab: &Lab, family: Family) -> Result<()> {
    let _banner = server::socat_tcp(lab, &lab.server, family, 2222, "echo SSH-2.0-test; cat")?;
    let running = start(lab, "--iface lan")?;
    let started = Instant::now();
    let mut stream = peer::connect(&lab.client, None, at(family.anywhere(22), 2222), Duration::from_secs(5))?;
    let banner = peer::read_line(&mut stream).context("no banner")?;
    let took = started.elapsed();
    ensure!(banner == "SSH-2.0-test", "the banner was {banner:?}");
    ensure!(took < patience(Duration::from_secs(1)), "the banner took {took:?}");
    let (echo, _) = peer::ask(&mut stream, "SSH-2.0-client")?;
    ensure!(echo == "SSH-2.0-client", "after the banner the server's echo was {echo:?}");
    running.expect_tcp(1)
}

/// Ports of closed connections stay taken for a minute, so all 60,000 need one.
fn many_connections(lab: &Lab, family: Family) -> Result<()> {
    connections(lab, family, (1024, 64_512), 60_000)
}

/// More connections than there are ephemeral ports on the proxy's host: one port
/// must serve both destinations at once, as it does without a proxy.
fn shared_ports(lab: &Lab, family: Family) -> Result<()> {
    connections(lab, family, (40_000, 2_000), 3_800)
}

/// `ports`: the first of the proxy host's ephemeral ports, and how many there
/// are. On a slow machine there are fewer, and as many connections fewer.
fn connections(lab: &Lab, family: Family, ports: (u64, u64), count: u64) -> Result<()> {
    const PORT: u16 = 9000;
    let (ports_of_router, count) =
        (format!("{} {}", ports.0, ports.0 + pace::share(ports.1) - 1), pace::share(count));
    let load_server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    lab.client.set_sysctls(&[("net/ipv4/ip_local_port_range", "1024 65535")])?;
    lab.router.set_sysctls(&[("net/ipv4/ip_local_port_range", &ports_of_router)])?;
    let running = start(lab, "--iface lan")?;
    let load = Load {
        targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
        concurrency: 64,
        connections: count,
        duration: Duration::from_secs(150),
        reset: false,
    };
    load.run(&lab.client, &AtomicBool::new(false))?.expect_all(count)?;
    let strangers = load_server.foreign();
    ensure!(strangers == 0, "{strangers} connections did not come from the client's address");
    running.expect_tcp(count)
}

const REUSED: u16 = 41_000;

/// A server that closes first, so that `TIME_WAIT` stays on its side: with a
/// proxy in between, on the proxy's.
pub(crate) fn closes_first(lab: &Lab, family: Family) -> Result<TcpServer> {
    TcpServer::start(&lab.server, at(family.unspecified(), 9001), |mut stream, _| {
        if peer::read_line(&mut stream).is_ok() {
            // A failure shows at the client.
            let _ = stream.write_all(b"bye\n");
        }
    })
}

/// Connects from one port, over and over: how long each took, from connect to close.
pub(crate) fn rounds(lab: &Lab, family: Family, rounds: usize) -> Result<Vec<Duration>> {
    let (from, to) = (at(family.client(), REUSED), at(family.anywhere(1), 9001));
    lab.client.enter(|| {
        let mut times = Vec::new();
        for number in 1..=rounds {
            let (mut stream, started) = reconnect(from, to)
                .with_context(|| format!("connection {number} of {rounds} from port {REUSED}"))?;
            let mut reply = String::new();
            stream.write_all(b"hello\n")?;
            stream.read_to_string(&mut reply).with_context(|| format!("connection {number}: no reply"))?;
            ensure!(reply == "bye\n", "connection {number}: the reply was {reply:?}");
            drop(stream);
            times.push(started.elapsed());
            if pace::slowdown() > 1 {
                until_time_wait(lab)?;
            }
        }
        Ok(times)
    })?
}

/// Waits until the client's port has met its `TIME_WAIT`. A kernel that preempts itself may run
/// the client between the last ACK and that, and drop its SYN, with the proxy and without; on a
/// real machine that moment is too short to be met.
fn until_time_wait(lab: &Lab) -> Result<()> {
    wait_for("TIME_WAIT", Duration::from_secs(2), || {
        Ok(sockets::all_in_time_wait(&lab.router, REUSED)? && sockets::all_in_time_wait(&lab.server, REUSED)?)
    })
}

/// The client's own socket may need a moment to be gone; that is not the proxy's doing.
fn reconnect(from: SocketAddr, to: SocketAddr) -> io::Result<(TcpStream, Instant)> {
    let deadline = Instant::now() + patience(Duration::from_secs(2));
    loop {
        let started = Instant::now();
        match peer::try_connect(Some(from), to, Duration::from_secs(5)) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse)
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result.map(|stream| (stream, started)),
        }
    }
}

fn port_reuse(lab: &Lab, family: Family) -> Result<()> {
    reuse(lab, family, "--iface lan")
}

pub(crate) fn reuse(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    const ROUNDS: usize = 30;
    let _server = closes_first(lab, family)?;
    let running = start(lab, flags)?;
    let capture = Capture::start(&lab.client, "eth0")?;
    let times = rounds(lab, family, ROUNDS)?;
    running.expect_tcp(ROUNDS as u64)?;
    let (from, to) = (at(family.client(), REUSED), at(family.anywhere(1), 9001));
    let (up, down) = (capture.count(6, from, to), capture.count(6, to, from));
    ensure!(
        up.syn == ROUNDS as u64 && up.rst + down.rst == 0,
        "{ROUNDS} connections from port {REUSED} took {} SYNs (expected {ROUNDS}), {} resets from the client and {} from the server's side \
         (expected none), times {times:?}",
        up.syn,
        up.rst,
        down.rst
    );
    Ok(())
}

fn six_connections(lab: &Lab, family: Family) -> Result<()> {
    let _server = closes_first(lab, family)?;
    let without = rounds(lab, family, 6)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let with = rounds(lab, family, 6)?;
    ensure!(proxy.counter("steered_tcp_new")? >= 6, "the connections went past the proxy");
    // A lost or refused SYN costs at least the retransmission time of 1 s, or
    // 200 ms where the other side resets; scheduling noise costs less.
    let allowed = without.iter().max().copied().unwrap_or_default()
        + patience(Duration::from_millis(100)).min(Duration::from_millis(800));
    ensure!(
        with.iter().all(|time| *time < allowed),
        "connections in a row from one port: {with:?} with the proxy, {without:?} without"
    );
    Ok(())
}

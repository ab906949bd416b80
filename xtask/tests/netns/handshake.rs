//! `--handshake faithful`: the client's handshake ends as the server's does (T5).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer};
use xtask::lab::proxy::{Launch, binary};
use xtask::lab::{Family, Lab, server};

use crate::bad_input::expect_refusal;
use crate::capture::{Capture, Count};
use crate::common::{Scenarios, at, needs_proxy, start, start_proxy};
use crate::faults::{self, Fail};
use crate::links::{self, Form};
use crate::packet::{self, Segment};
use crate::{host, leftovers, tcp, tcp_end};

const FAITHFUL: &str = "--iface lan --handshake faithful";
const CLSACT: &str = "--iface lan --handshake faithful --attach clsact";
const OWN: &str = "--iface lan --own-traffic --handshake faithful";

pub(crate) const SCENARIOS: Scenarios = &[
    ("T5_faithful_refused", |lab, family| refused(lab, family, FAITHFUL)),
    ("T5_faithful_refused_source_proxy", |lab, family| {
        refused(lab, family, "--iface lan --handshake faithful --source proxy")
    }),
    ("T5_faithful_prohibited", prohibited),
    ("T5_faithful_no_route", no_route),
    ("T5_faithful_unreachable_far_away", |lab, family| far_away(lab, family, FAITHFUL)),
    ("T5_faithful_unreachable_far_away_source_proxy", |lab, family| {
        far_away(lab, family, "--iface lan --handshake faithful --source proxy")
    }),
    ("T5_faithful_silent_destination", silent),
    ("T5_faithful_server_that_is_late", late_server),
    ("T5_faithful_server_speaks_first", server_speaks_first),
    ("T5_faithful_1000_connections", thousand),
    ("T5_faithful_source_client", |lab, family| {
        tcp::seen(lab, family, "--handshake faithful", family.client())
    }),
    ("T5_faithful_client_port_reused_at_once", |lab, family| tcp::reuse(lab, family, FAITHFUL)),
    ("T5_faithful_half_close", |lab, family| tcp_end::half_close(lab, family, FAITHFUL)),
    ("T5_faithful_reset_by_the_server", |lab, family| tcp_end::reset_by_server(lab, family, FAITHFUL)),
    ("T5_faithful_reset_by_the_client", |lab, family| tcp_end::reset_by_client(lab, family, FAITHFUL)),
    ("T5_faithful_late_packets_stay_here", |lab, family| tcp_end::late(lab, family, FAITHFUL)),
    ("T5_faithful_client_that_went_away", client_gone),
    ("T5_faithful_rp_filter_1_and_src_valid_mark_1", |lab, family| {
        host::with_sysctls(lab, family, FAITHFUL, &[("rp_filter", "1"), ("src_valid_mark", "1")])
    }),
    ("T5_faithful_own_traffic_with_src_valid_mark_1", |lab, family| {
        host::own_with_valid_mark(lab, family, OWN)
    }),
    ("T5_faithful_own_traffic_refused", own_refused),
    ("T5_faithful_clients_behind_a_bridge", |lab, family| {
        links::bridge(lab, family, "--iface br-lan --handshake faithful")
    }),
    ("T5_faithful_clients_behind_a_macvlan", |lab, family| {
        links::macvlan(lab, family, "--iface mac0 --handshake faithful")
    }),
    ("T5_faithful_clients_behind_a_tun_device", |lab, family| {
        links::tunnel(lab, family, Form::Subnet, "--iface tun0 --handshake faithful")
    }),
    ("T5_faithful_own_traffic_leaves_by_a_tun_device", |lab, family| {
        links::own(lab, family, "--own-traffic --handshake faithful")
    }),
    ("T5_faithful_kill_9_under_load_fail_open", |lab, family| {
        faults::killed(lab, family, FAITHFUL, Fail::Open)
    }),
    ("T5_faithful_kill_9_under_load_fail_closed", |lab, family| {
        faults::killed(lab, family, "--iface lan --handshake faithful --fail closed", Fail::Closed)
    }),
    ("T5_faithful_nothing_left_after_sigterm", |lab, family| {
        leftovers::graceful(lab, family, OWN, Signal::SIGTERM)
    }),
    ("T5_faithful_sigterm_under_load", |lab, family| {
        faults::terminated(lab, family, FAITHFUL, Signal::SIGTERM)
    }),
    ("T5_faithful_many_that_wait_for_nobody", crowd),
    ("T5_faithful_device_is_deleted", device_deleted),
    ("T5_faithful_without_tun_exit_4", no_tun),
    ("clsact_T5_faithful_refused", |lab, family| refused(lab, family, CLSACT)),
    ("clsact_T5_faithful_client_port_reused_at_once", |lab, family| tcp::reuse(lab, family, CLSACT)),
    ("clsact_T5_faithful_own_traffic_with_src_valid_mark_1", |lab, family| {
        host::own_with_valid_mark(
            lab,
            family,
            "--iface lan --own-traffic --handshake faithful --attach clsact",
        )
    }),
];

const PORT: u16 = 9400;

/// What the client itself sees on its link.
struct Watched {
    capture: Capture,
    from: SocketAddr,
    to: SocketAddr,
}

impl Watched {
    fn new(lab: &Lab, family: Family, to: SocketAddr) -> Result<Self> {
        let from = at(family.client(), 19_999);
        Ok(Self { capture: Capture::start(&lab.client, "eth0")?, from, to })
    }

    /// Connects; how that ended and how long it took.
    fn connect(&self, lab: &Lab, patience: Duration) -> Result<(io::Result<std::net::TcpStream>, Duration)> {
        lab.client.enter(|| {
            let started = Instant::now();
            let result = peer::try_connect(Some(self.from), self.to, patience);
            (result, started.elapsed())
        })
    }

    fn answers(&self) -> Count {
        // What is under way may still come.
        std::thread::sleep(Duration::from_millis(100));
        self.capture.count(6, self.to, self.from)
    }
}

fn refused(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let running = start(lab, flags)?;
    let watched = Watched::new(lab, family, at(family.anywhere(1), 4))?;
    for round in 1..=3 {
        let (result, took) = watched.connect(lab, Duration::from_secs(5))?;
        match result {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            other => bail!("the server refuses; the client's connect ended with {other:?}"),
        }
        ensure!(took < patience(Duration::from_millis(500)), "the refusal took {took:?}");
        let answers = watched.answers();
        ensure!(
            answers.packets == round && answers.rst == round && answers.syn == 0,
            "{round} connects that are refused got {answers:?}; expected a reset each and nothing else"
        );
    }
    running.expect("syn_set_aside", 3)?;
    running.expect("handshake_reset", 3)
}

/// Both routes are such that Linux sends one ICMP error, whoever asks.
fn prohibited(lab: &Lab, family: Family) -> Result<()> {
    // EHOSTUNREACH for "communication administratively prohibited" (icmp_err_convert), EACCES for its
    // counterpart (tab_unreach).
    unreachable(lab, family, "prohibit", family.pick(libc::EHOSTUNREACH, libc::EACCES))
}

fn no_route(lab: &Lab, family: Family) -> Result<()> {
    unreachable(lab, family, "throw", libc::ENETUNREACH)
}

fn unreachable(lab: &Lab, family: Family, route: &str, errno: i32) -> Result<()> {
    lab.router.ip_batch(&format!("route add {route} {}\n", family.anywhere_net(9)))?;
    expect_error(lab, family, FAITHFUL, errno)
}

/// A router further on says so.
fn far_away(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    lab.server.set_sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
    lab.server.ip_batch(&format!("route add unreachable {} table local\n", family.anywhere_net(9)))?;
    // For such a route Linux sends "no route" in ICMPv6 (ip6_pkt_discard).
    expect_error(lab, family, flags, family.pick(libc::EHOSTUNREACH, libc::ENETUNREACH))
}

fn expect_error(lab: &Lab, family: Family, flags: &str, errno: i32) -> Result<()> {
    let running = start(lab, flags)?;
    let watched = Watched::new(lab, family, at(family.anywhere(0x0901), 80))?;
    let (result, took) = watched.connect(lab, Duration::from_secs(5))?;
    let error = result.err().context("connected to where no route leads")?;
    ensure!(
        error.raw_os_error() == Some(errno),
        "where no route leads the client's connect ended with {error:?}, expected errno {errno}"
    );
    // Over veth an ICMP error may be there before `connect` has let go of its socket, and is then
    // kept for later (`sock_owned_by_user` in tcp_v6_err): the next SYN brings it again.
    ensure!(took < patience(Duration::from_secs(2)), "the error took {took:?}");
    let answers = watched.answers();
    ensure!(answers.packets == 0, "the client got TCP segments, too: {answers:?}");
    running.expect("handshake_unreachable", 1)
}

fn silent(lab: &Lab, family: Family) -> Result<()> {
    lab.server.ip_batch(&format!("route add blackhole {} table local\n", family.anywhere_net(9)))?;
    // Longer than the client waits, and shorter: neither gives it an answer.
    for timeout in ["10s", "1s"] {
        let running = start(lab, &format!("{FAITHFUL} --connect-timeout {timeout}"))?;
        let watched = Watched::new(lab, family, at(family.anywhere(0x0901), 80))?;
        let (result, took) = watched.connect(lab, Duration::from_secs(4))?;
        match result {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            other => bail!("nobody answers; the client's connect ended with {other:?} after {took:?}"),
        }
        let answers = watched.answers();
        ensure!(answers.packets == 0, "nobody answers; the client got {answers:?}");
        running.expect("syn_set_aside", 1)?;
        running.terminate()?;
    }
    Ok(())
}

/// The server answers the SYN that its client repeats after three seconds.
fn late_server(lab: &Lab, family: Family) -> Result<()> {
    let net = family.anywhere_net(9);
    lab.server.ip_batch(&format!("route add blackhole {net} table local\n"))?;
    let _echo = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let running = start(lab, FAITHFUL)?;
    let watched = Watched::new(lab, family, at(family.anywhere(0x0901), PORT))?;
    let (result, took) = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            lab.server.ip_batch(&format!("route del blackhole {net} table local\n"))
        });
        watched.connect(lab, Duration::from_secs(8))
    })?;
    let mut stream = result.context("the server was late, but there")?;
    ensure!(
        took > Duration::from_millis(1500),
        "the client was connected after {took:?}, before the server could answer"
    );
    ensure!(took < patience(Duration::from_millis(3900)), "the client was connected only after {took:?}");
    stream.set_read_timeout(Some(peer::PATIENCE))?;
    let (echo, _) = peer::ask(&mut stream, "better late")?;
    ensure!(echo == "better late", "the echo was {echo:?}");
    let answers = watched.answers();
    ensure!(answers.syn == 1 && answers.rst == 0, "one SYN-ACK is expected, the client got {answers:?}");
    running.expect_tcp(1)
}

fn server_speaks_first(lab: &Lab, family: Family) -> Result<()> {
    let _banner = server::socat_tcp(lab, &lab.server, family, 2222, "echo SSH-2.0-test; cat")?;
    let running = start(lab, FAITHFUL)?;
    for _ in 0..20 {
        let mut stream =
            peer::connect(&lab.client, None, at(family.anywhere(22), 2222), Duration::from_secs(5))?;
        let banner = peer::read_line(&mut stream).context("no banner")?;
        ensure!(banner == "SSH-2.0-test", "the banner was {banner:?}");
        let (echo, _) = peer::ask(&mut stream, "SSH-2.0-client")?;
        ensure!(echo == "SSH-2.0-client", "after the banner the server's echo was {echo:?}");
    }
    running.expect_tcp(20)
}

fn thousand(lab: &Lab, family: Family) -> Result<()> {
    const CONNECTIONS: u64 = 1000;
    let server = LoadServer::start(&lab.server, at(family.unspecified(), PORT), family.client())?;
    // Clients of a slow machine repeat what they have no time to look at, and are not to be too late.
    let running = start(lab, &format!("{FAITHFUL} --connect-timeout {}s", pace::seconds(10)))?;
    let load = Load {
        targets: vec![at(family.anywhere(1), PORT), at(family.anywhere(2), PORT)],
        concurrency: 128,
        connections: CONNECTIONS,
        duration: Duration::from_secs(30),
        reset: false,
    };
    load.run(&lab.client, &AtomicBool::new(false))?.expect_all(CONNECTIONS)?;
    ensure!(server.foreign() == 0, "{} connections did not come from the client's address", server.foreign());
    running.expect("syn_admitted", CONNECTIONS)?;
    running.expect_tcp(CONNECTIONS)?;
    if let Some(proxy) = running.proxy() {
        let (late, lost) = (proxy.counter("handshake_late")?, proxy.counter("syn_not_admitted")?);
        ensure!(late == 0 && lost == 0, "{late} connections had to connect twice, {lost} SYNs were lost");
    }
    Ok(())
}

/// A client that is gone when its server answers: the server is not left with
/// half a connection.
fn client_gone(lab: &Lab, family: Family) -> Result<()> {
    let (tell, told) = mpsc::channel();
    let _server = TcpServer::start(&lab.server, at(family.unspecified(), PORT), move |mut stream, _| {
        // Nobody listens any more where the scenario has failed already.
        let _ = tell.send(peer::read(&mut stream, &mut [0; 16]));
    })?;
    let proxy = start_proxy(lab, &format!("{FAITHFUL} --connect-timeout 2s"))?;
    // Of a hand-made SYN the client's kernel knows nothing, and resets what answers it.
    let to = at(family.anywhere(1), PORT);
    let syn = Segment { sequence: 7_000, syn: true, ..Segment::default() };
    packet::send(&lab.client, to.ip(), &[packet::tcp(at(family.client(), 19_998), to, &syn)?])?;
    match told.recv_timeout(peer::PATIENCE).context("the server was not connected to, or not let go")? {
        Err(error) if peer::is_reset(&error) => {}
        other => bail!("the client was gone; the server saw {other:?}, expected a reset"),
    }
    ensure!(proxy.counter("connect_abandoned")? == 1, "the client that went away is not counted");
    Ok(())
}

fn own_refused(lab: &Lab, family: Family) -> Result<()> {
    let running = start(lab, OWN)?;
    lab.router.ip_batch(&format!("route add prohibit {}\n", family.anywhere_net(9)))?;
    let (result, took) = lab.router.enter(|| {
        let started = Instant::now();
        let result = peer::try_connect(None, at(family.anywhere(1), 4), Duration::from_secs(5));
        (result, started.elapsed())
    })?;
    match result {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        other => bail!("the server refuses; the router's own connect ended with {other:?}"),
    }
    ensure!(took < patience(Duration::from_millis(500)), "the refusal took {took:?}");
    running.expect("handshake_reset", 1)
}

/// More clients wait for a server that is not there than one may have: the
/// others are not held up.
fn crowd(lab: &Lab, family: Family) -> Result<()> {
    lab.server.ip_batch(&format!("route add blackhole {} table local\n", family.anywhere_net(9)))?;
    let _echo = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let proxy = start_proxy(lab, &format!("{FAITHFUL} --iface lan2 --max-per-client 200"))?;
    let packets = (0..300_u16)
        .map(|n| {
            let syn = Segment { sequence: 7_000, syn: true, ..Segment::default() };
            packet::tcp(at(family.client(), 2000 + n), at(family.anywhere(0x0901), 80), &syn)
        })
        .collect::<Result<Vec<_>>>()?;
    packet::send(&lab.client, family.anywhere(0x0901), &packets)?;
    let guest: IpAddr = family.guest();
    let mut stream =
        peer::connect(&lab.guest, Some(at(guest, 0)), at(family.anywhere(1), PORT), Duration::from_secs(5))?;
    let (echo, _) = peer::ask(&mut stream, "another client")?;
    ensure!(echo == "another client", "the echo was {echo:?}");
    ensure!(proxy.counter("client_limit_tcp")? >= 100, "of 300 SYNs 200 may wait");
    ensure!(proxy.counter("tcp_active")? <= 201, "more than --max-per-client wait");
    let refused = peer::connect(&lab.client, None, at(family.anywhere(1), PORT), Duration::from_secs(5));
    ensure!(refused.is_err(), "a client that has its share was connected");
    Ok(())
}

/// Without its device nobody would be answered: the proxy ends, and says why.
fn device_deleted(lab: &Lab, family: Family) -> Result<()> {
    let _echo = TcpServer::echo(&lab.server, at(family.unspecified(), PORT))?;
    let mut proxy = start_proxy(lab, FAITHFUL)?;
    lab.router.ip_batch("link del tproxy0\n")?;
    let mut ended = None;
    wait_for("the proxy ended", Duration::from_secs(10), || {
        ended = proxy.daemon.ended()?;
        Ok(ended.is_some())
    })?;
    ensure!(ended.and_then(|status| status.code()) == Some(1), "the proxy ended with {ended:?}, expected 1");
    ensure!(
        proxy.daemon.log().contains("lost the tun device"),
        "it does not say why: {}",
        proxy.daemon.log()
    );
    let mut stream = peer::connect(&lab.client, None, at(family.anywhere(1), PORT), Duration::from_secs(5))?;
    let (echo, _) = peer::ask(&mut stream, "forwarded")?;
    ensure!(echo == "forwarded", "the echo was {echo:?}");
    Ok(())
}

fn no_tun(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let hide = "mount -t tmpfs none /dev/net && exec \"$0\" \"$@\"";
    let launch = lab.router.cmd("unshare").args(["--mount", "sh", "-c", hide]).arg(binary()?);
    let command = launch.args(FAITHFUL.split(' ')).arg("--pin").arg(lab.pin());
    expect_refusal(lab, &command, 4, &["/dev/net/tun", "modprobe tun"])?;
    let both = Launch::new(lab, "--steer none --handshake faithful").command()?;
    expect_refusal(lab, &both, 2, &["--handshake", "--steer none"])?;
    let old = Launch::new(lab, "--iface lan --handshake faithful --assume-kernel 5.7").command()?;
    expect_refusal(lab, &old, 4, &["--handshake faithful", "5.8"])
}

//! Reloads: what changes, what stays, and that nothing is lost on the way (F3, H9).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::daemon::wait_for;
use xtask::lab::load::{Load, LoadServer};
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::binary;
use xtask::lab::{Family, Lab, Output, Proxy};

use crate::bad_input::expect_refusal;
use crate::common::{Scenarios, at, needs_proxy};
use crate::matching::unused;
use crate::policy::{
    Client, ConfigFile,
    Fate::{self, Dropped, Passed, Proxied, Rejected},
    all_reflectors, nets, other_networks, replace, start_with_rules, target, tcp_fate, within,
};
use crate::snapshot::Snapshot;
use crate::tcp;

/// All are for both families at once.
pub(crate) const ONCE: Scenarios = &[
    ("F3_reload_under_load", under_load),
    ("F3_no_packet_by_a_mixture", mixture),
    ("F3_invalid_config_changes_nothing", invalid),
    ("F3_reload_that_fails_halfway_changes_nothing", fails_halfway),
    ("H9_flows_outlive_their_rule", outlive),
    ("H9_diverted_flows_keep_their_target", targets),
    ("H9_a_port_is_used_again_after_a_reload", port_used_again),
    ("reload_names_what_needs_a_restart", restart),
    ("reload_by_signal", by_signal),
    ("reload_finds_the_proxy_by_its_flags", by_flags),
    ("reload_by_watched_file", by_watched_file),
    ("reload_that_failed_is_tried_again", tried_again),
    ("reload_keeps_nobody_waiting", keeps_nobody_waiting),
    ("check_tells_what_differs_from_what_runs", differs),
    ("reload_adds_and_removes_interfaces", interfaces),
    ("reload_without_a_config_file_or_a_proxy", without),
    ("bad_config_exit_2", bad_config),
];

const RELOADS: u64 = 200;

fn reload(proxy: &Proxy) -> Result<Output> {
    proxy.cmd("reload")?.check()
}

/// A rule over some networks "anywhere".
fn rule(net: u8, action: &str) -> String {
    format!("[[rule]]\nto = {}\naction = '{action}'\n", nets(net))
}

/// Sets its flag when it is dropped, so that threads end also where a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const LOAD: u16 = 9500;
const ECHO: u16 = 9501;

/// New connections, transfers that go on, datagrams of old and of new flows: some go
/// through the proxy and some are passed, by both configurations alike.
fn under_load(lab: &Lab, _: Family) -> Result<()> {
    fs::write(lab.dir().join("a.txt"), other_networks(300))?;
    fs::write(lab.dir().join("b.txt"), other_networks(900))?;
    let passed = rule(1, "pass");
    let a = format!("{passed}{}[[rule]]\nto_file = 'a.txt'\naction = 'drop'\n", rule(8, "reject"));
    let b = format!("{}[[rule]]\nto_file = 'b.txt'\naction = 'reject'\n{passed}", rule(9, "drop"));
    // Rule 1 or 3 passes the first network, none is for the second.
    let networks = [1, 2];
    let servers = Family::ALL
        .map(|family| LoadServer::start(&lab.server, at(family.unspecified(), LOAD), family.client()));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let of_all = |port| {
        Family::ALL.into_iter().flat_map(move |family| networks.map(|net| at(within(family, net, 1), port)))
    };
    let _echo = of_all(ECHO)
        .map(|to| Ok((TcpServer::echo(&lab.server, to)?, UdpServer::echo(&lab.server, to)?)))
        .collect::<Result<Vec<_>>>()?;
    let (proxy, config) = start_with_rules(lab, "", &a)?;
    let load = Load {
        targets: of_all(LOAD).collect(),
        concurrency: 2,
        connections: u64::MAX,
        duration: Duration::from_mins(1),
        reset: false,
    };
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let transferred = AtomicU64::new(0);
    let exchanged = AtomicU64::new(0);
    let report = thread::scope(|scope| -> Result<_> {
        let ends = Stop(stop);
        let load = scope.spawn(|| load.run(&lab.client, stop));
        let mut others = Vec::new();
        for to in of_all(ECHO) {
            let (bytes, datagrams) = (&transferred, &exchanged);
            others.push(scope.spawn(move || {
                transfer(lab, to, stop, bytes).with_context(|| format!("a transfer by {to}"))
            }));
            others.push(scope.spawn(move || {
                exchanges(lab, to, stop, datagrams).with_context(|| format!("datagrams to {to}"))
            }));
        }
        for number in 1..=pace::share(RELOADS) {
            config.write(if number % 2 == 0 { &a } else { &b })?;
            reload(&proxy).with_context(|| format!("reload {number}"))?;
        }
        drop(ends);
        for other in others {
            other.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
    })?;
    report.expect_all(report.completed)?;
    let (bytes, datagrams) = (transferred.into_inner(), exchanged.into_inner());
    ensure!(
        report.completed > 200 && bytes > 1 << 20 && datagrams > 200,
        "little happened meanwhile: {} connections, {bytes} bytes, {datagrams} datagrams",
        report.completed
    );
    // More than a retransmission of a SYN would take.
    ensure!(
        report.slowest < pace::patience(Duration::from_millis(900)),
        "one connection took {:?}",
        report.slowest
    );
    for server in servers {
        ensure!(server.foreign() == 0, "{} connections did not come from the client", server.foreign());
    }
    let (steered, passed) = (proxy.counter("steered_tcp_new")?, proxy.counter("pass_policy")?);
    ensure!(
        steered >= report.completed / 3
            && steered <= report.completed * 2 / 3 + 16
            && passed > report.completed,
        "of {} connections half should be proxied: {steered} were; {passed} packets were passed",
        report.completed
    );
    ensure!(!proxy.daemon.log().contains("WARN"), "the proxy warns:\n{}", proxy.daemon.log());
    Ok(())
}

/// Sends pieces through one connection and back again, until it is told to stop.
fn transfer(lab: &Lab, to: SocketAddr, stop: &AtomicBool, bytes: &AtomicU64) -> Result<()> {
    let mut stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    let piece = peer::pattern(16 << 10);
    let mut back = vec![0; piece.len()];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&piece)?;
        stream.read_exact(&mut back)?;
        ensure!(back == piece, "the echo differs");
        bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Datagrams of one flow and each time of a new one, until it is told to stop.
fn exchanges(lab: &Lab, to: SocketAddr, stop: &AtomicBool, datagrams: &AtomicU64) -> Result<()> {
    let any = SocketAddr::new(if to.is_ipv4() { Family::V4 } else { Family::V6 }.client(), 0);
    let old = peer::udp(&lab.client, any)?;
    while !stop.load(Ordering::Relaxed) {
        for socket in [&old, &peer::udp(&lab.client, any)?] {
            let (_, from) = peer::exchange(socket, to, b"is anybody there?")?;
            ensure!(from == to, "{from} answered");
            datagrams.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// X and Y change places: a client is let through to one of them, never to the proxy.
fn mixture(lab: &Lab, _: Family) -> Result<()> {
    // Below is what a packet would get that no rule of a half-loaded set is for.
    let a = format!("{}{}{}", rule(1, "pass"), rule(2, "reject"), rule(9, "drop"));
    let b = format!("{}{}", rule(1, "reject"), rule(2, "pass"));
    let _servers = all_reflectors(lab, &[1, 2])?;
    let (proxy, config) = start_with_rules(lab, "", &a)?;
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let probes = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        let ends = Stop(stop);
        let probe = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for to in Family::ALL.into_iter().flat_map(|family| [target(family, 1), target(family, 2)]) {
                    let from = unused(if to.is_ipv4() { Family::V4 } else { Family::V6 }.client());
                    let (fate, took) = tcp_fate(&lab.client, from, to, Duration::from_secs(5))?;
                    ensure!(matches!(fate, Passed | Rejected), "{from} to {to} was {fate:?} after {took:?}");
                    probes.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        });
        for number in 1..=pace::share(RELOADS) {
            let fates = if number % 2 == 0 { [Passed, Rejected] } else { [Rejected, Passed] };
            config.write(if number % 2 == 0 { &a } else { &b })?;
            reload(&proxy).with_context(|| format!("reload {number}"))?;
            let family = if number % 4 < 2 { Family::V4 } else { Family::V6 };
            for (net, fate) in [1, 2].into_iter().zip(fates) {
                Client::of(lab, family)
                    .expect_tcp(target(family, net), fate)
                    .with_context(|| format!("after reload {number}"))?;
            }
        }
        drop(ends);
        probe.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    let probes = probes.into_inner();
    ensure!(probes > pace::share(RELOADS), "only {probes} probes meanwhile");
    let flows = proxy.flows()?;
    let odd: Vec<_> = flows.iter().filter(|flow| flow.action != "pass" && flow.action != "reject").collect();
    ensure!(odd.is_empty() && !flows.is_empty(), "flows by no rule: {odd:#?}");
    ensure!(proxy.counter("steered_tcp_new")? == 0, "connections were proxied");
    Ok(())
}

/// Configurations with an error, and what the message names.
const INVALID: [(&str, &[&str]); 9] = [
    ("[capture\n", &["tproxy.toml:1:"]),
    ("\n[[rule]]\naction = 'pas'\n", &["tproxy.toml:3:", "pass"]),
    ("[capture]\n\ninterfces = ['lan']\n", &["tproxy.toml:3:", "interfaces"]),
    ("[[rule]]\nto = ['198.18.0.0/33']\naction = 'pass'\n", &["tproxy.toml:2:", "198.18.0.0/33"]),
    ("[[rule]]\naction = 'divert'\n", &["tproxy.toml:1:", "target"]),
    ("[[rule]]\nto_file = 'wrong.txt'\naction = 'pass'\n", &["wrong.txt:3:", "10.0.0.0/33"]),
    ("[[rule]]\nto_file = 'empty.txt'\naction = 'pass'\n", &["empty.txt", "no network"]),
    ("[[rule]]\n\n\nto_file = 'missing.txt'\naction = 'pass'\n", &["tproxy.toml:4:", "missing.txt"]),
    ("[[rule]]\nuid = 'nobody-of-this-name'\naction = 'pass'\n", &["tproxy.toml:2:", "nobody-of-this-name"]),
];

fn write_wrong_files(lab: &Lab) -> Result<()> {
    fs::write(lab.dir().join("wrong.txt"), "# networks\n10.0.0.0/8\n10.0.0.0/33\n10.0.0.0/34\n")?;
    Ok(fs::write(lab.dir().join("empty.txt"), "# nothing\n\n")?)
}

fn invalid(lab: &Lab, _: Family) -> Result<()> {
    write_wrong_files(lab)?;
    let _servers = all_reflectors(lab, &[1, 2, 3])?;
    let capture = "[capture]\ninterfaces = 'lan'\n";
    let valid = format!("{capture}{}{}", rule(1, "pass"), rule(2, "reject"));
    needs_proxy()?;
    let config = ConfigFile::new(lab, &valid)?;
    let mut proxy = config.launch(lab, "").start()?;
    let before = Snapshot::take(lab)?;
    let fates = |families: &[Family]| -> Result<()> {
        for family in families {
            for (net, fate) in [(1, Passed), (2, Rejected), (3, Proxied)] {
                Client::of(lab, *family).expect(target(*family, net), fate)?;
            }
        }
        Ok(())
    };
    // What is refused only once the host is looked at, beside what the file itself tells.
    let nowhere = format!("[capture]\ninterfaces = ['lan', 'nosuch0']\n{}", rule(1, "drop"));
    let nothing = rule(1, "drop");
    let of_the_host: [(&str, &[&str]); 3] = [
        (&nowhere, &["nosuch0"]),
        (&nothing, &["--iface"]),
        ("[capture]\ninterfaces = 'lo'\n", &["lo", "--own-traffic"]),
    ];
    for (content, words) in INVALID.into_iter().chain(of_the_host) {
        config.write(content)?;
        let output = proxy.cmd("reload")?.run()?.expect_code(2)?;
        let lines = output.stderr.lines().count();
        ensure!(
            lines == 1 && words.iter().all(|word| output.stderr.contains(word)),
            "expected one line with {words:?}, {}",
            output.describe()
        );
    }
    fates(&Family::ALL)?;
    let logged = || Ok::<_, anyhow::Error>(proxy.daemon.log().matches("cannot reload").count());
    let told = logged()?;
    ensure!(told == INVALID.len() + of_the_host.len(), "the log tells of {told} of them");
    config.write(&rule(1, "drop"))?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_for("the log to tell of the reload by signal", Duration::from_secs(5), || {
        Ok(proxy.daemon.log().matches("cannot reload").count() > told)
    })?;
    fates(&Family::ALL)?;
    fs::remove_file(&config.0)?;
    let output = proxy.cmd("reload")?.run()?.expect_code(2)?;
    ensure!(output.stderr.contains("tproxy.toml"), "{}", output.describe());
    fates(&[Family::V4])?;
    Snapshot::take(lab)?.expect_same(&before)?;
    // And a valid one is taken.
    config.write(&format!("{capture}{}", rule(3, "reject")))?;
    reload(&proxy)?;
    Client::of(lab, Family::V4).expect(target(Family::V4, 3), Rejected)
}

/// That an interface cannot be captured shows late.
fn fails_halfway(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = all_reflectors(lab, &[1])?;
    // The qdisc keeps clsact out.
    lab.router.sh("ip link add spare0 type veth peer name spare1")?;
    lab.router.sh("tc qdisc add dev spare0 ingress")?;
    let capture = |interfaces| format!("[capture]\ninterfaces = {interfaces}\n");
    let config = ConfigFile::new(lab, &capture("['lan']"))?;
    let proxy = config.launch(lab, "--attach clsact").start()?;
    let before = Snapshot::take(lab)?;
    config.write(&(capture("['lan2', 'spare0']") + &rule(1, "reject")))?;
    // Who comes meanwhile is not rejected for a moment.
    let stop = AtomicBool::new(false);
    let stop = &stop;
    thread::scope(|scope| -> Result<()> {
        let ends = Stop(stop);
        let probe = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (from, to) = (unused(Family::V4.client()), target(Family::V4, 1));
                let (fate, _) = tcp_fate(&lab.client, from, to, Duration::from_secs(5))?;
                ensure!(fate == Proxied, "{from} to {to} was {fate:?}");
            }
            Ok(())
        });
        for _ in 0..pace::share(20) {
            let output = proxy.cmd("reload")?.run()?.expect_code(5)?;
            ensure!(output.stderr.contains("spare0"), "{}", output.describe());
        }
        drop(ends);
        probe.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    let expect_as_before = || -> Result<()> {
        for family in Family::ALL {
            Client::of(lab, family).expect(target(family, 1), Proxied)?;
            Client::guest(lab, family).expect(target(family, 1), Passed)?;
        }
        Ok(())
    };
    expect_as_before()?;
    Snapshot::take(lab)?.expect_same(&before)?;
    let status = proxy.status()?;
    ensure!(status["policy"]["rules"] == 0, "status tells of rules that do not hold: {}", status["policy"]);
    // Nor do they come to hold when the network changes.
    lab.router.sh("ip addr add 203.0.113.9/24 dev lan2")?;
    thread::sleep(Duration::from_millis(300));
    expect_as_before()?;
    lab.router.sh("tc qdisc del dev spare0 ingress")?;
    reload(&proxy)?;
    Client::guest(lab, Family::V4).expect(target(Family::V4, 1), Rejected)
}

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

fn outlive(lab: &Lab, _: Family) -> Result<()> {
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

fn targets(lab: &Lab, _: Family) -> Result<()> {
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
fn port_used_again(lab: &Lab, _: Family) -> Result<()> {
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

fn restart(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (proxy, config) = start_with_rules(lab, "--table 100", "")?;
    let changed = "[capture]\nown_traffic = true\n[steer]\non_port = 15002\ntable = 200\n[timeouts]\nudp = '9s'\n\
         [log]\nlevel = 'debug'\nformat = 'json'\n";
    config.write(&(changed.to_owned() + &rule(1, "reject")))?;
    let output = reload(&proxy)?;
    ensure!(
        output.stdout
            == "reloaded: 1 rules\nonly a restart changes: capture.own_traffic, steer.on_port, log.format, timeouts.udp\n",
        "the table is set by a flag, {}",
        output.describe()
    );
    for key in ["capture.own_traffic", "steer.on_port", "log.format", "timeouts.udp"] {
        ensure!(proxy.daemon.log().contains(key), "the log does not name {key}:\n{}", proxy.daemon.log());
    }
    // The level holds from now on.
    ensure!(!proxy.daemon.log().contains("DEBUG"), "{}", proxy.daemon.log());
    reload(&proxy)?;
    wait_for("the log to tell more", Duration::from_secs(5), || Ok(proxy.daemon.log().contains("DEBUG")))?;
    let json: serde_json::Value = serde_json::from_str(&proxy.cmd("reload --json")?.check()?.stdout)?;
    ensure!(json["rules"] == 1 && json["restart"][1] == "steer.on_port", "{json}");
    let status = proxy.status()?;
    ensure!(status["policy"]["rules"] == 1, "{}", status["policy"]);
    for family in Family::ALL {
        Client::of(lab, family).expect(target(family, 1), Rejected)?;
    }
    Ok(())
}

/// Waits until new connections of both families are rejected.
fn wait_rejected(lab: &Lab, net: u8, within: Duration) -> Result<()> {
    wait_for("the new rules to hold", within, || {
        let fates = Family::ALL.map(|family| {
            tcp_fate(&lab.client, unused(family.client()), target(family, net), Duration::from_secs(1))
        });
        let mut rejected = true;
        for fate in fates {
            rejected &= fate?.0 == Rejected;
        }
        Ok(rejected)
    })
}

fn by_signal(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (mut proxy, config) = start_with_rules(lab, "", "")?;
    config.write(&rule(1, "reject"))?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_rejected(lab, 1, Duration::from_secs(2))?;
    wait_for("the log to tell of it", Duration::from_secs(2), || {
        Ok(proxy.daemon.log().contains("reloaded: 1 rules"))
    })?;
    // Many at once are no more than the last.
    for _ in 0..20 {
        proxy.daemon.signal(Signal::SIGHUP)?;
    }
    config.write("")?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_for("the rules to go", Duration::from_secs(5), || Ok(proxy.status()?["policy"]["rules"] == 0))?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// Of which the config file says which proxy it is.
fn by_flags(lab: &Lab, _: Family) -> Result<()> {
    let (proxy, config) = start_with_rules(lab, "", "")?;
    let command = || Ok::<_, anyhow::Error>(lab.router.cmd(binary()?).args(["reload", "--iface", "lan"]));
    command()?.run()?.expect_code(3)?;
    config.write(&format!("steer.pin = '{}'\n{}", lab.pin().display(), rule(1, "reject")))?;
    command()?.arg("--config").arg(&config.0).check()?;
    ensure!(proxy.status()?["policy"]["rules"] == 1, "{}", proxy.status()?["policy"]);
    Ok(())
}

fn by_watched_file(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1, 2])?;
    let networks = lab.dir().join("networks.txt");
    let of_net = |n: u8| Family::ALL.map(|family| family.anywhere_net(n) + "\n").concat();
    fs::write(&networks, of_net(8))?;
    let rules = "watch = true\n[[rule]]\nto_file = 'networks.txt'\naction = 'reject'\n";
    let (proxy, config) = start_with_rules(lab, "", rules)?;
    for family in Family::ALL {
        Client::of(lab, family).expect_tcp(target(family, 1), Proxied)?;
    }
    // By a line that is appended.
    let mut file = fs::File::options().append(true).open(&networks)?;
    file.write_all(of_net(1).as_bytes())?;
    wait_rejected(lab, 1, Duration::from_secs(4))?;
    // A mistake changes nothing, and what mends it is noticed.
    replace(&networks, "10.0.0.0/33\n")?;
    wait_for("the mistake to be told", Duration::from_secs(4), || {
        Ok(proxy.daemon.log().contains("networks.txt:1: '10.0.0.0/33'"))
    })?;
    Client::of(lab, Family::V4).expect_tcp(target(Family::V4, 1), Rejected)?;
    replace(&networks, &of_net(2))?;
    wait_rejected(lab, 2, Duration::from_secs(4))?;
    Client::of(lab, Family::V4).expect_tcp(target(Family::V4, 1), Proxied)?;
    // The config file itself.
    config.write(&("watch = true\n".to_owned() + &rule(1, "reject")))?;
    wait_rejected(lab, 1, Duration::from_secs(4))
}

/// What was wrong is mended where nobody watches: in a file that only the new configuration names.
fn tried_again(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (proxy, config) = start_with_rules(lab, "--watch", "")?;
    let refused = || Ok::<_, anyhow::Error>(proxy.daemon.log().matches("cannot reload").count());
    config.write("[[rule]]\nto_file = 'later.txt'\naction = 'reject'\n")?;
    wait_for("the reload to fail", Duration::from_secs(4), || Ok(refused()? == 1))?;
    // It fails a second time, without a word.
    thread::sleep(Duration::from_millis(2500));
    ensure!(refused()? == 1, "it is told again and again:\n{}", proxy.daemon.log());
    let networks = Family::ALL.map(|family| family.anywhere_net(1)).join("\n");
    replace(&lab.dir().join("later.txt"), &networks)?;
    wait_rejected(lab, 1, Duration::from_secs(8))
}

/// A million networks take a while; who asks for `status` meanwhile is answered at once.
fn keeps_nobody_waiting(lab: &Lab, _: Family) -> Result<()> {
    let networks: Vec<_> = (0..1_000_000_u32)
        .map(|number| format!("{}/32\n", std::net::Ipv4Addr::from_bits(0x0b00_0000 + 2 * number)))
        .collect();
    fs::write(lab.dir().join("million.txt"), networks.concat())?;
    let (proxy, config) = start_with_rules(lab, "", "")?;
    config.write("[[rule]]\nto_file = 'million.txt'\naction = 'drop'\n")?;
    let (took, answers) = thread::scope(|scope| -> Result<_> {
        let started = Instant::now();
        let reload = scope.spawn(|| reload(&proxy));
        let mut answers = Vec::new();
        while !reload.is_finished() {
            let asked = Instant::now();
            proxy.status()?;
            answers.push(asked.elapsed());
        }
        reload.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        Ok((started.elapsed(), answers))
    })?;
    ensure!(proxy.status()?["policy"]["bytes"].as_u64() > Some(8_000_000), "the networks are not there");
    let slowest = answers.iter().max().copied().unwrap_or(took);
    ensure!(slowest < took / 3, "the reload took {took:?}, and one of {} answers {slowest:?}", answers.len());
    Ok(())
}

fn differs(lab: &Lab, _: Family) -> Result<()> {
    let networks = lab.dir().join("networks.txt");
    fs::write(&networks, "198.51.100.0/24\n")?;
    let rules = "[[rule]]\nto_file = 'networks.txt'\naction = 'pass'\n";
    let (proxy, config) = start_with_rules(lab, "", rules)?;
    let diff = || -> Result<Vec<String>> {
        let command = format!("check --config {} --iface lan --diff", config.0.display());
        let changed = |line: &&str| {
            line.starts_with(['+', '-']) && !line.starts_with("+++") && !line.starts_with("---")
        };
        let output = proxy.cmd(&command)?.check()?.stdout;
        Ok(output.lines().filter(changed).map(str::to_owned).collect())
    };
    ensure!(diff()?.is_empty(), "nothing has changed: {:#?}", diff()?);
    // As long as before.
    fs::write(&networks, "198.51.101.0/24\n")?;
    let lines = diff()?;
    ensure!(lines.len() == 2 && lines.iter().all(|line| line.contains("networks.txt")), "{lines:#?}");
    let keys = "[steer]\nown_mark = 16\nattach = 'clsact'\n[log]\nlevel = 'warn'\naccess = 'json'\n";
    config.write(&(keys.to_owned() + rules))?;
    let lines = diff()?;
    for expected in
        ["+  steer.own_mark: 0x10", "+  steer.attach: clsact", "+  log.level: warn", "+  log.access: json"]
    {
        ensure!(lines.iter().any(|line| line == expected), "no {expected}: {lines:#?}");
    }
    // A reload takes the networks and the level.
    reload(&proxy)?;
    let lines = diff()?;
    ensure!(
        lines.len() == 6 && !lines.iter().any(|line| line.contains("networks.txt") || line.contains("level")),
        "{lines:#?}"
    );
    Ok(())
}

fn interfaces(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = all_reflectors(lab, &[1])?;
    let capture = |interfaces| format!("[capture]\ninterfaces = {interfaces}\n");
    let config = ConfigFile::new(lab, &capture("'lan'"))?;
    let proxy = config.launch(lab, "").start()?;
    let expect = |of_client: Fate, of_guest: Fate| -> Result<()> {
        for family in Family::ALL {
            Client::of(lab, family).expect(target(family, 1), of_client)?;
            Client::guest(lab, family).expect(target(family, 1), of_guest)?;
        }
        Ok(())
    };
    let before = Snapshot::take(lab)?;
    for (interfaces, of_client, of_guest, names) in [
        ("['lan', 'lan2']", Proxied, Proxied, vec!["lan", "lan2"]),
        ("'lan2'", Passed, Proxied, vec!["lan2"]),
        ("'la?'", Proxied, Passed, vec!["lan"]),
    ] {
        config.write(&capture(interfaces))?;
        reload(&proxy)?;
        expect(of_client, of_guest).with_context(|| interfaces.to_owned())?;
        let status = proxy.status()?;
        let captured = status["interfaces"].as_array().into_iter().flatten();
        let captured: Vec<_> =
            captured.filter(|i| i["role"] == "capture").filter_map(|i| i["name"].as_str()).collect();
        ensure!(captured == names, "{interfaces}: status names {captured:?}");
    }
    Snapshot::take(lab)?.expect_same(&before)
}

fn without(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let launch = || xtask::lab::proxy::Launch::new(lab, "--iface lan");
    expect_refusal(
        lab,
        &xtask::lab::proxy::Launch::new(lab, "reload").command()?,
        3,
        &["no proxy is running"],
    )?;
    let proxy = launch().start()?;
    expect_refusal(lab, &proxy.cmd("reload")?, 2, &["no config file"])
}

fn bad_config(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    write_wrong_files(lab)?;
    let config = ConfigFile::new(lab, "")?;
    let command = || config.launch(lab, "--iface lan").command();
    for (content, words) in INVALID {
        config.write(content)?;
        expect_refusal(lab, &command()?, 2, words)?;
    }
    fs::write(&config.0, b"watch = true\n[capture]\nto = '\xff'\n")?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml:3:", "UTF-8"])?;
    fs::remove_file(&config.0)?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml", "No such file"])?;
    fs::create_dir(&config.0)?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml", "directory"])
}

//! Rules that ask for names: what becomes of flows by what their first bytes say.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use xtask::lab::command::Output;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::Proxy;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab, server};

use crate::common::{Scenarios, at};
use crate::matching::unused;
use crate::policy::{Client, Fate, reflectors_in, replace, start_with_rules, target, tcp_fate};

pub(crate) const SCENARIOS: Scenarios = &[
    ("names_of_https_and_http", |lab, family| by_name(lab, family, "")),
    ("names_with_faithful_handshakes", |lab, family| by_name(lab, family, "--handshake faithful")),
    ("names_of_own_traffic", own_traffic),
    ("names_in_parts", in_parts),
    ("names_of_servers_that_speak_first", server_first),
    ("names_of_quic", quic),
    ("names_learned_from_dns", |lab, family| learned(lab, family, false)),
    ("names_learned_from_diverted_dns", |lab, family| learned(lab, family, true)),
];

/// What [`by_name`] lays out, and a page's last words at either place.
const RULES: &str = "[[rule]]\ndomain = 'pass.example'\naction = 'pass'\n\
     [[rule]]\ndomain = '*.divert.example'\nto_port = 80\naction = 'divert'\ntarget = '127.0.0.1:8080'\n\
     [[rule]]\ndomain = '*.divert.example'\nto_port = 443\naction = 'divert'\ntarget = '127.0.0.1:8443'\n\
     [[rule]]\ndomain_file = 'refused.txt'\naction = 'reject'\n\
     [[rule]]\ndomain = 'dropped.example'\naction = 'drop'\n";

/// `curl` of a name that it takes for this address, from this client.
fn curl(lab: &Lab, from: IpAddr, scheme: &str, name: &str, to: IpAddr) -> Result<Output> {
    let port = if scheme == "https" { 443 } else { 80 };
    let to = if to.is_ipv6() { format!("[{to}]") } else { to.to_string() };
    lab.client
        .cmd("curl")
        .args(["--silent", "--show-error", "--insecure", "--max-time", &pace::seconds(5)])
        .arg("--interface")
        .arg(from.to_string())
        .arg("--resolve")
        .arg(format!("{name}:{port}:{to}"))
        .arg(format!("{scheme}://{name}/"))
        .run()
}

/// The flow table tells of the rule that decided over the flow to this port.
fn expect_listed(proxy: &Proxy, to: SocketAddr, action: &str, rule: Option<u16>) -> Result<()> {
    let flows = proxy.flows()?;
    let to = to.to_string();
    let listed =
        flows.iter().any(|flow| flow.destination == to && flow.action == action && flow.rule == json!(rule));
    ensure!(listed, "no flow to {to} with {action} by rule {rule:?} in {flows:#?}");
    Ok(())
}

/// Tries again where the machine is slow and the attempt took as long as first bytes are waited
/// for: there a client may send its own later than that, and is decided over without a name.
fn in_time(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    const WAITED_FOR: Duration = Duration::from_millis(300);
    let more = if pace::slowdown() > 1 { 2 } else { 0 };
    for _ in 0..more {
        let begun = Instant::now();
        match attempt() {
            Err(_) if begun.elapsed() >= WAITED_FOR => {}
            outcome => return outcome,
        }
    }
    attempt()
}

fn by_name(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    fs::write(lab.dir().join("refused.txt"), "# ads\nads.example\n*.ads.example # and below\n")?;
    let _outside = server::web_with_tls(lab, &lab.server, &[80], &[443])?;
    let _inside = server::web_with_tls(lab, &lab.router, &[8080], &[8443])?;
    let (proxy, _config) = start_with_rules(lab, flags, RULES)?;
    for (scheme, port, inside) in [("http", 80, 8080), ("https", 443, 8443)] {
        for (number, (name, action, rule)) in (0..).zip([
            ("pass.example", "pass", Some(1)),
            ("a.b.divert.example", "divert", Some(if port == 80 { 2 } else { 3 })),
            ("divert.example", "proxy", None),
            ("ads.example", "reject", Some(4)),
            ("x.ads.example", "reject", Some(4)),
            ("DROPPED.example", "drop", Some(5)),
        ]) {
            let to = family.anywhere(port + number);
            in_time(|| {
                let output = curl(lab, family.client(), scheme, name, to)?;
                let page = output.stdout.trim_end();
                let expected = match action {
                    "divert" => page.ends_with(&format!("127.0.0.1 {inside}")),
                    "pass" | "proxy" => {
                        page.starts_with(&family.client().to_string())
                            && page.ends_with(&format!("{to} {port}"))
                    }
                    // Recv failure, or of TLS.
                    _ => matches!(output.code(), 35 | 56),
                };
                ensure!(expected, "{scheme}://{name}/: expected {action}, {}", output.describe());
                ensure!(
                    output.elapsed < patience(Duration::from_secs(1)),
                    "{scheme}://{name}/ took long, {}",
                    output.describe()
                );
                expect_listed(&proxy, at(to, port), action, rule)
            })?;
        }
    }
    ensure!(proxy.counter("syn_set_aside")? == 0, "a SYN of a flow that is asked about was set aside");
    Ok(())
}

fn own_traffic(lab: &Lab, family: Family) -> Result<()> {
    let _outside = server::web(lab, &lab.server, &[80])?;
    let _inside = server::web(lab, &lab.router, &[8080])?;
    let rules = "[[rule]]\ndomain = 'a.example'\niface = 'lan'\naction = 'reject'\n\
                 [[rule]]\ndomain = 'a.example'\naction = 'divert'\ntarget = '127.0.0.1:8080'\n";
    let (proxy, _config) = start_with_rules(lab, "--own-traffic", rules)?;
    let to = family.anywhere(1);
    let host = if to.is_ipv6() { format!("[{to}]") } else { to.to_string() };
    let page = lab
        .router
        .cmd("curl")
        .args(["--silent", "--max-time", &pace::seconds(5), "--resolve"])
        .arg(format!("a.example:80:{host}"))
        .arg("http://a.example/")
        .check()?;
    ensure!(page.stdout.trim_end().ends_with("127.0.0.1 8080"), "not diverted, {}", page.describe());
    expect_listed(&proxy, at(to, 80), "divert", Some(2))?;
    let refused = curl(lab, family.client(), "http", "a.example", to)?;
    ensure!(refused.code() == 56, "not refused, {}", refused.describe());
    Ok(())
}

/// A request that comes byte by byte, and what comes behind it.
fn in_parts(lab: &Lab, family: Family) -> Result<()> {
    let to = target(family, 1);
    let _server = TcpServer::start(&lab.server, to, |mut stream, _| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        let _ = stream.write_all(&all);
    })?;
    let rules = "[[rule]]\ndomain = '*.example'\naction = 'proxy'\n[[rule]]\naction = 'drop'\n";
    let (proxy, _config) = start_with_rules(lab, "", rules)?;
    let sent = [&b"POST / HTTP/1.1\r\nHost: a.example\r\n\r\n"[..], &peer::pattern(100_000)].concat();
    let mut stream = peer::connect(&lab.client, Some(unused(family.client())), to, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    for byte in &sent[..40] {
        stream.write_all(&[*byte])?;
        std::thread::sleep(Duration::from_millis(5));
    }
    stream.write_all(&sent[40..])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    ensure!(back == sent, "{} bytes came back of {}, or they differ", back.len(), sent.len());
    expect_listed(&proxy, to, "proxy", Some(1))
}

fn server_first(lab: &Lab, family: Family) -> Result<()> {
    let _servers = reflectors_in(lab, family, &[1])?;
    let rules = "[[rule]]\ndomain = 'a.example'\naction = 'reject'\n\
                 [[rule]]\nto_port = 7070\naction = 'pass'\n";
    let (proxy, _config) = start_with_rules(lab, "", rules)?;
    let from = unused(family.client());
    let begun = Instant::now();
    let (_, took) = tcp_fate(&lab.client, from, target(family, 1), Duration::from_secs(5))?;
    ensure!(
        begun.elapsed() < patience(Duration::from_millis(500)),
        "a server that speaks first was heard after {took:?}"
    );
    expect_listed(&proxy, target(family, 1), "pass", Some(2))?;
    // What does not depend on a name does not wait.
    let flow = proxy.flow("tcp", &from.to_string(), &target(family, 1).to_string())?;
    ensure!(flow.packets_down > 0, "{flow:#?}");
    Ok(())
}

/// What a client has been told over DNS the kernel decides by, at the SYN.
fn learned(lab: &Lab, family: Family, diverted: bool) -> Result<()> {
    let answers = [Family::V4, Family::V6].map(|family| target(family, 1).ip());
    let _servers = reflectors_in(lab, family, &[1, 2])?;
    let _dns = if diverted {
        server::local_dns(lab, &lab.router, 5353, answers)?
    } else {
        server::dns(lab, &lab.server, answers)?
    };
    let hijack = if diverted {
        "[[rule]]\nprotocol = 'udp'\nto_port = 53\naction = 'divert'\ntarget = '127.0.0.1:5353'\n"
    } else {
        ""
    };
    let rules = |action| format!("{hijack}[[rule]]\ndomain = '*.example.test'\naction = '{action}'\n");
    let (proxy, config) = start_with_rules(lab, "", &rules("pass"))?;
    let (client, to) = (Client::of(lab, family), target(family, 1));
    client.expect_tcp(to, Fate::Proxied)?;
    let asked = server::dig(&lab.client, family.server(), family, Protocol::Udp)?;
    ensure!(asked == to.ip(), "{asked} was answered");
    let steered = proxy.counter("steered_tcp_new")?;
    client.expect_tcp(to, Fate::Passed)?;
    expect_listed(&proxy, to, "pass", Some(if diverted { 2 } else { 1 }))?;
    ensure!(proxy.counter("steered_tcp_new")? == steered, "what is passed was steered");
    // Another address has no name.
    client.expect_tcp(target(family, 2), Fate::Proxied)?;
    // What was learned holds for the next rules.
    let other = rules("reject").replace("*.example.test", "*.other.test");
    replace(&config.0, &rules("reject"))?;
    proxy.cmd("reload")?.check()?;
    client.expect_tcp(to, Fate::Rejected)?;
    ensure!(proxy.counter("policy_reset")? == 1, "the kernel itself refuses");
    // Of other names the rules look the same to the kernel.
    replace(&config.0, &other)?;
    proxy.cmd("reload")?.check()?;
    client.expect_tcp(to, Fate::Proxied)?;
    ensure!(proxy.status()?["counters"]["tcp_asked"] == 2, "the kernel knew that the name is another's");
    replace(&config.0, hijack)?;
    proxy.cmd("reload")?.check()?;
    client.expect_tcp(to, Fate::Proxied).map(drop)
}

/// Datagrams that open QUIC connections to example.com: a whole one, and one in two parts.
pub(crate) fn initials() -> Result<Vec<Vec<u8>>> {
    let byte = |pair: &[u8]| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?);
    let line = |line: &str| line.as_bytes().chunks(2).map(byte).collect();
    include_str!("domains/initials.txt").lines().map(line).collect()
}

fn quic(lab: &Lab, family: Family) -> Result<()> {
    let inside = at(Family::V4.loopback(), 8443);
    let _inside = UdpServer::echo(&lab.router, inside)?;
    let _outside = UdpServer::echo(&lab.server, target(family, 1))?;
    let rules = "[[rule]]\ndomain = 'example.com'\nto_port = 443\naction = 'divert'\ntarget = '127.0.0.1:8443'\n\
                 [[rule]]\ndomain = '*.example.com'\naction = 'drop'\n\
                 [[rule]]\ndomain = 'example.com'\nto_port = 444\naction = 'reject'\n";
    let (proxy, _config) = start_with_rules(lab, "", rules)?;
    let initials = initials()?;
    let socket = |to: SocketAddr| -> Result<_> {
        let socket = peer::udp(&lab.client, unused(family.client()))?;
        socket.set_read_timeout(Some(patience(Duration::from_secs(2))))?;
        socket.connect(to)?;
        Ok(socket)
    };
    // In one datagram, and in two: all come back, and what follows goes there, too.
    for datagrams in [&initials[..1], &initials[1..]] {
        let to = at(family.anywhere(443), 443);
        let socket = socket(to)?;
        let begun = Instant::now();
        for datagram in datagrams.iter().map(Vec::as_slice).chain([&b"and more"[..]]) {
            socket.send(datagram)?;
        }
        for expected in datagrams.iter().map(Vec::as_slice).chain([&b"and more"[..]]) {
            let mut back = [0; 2000];
            let (length, _) = peer::receive(&socket, &mut back)?;
            ensure!(back[..length] == *expected, "{length} bytes came back that were not sent then");
        }
        ensure!(begun.elapsed() < patience(Duration::from_millis(90)), "it took {:?}", begun.elapsed());
        expect_listed(&proxy, to, "divert", Some(1))?;
    }
    let refused = socket(at(family.anywhere(444), 444))?;
    refused.send(&initials[0])?;
    let error = peer::receive(&refused, &mut [0; 100]).err().map(|error| error.kind());
    ensure!(error == Some(std::io::ErrorKind::ConnectionRefused), "refused, but {error:?}");
    expect_listed(&proxy, at(family.anywhere(444), 444), "reject", Some(3))?;
    // A part alone, and what is no QUIC: by what holds without a name, in time.
    let to = target(family, 1);
    for (datagram, least) in [(&initials[1][..], 90), (b"who am I?", 0)] {
        let socket = socket(to)?;
        let begun = Instant::now();
        socket.send(datagram)?;
        let mut back = [0; 2000];
        let (length, _) = peer::receive(&socket, &mut back)?;
        let took = begun.elapsed();
        ensure!(back[..length] == *datagram, "{length} other bytes came back");
        ensure!(
            took >= Duration::from_millis(least) && took < patience(Duration::from_millis(least + 90)),
            "a datagram waited for {took:?}"
        );
    }
    expect_listed(&proxy, to, "proxy", None)
}

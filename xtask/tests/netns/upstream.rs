//! Through proxy servers: SOCKS5 and HTTP, with real ones.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::{Daemon, wait_for};
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::{Launch, Proxy};
use xtask::lab::sockets::Protocol;
use xtask::lab::upstream::{self, USER};
use xtask::lab::{Family, Lab, server, url};

use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(crate) const SCENARIOS: Scenarios = &[
    ("socks5_tcp_by_dante", |lab, family| carries_tcp(lab, family, &dante(lab, family)?, SOCKS5)),
    // Over IPv6 dante 1.4.2 brings the answers of one address alone.
    ("socks5_udp_by_dante", |lab, family| {
        udp(lab, family, &dante(lab, family)?, Kind { hosts: family.pick(5, 1), ..SOCKS5 })
    }),
    ("socks5_udp_server_comes_back", udp_comes_back),
    ("socks5_by_shadowsocks", |lab, family| {
        let [_server, local] = upstream::shadowsocks(lab, &lab.server, exit(family))?;
        carries_tcp(lab, family, &local, Kind { half_closes: false, ..SOCKS5 })?;
        udp(lab, family, &local, Kind { sizes: &[0, 1, 512, 1300], ..SOCKS5 })
    }),
    ("socks5_by_v2ray", |lab, family| {
        let v2ray = upstream::v2ray(lab, &lab.server, exit(family))?;
        carries_tcp(lab, family, &v2ray, SOCKS5)?;
        udp(lab, family, &v2ray, Kind { sizes: &[1, 512, 1400, 1472], ..SOCKS5 })
    }),
    ("socks5_tcp_by_microsocks_with_password", microsocks),
    ("socks5_by_rule_and_reload", by_rule),
    ("socks5_with_faithful_handshakes", faithful),
    ("socks5_of_own_traffic", own_traffic),
    ("F8_socks5_server_fails", failing),
    ("F9_datagrams_wait_for_the_socks5_server", first_flight),
    ("socks5_password_in_a_url_is_hidden", url_with_password),
    ("upstream_behind_another", chain),
    ("socks5_pipelined_by_dante", pipelined),
    ("group_fails_over_and_comes_back", failover),
    ("send_proxy_to_local_targets", send_proxy),
    ("send_proxy_of_datagrams", send_proxy_udp),
    ("udp_that_the_upstream_does_not_carry", without_udp),
    ("http_tcp_by_tinyproxy", tinyproxy),
    ("http_tcp_by_squid", |lab, family| {
        carries_tcp(lab, family, &upstream::squid(lab, &lab.server, exit(family))?, HTTP)
    }),
];

/// For both families at once.
pub(crate) const ONCE: Scenarios =
    &[("socks5_server_by_name_on_this_host", by_name), ("upstream_is_asked_by_name", asked_by_name)];

/// What a server does, and what it leaves out whoever its client is.
#[derive(Clone, Copy)]
struct Kind {
    scheme: &'static str,
    /// It brings on what comes back after one side has ended. An HTTP server ends a tunnel as soon as one side
    /// does (RFC 9110, section 9.3.6).
    half_closes: bool,
    /// Lengths of datagrams that it carries.
    sizes: &'static [usize],
    /// Whether it brings answers of so many addresses to one client's port.
    hosts: u16,
}

const SIZES: &[usize] = &[0, 1, 512, 1400, 1472, 4000, 30_000, 60_000];
const SOCKS5: Kind = Kind { scheme: "socks5", half_closes: true, sizes: SIZES, hosts: 5 };
const HTTP: Kind = Kind { scheme: "http", half_closes: false, ..SOCKS5 };

/// Where proxy servers listen.
const PORT: u16 = 1080;

fn exit(family: Family) -> SocketAddr {
    at(family.server(), PORT)
}

fn dante(lab: &Lab, family: Family) -> Result<Daemon> {
    upstream::dante(lab, &lab.server, exit(family), Family::ALL.map(Family::server))
}

/// Starts a proxy that sends all through the server, by its URL.
fn through(lab: &Lab, family: Family, scheme: &str, flags: &str) -> Result<Proxy> {
    needs_proxy()?;
    Launch::new(lab, &format!("--iface lan --upstream {scheme}://{} {flags}", exit(family))).start()
}

/// A web page, a server that speaks first, and a large file each way get through, and servers
/// see the proxy server.
fn carries_tcp(lab: &Lab, family: Family, exit: &Daemon, kind: Kind) -> Result<()> {
    let Kind { scheme, half_closes, .. } = kind;
    let web = server::web(lab, &lab.server, &[80])?;
    let proxy = through(lab, family, scheme, "--access-log json")?;
    for to in [family.anywhere(80), family.anywhere(81)] {
        let page = lab.client.sh(&format!("curl -sS -m {} {}", pace::seconds(10), url(to, 80, "/")))?;
        ensure!(
            page.stdout.starts_with(&format!("{} ", family.server()))
                || page.stdout.starts_with(&to.to_string()),
            "the web server sees {page:?}; {}",
            exit.describe()
        );
        ensure!(page.stdout.contains(&format!(" {to} 80")), "another server answers: {page:?}");
    }
    ensure!(!web.log().contains(&family.client().to_string()), "{}", web.describe());

    let banner = TcpServer::start(&lab.server, at(family.anywhere(22), 22), |mut stream, _| {
        // Its client may be gone.
        let _ = stream.write_all(b"SSH-2.0-lab\r\n");
    })?;
    let began = Instant::now();
    let line = lab.client.enter(|| -> Result<String> {
        let mut stream = peer::try_connect(None, at(family.anywhere(22), 22), peer::PATIENCE)?;
        Ok(peer::read_line(&mut stream)?)
    })??;
    ensure!(line.trim_end() == "SSH-2.0-lab", "the server says {line:?}");
    ensure!(began.elapsed() < patience(Duration::from_secs(2)), "it took {:?}", began.elapsed());
    drop(banner);

    let _echo = TcpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    let sent = peer::pattern(4 << 20);
    let received = lab.client.enter(|| -> Result<Vec<u8>> {
        let mut reader = peer::try_connect(None, at(family.anywhere(7), 7), peer::PATIENCE)?;
        let mut writer = reader.try_clone()?;
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                writer.write_all(&sent)?;
                if half_closes { writer.shutdown(std::net::Shutdown::Write) } else { Ok(()) }
            });
            let mut received = vec![0; sent.len()];
            reader.read_exact(&mut received)?;
            if half_closes {
                reader.read_to_end(&mut received)?;
            }
            writing.join().expect("no panic")?;
            Ok(received)
        })
    })??;
    ensure!(received == sent, "{} of {} bytes came back as they were", received.len(), sent.len());

    let flows = proxy.flows()?;
    let to = at(family.anywhere(80), 80).to_string();
    let flow = flows.iter().find(|flow| flow.destination == to).context("no flow to the web server")?;
    ensure!(flow.upstream == format!("{scheme}://{}", self::exit(family)), "{flow:?}");
    Ok(())
}

fn microsocks(lab: &Lab, family: Family) -> Result<()> {
    with_password(lab, family, "socks5", &upstream::microsocks(lab, &lab.server, exit(family), true)?)
}

fn tinyproxy(lab: &Lab, family: Family) -> Result<()> {
    {
        let exit = upstream::tinyproxy(lab, &lab.server, exit(family), false)?;
        carries_tcp(lab, family, &exit, HTTP)?;
    }
    with_password(lab, family, "http", &upstream::tinyproxy(lab, &lab.server, exit(family), true)?)
}

/// A password in a URL on the command line is used, and is not for others to see.
fn url_with_password(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _exit = upstream::microsocks(lab, &lab.server, exit(family), true)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let (user, password) = USER;
    let flags = format!("--iface lan --upstream socks5://{user}:{password}@{}", exit(family));
    let proxy = Launch::new(lab, &flags).start()?;
    let page = url(family.anywhere(80), 80, "/");
    lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
    let shown = fs::read_to_string(format!("/proc/{}/cmdline", proxy.daemon.pid()))?;
    ensure!(shown.contains(&format!("socks5://{user}:***")), "{shown}");
    let told = [shown, proxy.daemon.log(), proxy.status()?.to_string(), proxy.cmd("status")?.check()?.stdout];
    ensure!(!told.iter().any(|text| text.contains(password)), "the password is told: {told:#?}");
    let check = Launch::new(lab, &format!("check {flags}")).command()?.run()?;
    ensure!(!check.stdout.contains(password) && check.stdout.contains("socks5://"), "{}", check.describe());
    Ok(())
}

/// A server by its name, on this very host. What else `localhost` means is up to the host.
fn by_name(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _exit = upstream::microsocks(lab, &lab.router, at(family.loopback(), PORT), false)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let proxy = Launch::new(lab, &format!("--iface lan --upstream socks5://localhost:{PORT}")).start()?;
    let page = url(family.anywhere(80), 80, "/");
    for _ in 0..3 {
        let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
        let seen = page.stdout.split(' ').next();
        ensure!(seen == Some(&family.uplink().to_string()), "the server sees {page:?}");
    }
    ensure!(proxy.status()?["upstreams"][0]["up"] == true, "it is down; {}", proxy.daemon.describe());
    Ok(())
}

/// One server is reached through another, whichever of them speaks what.
fn chain(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let (socks5, http) = (exit(family), at(family.server(), 1081));
    let microsocks = upstream::microsocks(lab, &lab.server, socks5, true)?;
    let tinyproxy = upstream::tinyproxy(lab, &lab.server, http, false)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _echo = UdpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    fs::write(lab.dir().join("password"), USER.1)?;
    let (one, two) = (
        format!("name = 'one'\nurl = 'socks5://{socks5}'\nusername = 'alice'\npassword_file = 'password'\n"),
        format!("name = 'two'\nurl = 'http://{http}'\n"),
    );
    for (near, far, last) in [(&two, &one, "one"), (&one, &two, "two")] {
        let via = if last == "one" { "two" } else { "one" };
        let config = format!(
            "[source]\nupstream = '{last}'\n[log]\naccess = 'json'\n[[upstream]]\n{near}[[upstream]]\n{far}via = '{via}'\n"
        );
        let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
        let page = url(family.anywhere(80), 80, "/");
        let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check();
        let page = page.with_context(|| format!("{}; {}", microsocks.describe(), tinyproxy.describe()))?;
        ensure!(page.stdout.contains(&format!(" {} 80", family.anywhere(80))), "{page:?}");
        let asked = if last == "one" { socks5 } else { at(family.anywhere(80), 80) };
        ensure!(
            tinyproxy.log().contains(&format!("CONNECT {asked} HTTP")),
            "{last} is not reached through {via}: {}",
            tinyproxy.describe()
        );
        // A refusal of the destination comes all the way.
        let ended = lab.client.enter(|| {
            let to = at(family.anywhere(80), 82);
            peer::try_connect(None, to, peer::PATIENCE).and_then(|mut stream| stream.read(&mut [0; 1]))
        })?;
        ensure!(ended.is_err(), "{last}: a port where nobody listens answers");
        let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
        socket.connect(at(family.anywhere(7), 7))?;
        socket.send(b"x")?;
        let refused = socket.recv(&mut [0; 16]).err().map(|error| error.kind());
        ensure!(refused == Some(std::io::ErrorKind::ConnectionRefused), "UDP: {refused:?}");
        proxy.terminate(Duration::from_secs(15))?;
    }
    Ok(())
}

/// All is said at once to a server that reads on.
fn pipelined(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _dns = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let config = format!(
        "[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = 'socks5://{}'\npipelined = true\n",
        exit(family)
    );
    let _proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
    for _ in 0..5 {
        let page = url(family.anywhere(80), 80, "/");
        let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
        ensure!(page.stdout.contains(&format!(" {} 80", family.anywhere(80))), "{page:?}");
    }
    server::dig(&lab.client, family.anywhere(53), family, Protocol::Udp)?;
    Ok(())
}

/// A server that wants names is asked for that of the request, not for the address; without a name
/// it is asked for the address.
fn asked_by_name(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _socks5 = upstream::microsocks(lab, &lab.server, exit(family), false)?;
    let http = at(family.server(), 1081);
    let _http = upstream::tinyproxy(lab, &lab.server, http, false)?;
    let _web = server::web(lab, &lab.server, &[80, 81])?;
    let _echo = TcpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    let config = format!(
        "[source]\nupstream = 'one'\n[[upstream]]\nname = 'one'\nurl = 'socks5://{}'\nnames = true\n\
         [[upstream]]\nname = 'two'\nurl = 'http://{http}'\nnames = true\n\
         [[rule]]\nto_port = 81\naction = 'proxy'\nupstream = 'two'\n",
        exit(family)
    );
    let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
    for port in [80, 81] {
        let get = |host: &str| -> Result<String> {
            let (page, host) = (url(family.anywhere(80), port, "/"), format!("Host: {host}"));
            let curl = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), "-H", &host, &page]);
            Ok(curl.check()?.stdout)
        };
        // What that is for the server's host.
        let page = get("localhost")?;
        ensure!(page.contains(&format!(" 127.0.0.1 {port}")), "by name it got {page:?}");
        let page = get("198.18.0.80")?;
        ensure!(page.contains(&format!(" {} {port}", family.anywhere(80))), "by address it got {page:?}");
    }
    ensure!(proxy.counter("tcp_named")? == 2, "names are not counted");
    let mut stream =
        lab.client.enter(|| peer::try_connect(None, at(family.anywhere(7), 7), peer::PATIENCE))??;
    stream.write_all(b"no name")?;
    let mut back = [0; 7];
    stream.read_exact(&mut back)?;
    ensure!(&back == b"no name", "{back:?}");
    Ok(())
}

/// What the server does not carry goes the way that is configured.
fn without_udp(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _exit = upstream::microsocks(lab, &lab.server, exit(family), false)?;
    let _reflector = UdpServer::reflector(&lab.server, at(family.anywhere(7), 7))?;
    let from = at(family.client(), 4000);
    for (scheme, udp, passed) in [
        ("socks5", "direct", false),
        ("socks5", "pass", false),
        ("http", "direct", false),
        ("http", "pass", true),
    ] {
        let config = format!(
            "[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = '{scheme}://{}'\nudp = '{udp}'",
            exit(family)
        );
        let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
        let socket = peer::udp(&lab.client, from)?;
        let (seen, by) = peer::exchange(&socket, at(family.anywhere(7), 7), b"x")
            .with_context(|| format!("{scheme}, {udp}; {}", proxy.daemon.describe()))?;
        ensure!(by == at(family.anywhere(7), 7), "{by} answers");
        let seen: SocketAddr = String::from_utf8(seen)?.parse()?;
        ensure!(seen.ip() == from.ip(), "{scheme}, {udp}: the server sees {seen}");
        let counted = proxy.counter("pass_policy")?;
        ensure!((counted > 0) == passed, "{scheme}, {udp}: the kernel has passed {counted}");
        proxy.terminate(Duration::from_secs(15))?;
    }
    Ok(())
}

/// With the password of a file it gets through, without or with another it does not, and the log
/// says why. UDP, which the server does not carry, is refused at once.
fn with_password(lab: &Lab, family: Family, scheme: &str, exit: &Daemon) -> Result<()> {
    needs_proxy()?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _echo = UdpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    fs::write(lab.dir().join("right"), USER.1)?;
    fs::write(lab.dir().join("wrong"), "sesame")?;
    let page = url(family.anywhere(80), 80, "/");
    let curl = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]);
    for (password, reason) in [
        ("username = 'alice'\npassword_file = 'right'", None),
        ("username = 'alice'\npassword_file = 'wrong'", Some("refuses this user and password")),
        ("", Some("wants a user and a password")),
    ] {
        let config = format!(
            "[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = '{scheme}://{}'\n{password}",
            self::exit(family)
        );
        let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
        let page = curl.run()?;
        match reason {
            None => ensure!(page.stdout.contains(" 80\n"), "{page:?}; {}", exit.describe()),
            Some(reason) => {
                ensure!(page.status.code() != Some(0), "it got through: {page:?}");
                ensure!(proxy.daemon.log().contains(reason), "{}", proxy.daemon.describe());
                ensure!(proxy.counter("connect_proxy_failed")? > 0, "not counted");
            }
        }
        let log = proxy.daemon.log();
        ensure!(!log.contains(USER.1) && !log.contains("sesame"), "a password in the log: {log}");
        if reason.is_none() {
            let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
            socket.connect(at(family.anywhere(7), 7))?;
            socket.send(b"x")?;
            let answer = socket.recv(&mut [0; 16]);
            let refused = answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
            ensure!(refused, "its client is not told that UDP does not get through");
        }
        proxy.terminate(Duration::from_secs(15))?;
    }
    Ok(())
}

/// DNS, sizes, and many servers from one port, each of which answers as itself.
fn udp(lab: &Lab, family: Family, exit: &Daemon, kind: Kind) -> Result<()> {
    let answer = family.anywhere(80);
    let _dns = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let proxy = through(lab, family, "socks5", "")?;
    let got = server::dig(&lab.client, family.anywhere(53), family, Protocol::Udp)
        .with_context(|| exit.describe())?;
    ensure!(got == answer, "the answer is {got}");

    let servers: Vec<_> =
        (1..=5).map(|n| UdpServer::echo(&lab.server, at(family.anywhere(n), 7))).collect::<Result<_>>()?;
    let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
    for (number, &length) in (1..=kind.hosts).cycle().zip(kind.sizes) {
        let to = at(family.anywhere(number), 7);
        let sent = peer::pattern(length);
        let (received, from) = peer::exchange(&socket, to, &sent).with_context(|| {
            format!("{length} bytes to {to}; {}; {}", exit.describe(), proxy.daemon.describe())
        })?;
        ensure!(from == to, "{to} answers as {from}");
        ensure!(received == sent, "{length} bytes come back as {}", received.len());
    }
    drop(servers);
    let flows = proxy.status()?["connections"]["udp"].as_u64();
    ensure!(flows.is_some_and(|flows| flows <= 2), "one association a client port, not {flows:?}");

    Ok(())
}

/// The server goes: its flows end, and come again with it.
fn udp_comes_back(lab: &Lab, family: Family) -> Result<()> {
    let exit = dante(lab, family)?;
    let answer = family.anywhere(80);
    let _dns = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let proxy = through(lab, family, "socks5", "")?;
    server::dig(&lab.client, family.anywhere(53), family, Protocol::Udp)?;
    drop(exit);
    wait_for("the flows end", patience(Duration::from_secs(5)), || {
        Ok(proxy.status()?["connections"]["udp"].as_u64() == Some(0))
    })?;
    let _exit = dante(lab, family)?;
    let got = server::dig(&lab.client, family.anywhere(53), family, Protocol::Udp)?;
    ensure!(got == answer, "the answer is {got}");
    Ok(())
}

/// A server that does not do its part: its clients are reset at once, or after the connect
/// time-out, the log says why, and once it does its part it is used again.
fn failing(lab: &Lab, family: Family) -> Result<()> {
    const SAYS: [(&[u8], &str); 5] = [
        (b"", "it closes the connection instead of an answer"),
        (b"\x05", "it closes the connection instead of an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP, not SOCKS5"),
        (b"\x05\x00\x05\x00\x00\x07\x00", "it answers with an address of kind 7"),
        (b"\x05\x00\x05\x02\x00\x01\0\0\0\0\0\0", "it answers: not allowed by its rules"),
    ];
    let _web = server::web(lab, &lab.server, &[80])?;
    let to = at(family.anywhere(80), 80);
    for (answer, reason) in SAYS {
        let proxy = through(lab, family, "socks5", "--connect-timeout 3s")?;
        let faulty = TcpServer::start(&lab.server, exit(family), move |mut stream, _| {
            let mut asked = [0; 64];
            // What it is told is not its business; that its client goes before it has said all is none either.
            let _ = stream.read(&mut asked).and_then(|_| stream.write_all(answer));
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            while stream.read(&mut asked).is_ok_and(|length| length > 0) {}
        })?;
        let took = expect_reset(lab, to)?;
        ensure!(took < patience(Duration::from_secs(2)), "{reason}: it took {took:?}");
        ensure!(proxy.daemon.log().contains(reason), "not told: {reason}; {}", proxy.daemon.describe());
        ensure!(proxy.counter("connect_proxy_failed")? == 1, "{reason}: not counted");
        drop(faulty);
        proxy.terminate(Duration::from_secs(15))?;
    }
    let proxy = through(lab, family, "socks5", "--connect-timeout 1s")?;
    expect_reset(lab, to)?;
    ensure!(proxy.daemon.log().contains("Connection refused"), "{}", proxy.daemon.describe());
    let silent = TcpServer::start(&lab.server, exit(family), |mut stream, _| {
        let _ = stream.read(&mut [0; 64]);
        std::thread::sleep(Duration::from_secs(4));
    })?;
    let took = expect_reset(lab, to)?;
    ensure!(took >= Duration::from_millis(900), "before its time: {took:?}");
    ensure!(took < patience(Duration::from_secs(3)), "it took {took:?}");
    let up = |proxy: &Proxy| Ok::<_, anyhow::Error>(proxy.status()?["upstreams"][0]["up"].clone());
    ensure!(up(&proxy)? == false, "a server that does not answer is up");
    drop(silent);
    let _dante = dante(lab, family)?;
    let page = lab.client.sh(&format!("curl -sS -m {} {}", pace::seconds(10), url(to.ip(), 80, "/")))?;
    ensure!(page.stdout.contains(" 80\n"), "{page:?}");
    Ok(())
}

/// Connects and waits for the end, which has to be a reset; how long it took.
fn expect_reset(lab: &Lab, to: SocketAddr) -> Result<Duration> {
    lab.client.enter(|| -> Result<Duration> {
        let began = Instant::now();
        let ended =
            peer::try_connect(None, to, peer::PATIENCE).and_then(|mut stream| stream.read(&mut [0; 16]));
        match ended {
            Err(error) if peer::is_reset(&error) => Ok(began.elapsed()),
            other => anyhow::bail!("expected a reset, got {other:?} after {:?}", began.elapsed()),
        }
    })?
}

/// Datagrams that come while the server is being asked wait for it.
fn first_flight(lab: &Lab, family: Family) -> Result<()> {
    let _dante =
        upstream::dante(lab, &lab.server, at(family.server(), 1081), Family::ALL.map(Family::server))?;
    // Before it a server that is slow to answer.
    let (namespace, behind) = (lab.server.clone(), at(family.server(), 1081));
    let _slow = TcpServer::start(&lab.server, exit(family), move |stream, _| {
        std::thread::sleep(Duration::from_millis(300));
        let Ok(Ok(onward)) = namespace.enter(|| peer::try_connect(None, behind, peer::PATIENCE)) else {
            return;
        };
        let (mut from, mut to) = (stream, onward);
        let (Ok(mut there), Ok(mut back)) = (to.try_clone(), from.try_clone()) else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| std::io::copy(&mut from, &mut there).is_ok());
            let _ = std::io::copy(&mut to, &mut back);
        });
    })?;
    let _echo = UdpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    let proxy = through(lab, family, "socks5", "")?;
    let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
    for number in 0..10_u8 {
        socket.send_to(&[number; 100], at(family.anywhere(7), 7))?;
    }
    let mut buffer = [0; 200];
    for number in 0..10_u8 {
        let (length, _) = peer::receive(&socket, &mut buffer)
            .with_context(|| format!("datagram {number}; {}", proxy.daemon.describe()))?;
        ensure!(buffer[..length] == [number; 100], "datagram {number} is not the {number}th");
    }
    Ok(())
}

/// A client goes through a server by a rule, the others go straight; after a reload another way.
fn by_rule(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _echo = UdpServer::reflector(&lab.server, at(family.anywhere(7), 7))?;
    let rules = |port: u16, default: &str| {
        format!(
            "[source]\nupstream = '{default}'\n[[upstream]]\nname = 'exit'\nurl = 'socks5://{}'\n\
             [[rule]]\nto_port = {port}\naction = 'proxy'\nupstream = 'exit'\n\
             [[rule]]\nto_port = 9\naction = 'proxy'\nupstream = 'direct'\n",
            exit(family)
        )
    };
    let config = ConfigFile::new(lab, &rules(80, "direct"))?;
    let proxy = config.launch(lab, "--iface lan").start()?;
    let sees = |port: u16| -> Result<String> {
        let page = url(family.anywhere(80), port, "/");
        let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
        Ok(page.stdout.split(' ').next().unwrap_or_default().to_owned())
    };
    ensure!(sees(80)? == family.server().to_string(), "the rule's upstream is not used: {}", sees(80)?);
    let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
    let told = peer::exchange(&socket, at(family.anywhere(7), 7), b"x")?.0;
    let client = family.client().to_string();
    ensure!(String::from_utf8_lossy(&told).contains(&client), "what no rule sends through it goes there too");
    let to = at(family.anywhere(80), 80).to_string();
    let flows = proxy.flows()?;
    let flow = flows.iter().find(|flow| flow.destination == to).context("no flow")?;
    ensure!(flow.upstream == "exit" && flow.rule == 1, "{flow:?}");

    config.write(&rules(81, "exit"))?;
    proxy.cmd("reload")?.check()?;
    ensure!(sees(80)? == family.server().to_string(), "the new default is not used");
    config.write(&rules(81, "direct"))?;
    proxy.cmd("reload")?.check()?;
    ensure!(sees(80)? == client, "the old rule is used still: {}", sees(80)?);
    Ok(())
}

/// With faithful handshakes the client sees what the server says of the destination.
fn faithful(lab: &Lab, family: Family) -> Result<()> {
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _proxy = through(lab, family, "socks5", "--handshake faithful")?;
    let page = url(family.anywhere(80), 80, "/");
    let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
    ensure!(page.stdout.starts_with(&family.server().to_string()), "{page:?}");
    let refused =
        lab.client.enter(|| peer::try_connect(None, at(family.anywhere(80), 81), peer::PATIENCE))?;
    let error = refused.err().context("it is connected to a port where nobody listens")?;
    ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "its client is told {error}");
    Ok(())
}

/// What the host itself sends goes through the server as well.
fn own_traffic(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let answer = family.anywhere(80);
    let _dns = server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?;
    let proxy = Launch::new(lab, &format!("--own-traffic --upstream socks5://{}", exit(family))).start()?;
    let page = url(family.anywhere(80), 80, "/");
    let page = lab.router.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
    ensure!(page.stdout.starts_with(&family.server().to_string()), "{page:?}");
    let got = server::dig(&lab.router, family.anywhere(53), family, Protocol::Udp)
        .with_context(|| proxy.daemon.describe())?;
    ensure!(got == answer, "the answer is {got}");
    let flows = proxy.flows()?;
    ensure!(flows.iter().all(|flow| flow.destination != exit(family).to_string()), "a loop: {flows:#?}");
    Ok(())
}

/// The first of a group dies under load: no new connection is lost, the open ones end at once, and
/// it is used again once it is back. Datagrams go over as well.
fn failover(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let second = at(family.server(), 1081);
    // By the port where it listens the servers tell through whom a connection comes.
    let external = Family::ALL.map(Family::server);
    let first = dante(lab, family)?;
    let _second = upstream::microsocks(lab, &lab.server, second, false)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let _echo = TcpServer::echo(&lab.server, at(family.anywhere(7), 7))?;
    let config = format!(
        "[source]\nupstream = 'exits'\n[log]\naccess = 'json'\n\
         [[upstream]]\nname = 'one'\nurl = 'socks5://{}'\ncheck = {{ interval = '1s', timeout = '1s', fall = 2, rise = 2 }}\n\
         [[upstream]]\nname = 'two'\nurl = 'socks5://{second}'\nudp = 'direct'\n\
         [[group]]\nname = 'exits'\nmembers = ['one', 'two']\n",
        exit(family)
    );
    let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
    let page = url(family.anywhere(80), 80, "/");
    let get = || lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(5), &page]).check();
    let ended_by = |name: &str| {
        let log = proxy.daemon.log();
        log.lines().filter(|line| line.contains(&format!("\"upstream\":\"{name}\""))).count()
    };
    get()?;
    ensure!((ended_by("one"), ended_by("two")) == (1, 0), "{}", proxy.daemon.describe());

    let mut open = Vec::new();
    for _ in 0..20 {
        let to = at(family.anywhere(7), 7);
        open.push(lab.client.enter(|| peer::try_connect(None, to, peer::PATIENCE))??);
    }
    for stream in &mut open {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0; 1])?;
    }
    let began = Instant::now();
    drop(first);
    for (number, stream) in open.iter_mut().enumerate() {
        let ended = stream.read(&mut [0; 1]);
        ensure!(ended.is_err() || ended.is_ok_and(|length| length == 0), "connection {number} goes on");
    }
    ensure!(began.elapsed() < patience(Duration::from_secs(2)), "they ended after {:?}", began.elapsed());
    for _ in 0..10 {
        get().with_context(|| proxy.daemon.describe())?;
    }
    ensure!(ended_by("two") == 10, "{}", proxy.daemon.describe());
    wait_for("the first is told to be down", patience(Duration::from_secs(5)), || {
        Ok(proxy.daemon.log().contains("upstream one") && proxy.daemon.log().contains("is down"))
    })?;
    // From now on it is not tried any more.
    let failed_over = proxy.counter("connect_failed_over")?;
    get()?;
    ensure!(proxy.counter("connect_failed_over")? == failed_over, "it is tried still");
    let upstreams = proxy.status()?["upstreams"].clone();
    let up = |name: &str| {
        let all = upstreams.as_array().into_iter().flatten();
        all.clone().find(|one| one["name"] == name).map(|one| one["up"] == true)
    };
    ensure!((up("exits"), up("one"), up("two")) == (Some(true), Some(false), Some(true)), "{upstreams:#}");

    let _first = upstream::dante(lab, &lab.server, exit(family), external)?;
    wait_for("it is up again", patience(Duration::from_secs(6)), || {
        Ok(proxy.daemon.log().contains("is up again"))
    })?;
    let before = ended_by("one");
    get()?;
    ensure!(ended_by("one") == before + 1, "it is not used again: {}", proxy.daemon.describe());
    Ok(())
}

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

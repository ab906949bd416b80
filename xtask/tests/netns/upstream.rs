//! Through proxy servers: SOCKS5 and HTTP, with real ones.

mod announce;
mod datagrams;
mod failing;
mod here;
mod http;
mod named;
mod record;
mod secure;
mod ways;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::Daemon;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::{Launch, Proxy};
use xtask::lab::sockets::Protocol;
use xtask::lab::upstream::{self, USER};
use xtask::lab::{Family, Lab, server, url};

use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(crate) const SCENARIOS: &[Scenarios] = &[
    // First, since they wait.
    record::SCENARIOS,
    BY_SERVER,
    http::SCENARIOS,
    secure::SCENARIOS,
    datagrams::SCENARIOS,
    named::SCENARIOS,
    ways::SCENARIOS,
    failing::SCENARIOS,
    here::SCENARIOS,
    announce::SCENARIOS,
];

/// For both families at once.
pub(crate) const ONCE: Scenarios = ways::ONCE;

/// What each server carries.
const BY_SERVER: Scenarios = &[
    ("socks5_tcp_by_dante", |lab, family| carries_tcp(lab, family, &dante(lab, family)?, SOCKS5)),
    ("socks5_udp_by_dante", |lab, family| udp(lab, family, &dante(lab, family)?, by_dante(family))),
    ("socks5_by_shadowsocks", |lab, family| {
        let [_server, local] = upstream::shadowsocks(lab, &lab.server, exit(family))?;
        carries_tcp(lab, family, &local, SHADOWSOCKS)?;
        udp(lab, family, &local, SHADOWSOCKS)
    }),
    ("socks5_by_v2ray", |lab, family| {
        let v2ray = upstream::v2ray(lab, &lab.server, exit(family), &[])?;
        carries_tcp(lab, family, &v2ray, SOCKS5)?;
        udp(lab, family, &v2ray, V2RAY)
    }),
    ("socks5_tcp_by_microsocks", microsocks),
    ("http_tcp_by_tinyproxy", tinyproxy),
    ("http_tcp_by_squid", |lab, family| {
        carries_tcp(lab, family, &upstream::squid(lab, &lab.server, exit(family), None)?, HTTP)
    }),
];

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

const SHADOWSOCKS: Kind = Kind { half_closes: false, sizes: &[0, 1, 512, 1300], ..SOCKS5 };
const V2RAY: Kind = Kind { sizes: &[1, 512, 1400, 1472], ..SOCKS5 };

/// Over IPv6 dante 1.4.2 brings the answers of one address alone.
fn by_dante(family: Family) -> Kind {
    Kind { hosts: family.pick(5, 1), ..SOCKS5 }
}

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

/// Web pages, a server that speaks first, and bytes both ways at once get through, and servers
/// see the proxy server.
fn carries_tcp(lab: &Lab, family: Family, exit: &Daemon, kind: Kind) -> Result<()> {
    let Kind { scheme, half_closes, .. } = kind;
    let web = http::server(lab)?;
    let proxy = through(lab, family, scheme, "--access-log json")?;
    http::versions(lab, family, exit)?;
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
    {
        let exit = upstream::microsocks(lab, &lab.server, exit(family), false)?;
        carries_tcp(lab, family, &exit, Kind { half_closes: false, ..SOCKS5 })?;
    }
    with_password(lab, family, "socks5", &upstream::microsocks(lab, &lab.server, exit(family), true)?)
}

fn tinyproxy(lab: &Lab, family: Family) -> Result<()> {
    {
        let exit = upstream::tinyproxy(lab, &lab.server, exit(family), false)?;
        carries_tcp(lab, family, &exit, HTTP)?;
    }
    with_password(lab, family, "http", &upstream::tinyproxy(lab, &lab.server, exit(family), true)?)
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
            let answer = peer::receive(&socket, &mut [0; 16]);
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

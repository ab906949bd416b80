//! Servers that fail, are slow, or come back.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::{Launch, Proxy};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab, server, upstream, url};

use super::{dante, exit, through};
use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("F8_socks5_server_fails", failing),
    ("F9_datagrams_wait_for_the_socks5_server", first_flight),
    ("socks5_udp_server_comes_back", udp_comes_back),
    ("group_fails_over_and_comes_back", failover),
    ("upstream_given_twice_fails_over", given_twice),
];

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
pub(super) fn expect_reset(lab: &Lab, to: SocketAddr) -> Result<Duration> {
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

/// Of two upstreams on the command line the second is taken where the first is not there.
fn given_twice(lab: &Lab, family: Family) -> Result<()> {
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let second = format!("--upstream socks5://{}", exit(family));
    // Nobody listens at the first's port.
    let first = format!("--upstream http://{}", at(family.server(), 1082));
    needs_proxy()?;
    let proxy = Launch::new(lab, &format!("--iface lan {first} {second}")).start()?;
    let page = url(family.anywhere(80), 80, "/");
    lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
    ensure!(proxy.counter("connect_failed_over")? == 1, "{}", proxy.daemon.describe());
    Ok(())
}

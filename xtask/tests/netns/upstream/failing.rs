//! Servers that fail, are slow, or come back.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::{Launch, Proxy};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Family, Lab, Namespace, server, upstream, url};

use super::{PORT, dante, exit, here, through};
use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("F8_socks5_server_fails", |lab, family| failing(&Place::away(lab, family))),
    ("F8_socks5_server_on_this_host_fails", |lab, family| failing(&Place::here(lab, family))),
    ("F9_datagrams_wait_for_the_socks5_server", |lab, family| first_flight(&Place::away(lab, family))),
    ("F9_own_datagrams_wait_for_the_server_on_this_host", |lab, family| {
        first_flight(&Place::here(lab, family))
    }),
    ("socks5_udp_server_comes_back", udp_comes_back),
    ("group_fails_over_and_comes_back", failover),
    ("upstream_given_twice_fails_over", given_twice),
];

/// Where a server is, and who goes through it.
struct Place<'lab> {
    lab: &'lab Lab,
    family: Family,
    server: &'lab Namespace,
    exit: SocketAddr,
    client: &'lab Namespace,
}

impl<'lab> Place<'lab> {
    /// A server elsewhere, and a client whose traffic is captured.
    fn away(lab: &'lab Lab, family: Family) -> Self {
        Self { lab, family, server: &lab.server, exit: exit(family), client: &lab.client }
    }

    /// A server on the proxy's host, and that host itself.
    fn here(lab: &'lab Lab, family: Family) -> Self {
        Self { lab, family, server: &lab.router, exit: here::exit(family), client: &lab.router }
    }

    fn is_here(&self) -> bool {
        self.server.role() == self.lab.router.role()
    }

    /// Starts a proxy that sends all through the server, but for what that sends.
    fn start(&self, flags: &str) -> Result<Proxy> {
        needs_proxy()?;
        let (rule, own) = if self.is_here() { (here::BY_USER, "--own-traffic") } else { ("", "") };
        let flags = format!("--iface lan {own} --upstream socks5://{} {flags}", self.exit);
        ConfigFile::new(self.lab, rule)?.launch(self.lab, &flags).start()
    }

    fn dante(&self, port: u16) -> Result<Daemon> {
        let Self { lab, server, exit, .. } = *self;
        let external = Family::ALL.map(if self.is_here() { Family::uplink } else { Family::server });
        upstream::dante_of(lab, server, at(exit.ip(), port), external, here::USER)
    }
}

/// A server that does not do its part: its clients are reset at once, or after the connect
/// time-out, the log says why, and once it does its part it is used again.
fn failing(place: &Place) -> Result<()> {
    const SAYS: [(&[u8], &str); 5] = [
        (b"", "it closes the connection instead of an answer"),
        (b"\x05", "it closes the connection instead of an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP, not SOCKS5"),
        (b"\x05\x00\x05\x00\x00\x07\x00", "it answers with an address of kind 7"),
        (b"\x05\x00\x05\x02\x00\x01\0\0\0\0\0\0", "it answers: not allowed by its rules"),
    ];
    let (lab, family) = (place.lab, place.family);
    let _web = server::web(lab, &lab.server, &[80])?;
    let to = at(family.anywhere(80), 80);
    for (answer, reason) in SAYS {
        let proxy = place.start("--connect-timeout 3s")?;
        let faulty = TcpServer::start(place.server, place.exit, move |mut stream, _| {
            let mut asked = [0; 64];
            // What it is told is not its business; that its client goes before it has said all is none either.
            let _ = peer::read(&mut stream, &mut asked).and_then(|_| stream.write_all(answer));
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            while peer::read(&mut stream, &mut asked).is_ok_and(|length| length > 0) {}
        })?;
        let took = expect_reset(place.client, to)?;
        ensure!(took < patience(Duration::from_secs(2)), "{reason}: it took {took:?}");
        ensure!(proxy.daemon.log().contains(reason), "not told: {reason}; {}", proxy.daemon.describe());
        ensure!(proxy.counter("connect_proxy_failed")? == 1, "{reason}: not counted");
        drop(faulty);
        proxy.terminate(Duration::from_secs(15))?;
    }
    let proxy = place.start("--connect-timeout 1s")?;
    expect_reset(place.client, to)?;
    ensure!(proxy.daemon.log().contains("Connection refused"), "{}", proxy.daemon.describe());
    let silent = TcpServer::start(place.server, place.exit, |mut stream, _| {
        let _ = peer::read(&mut stream, &mut [0; 64]);
        std::thread::sleep(Duration::from_secs(4));
    })?;
    let took = expect_reset(place.client, to)?;
    ensure!(took >= Duration::from_millis(900), "before its time: {took:?}");
    ensure!(took < patience(Duration::from_secs(3)), "it took {took:?}");
    let up = |proxy: &Proxy| Ok::<_, anyhow::Error>(proxy.status()?["upstreams"][0]["up"].clone());
    ensure!(up(&proxy)? == false, "a server that does not answer is up");
    drop(silent);
    let _dante = place.dante(PORT)?;
    let page = place.client.sh(&format!("curl -sS -m {} {}", pace::seconds(10), url(to.ip(), 80, "/")))?;
    ensure!(page.stdout.contains(" 80\n"), "{page:?}");
    Ok(())
}

/// Connects and waits for the end, which has to be a reset; how long it took.
pub(super) fn expect_reset(client: &Namespace, to: SocketAddr) -> Result<Duration> {
    client.enter(|| -> Result<Duration> {
        let began = Instant::now();
        let ended = peer::try_connect(None, to, peer::PATIENCE)
            .and_then(|mut stream| peer::read(&mut stream, &mut [0; 16]));
        match ended {
            Err(error) if peer::is_reset(&error) => Ok(began.elapsed()),
            other => anyhow::bail!("expected a reset, got {other:?} after {:?}", began.elapsed()),
        }
    })?
}

/// Datagrams that come while the server is being asked wait for it.
fn first_flight(place: &Place) -> Result<()> {
    const BEHIND: u16 = 1081;
    let (lab, family) = (place.lab, place.family);
    let _dante = place.dante(BEHIND)?;
    // Before it a server that is slow to answer.
    let (namespace, behind) = (place.server.clone(), at(place.exit.ip(), BEHIND));
    let _slow = TcpServer::start(place.server, place.exit, move |stream, _| {
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
    let proxy = place.start("")?;
    let socket = peer::udp(place.client, at(family.unspecified(), 4000))?;
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

/// The first of a group dies under load: no new connection is lost, the open ones end at once and are
/// told, and it is used again once it is back.
fn failover(lab: &Lab, family: Family) -> Result<()> {
    const DOWNLOADS: usize = 100;
    // An interval and a time-out.
    const CHECKED: Duration = Duration::from_secs(2);
    needs_proxy()?;
    let second = at(family.server(), 1081);
    // By the port where it listens the servers tell through whom a connection comes.
    let external = Family::ALL.map(Family::server);
    let first = dante(lab, family)?;
    let _second = upstream::microsocks(lab, &lab.server, second, false)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let to = at(family.anywhere(9), 9);
    let _streams = TcpServer::start(&lab.server, to, |mut stream, _| {
        while stream.write_all(&[b'x'; 4096]).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    })?;
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
    let lines = |name: &str| -> Vec<Value> {
        let log = proxy.daemon.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["upstream"] == name).collect()
    };
    let ended_by = |name: &str| lines(name).len();
    get()?;
    wait_for("it is told", Duration::from_secs(1), || Ok((ended_by("one"), ended_by("two")) == (1, 0)))
        .with_context(|| proxy.daemon.describe())?;

    let downloads: Vec<TcpStream> = lab
        .client
        .try_enter(|| (0..DOWNLOADS).map(|_| peer::try_connect(None, to, peer::PATIENCE)).collect())?;
    let (arrived, last) = read_until(&downloads, || {
        let began = Instant::now();
        drop(first);
        get().with_context(|| proxy.daemon.describe())?;
        ensure!(began.elapsed() < patience(CHECKED), "a new connection takes {:?}", began.elapsed());
        Ok(())
    })?;
    ensure!(last < patience(Duration::from_secs(2)), "the last download ended after {last:?}");
    let clients = downloads.iter().map(TcpStream::local_addr).collect::<std::io::Result<Vec<_>>>()?;
    drop(downloads);
    wait_for("all downloads are told", Duration::from_secs(5), || Ok(ended_by("one") > DOWNLOADS))?;
    for (client, arrived) in clients.iter().zip(arrived) {
        let told: Vec<Value> =
            lines("one").into_iter().filter(|line| line["client"] == client.to_string()).collect();
        let [line] = &told[..] else { bail!("one download is told {} times: {told:?}", told.len()) };
        let end = line["end"].as_str().unwrap_or_default();
        ensure!(["closed", "upstream-reset"].contains(&end), "{line}");
        ensure!(line["destination"] == to.to_string(), "{line}");
        ensure!(line["bytes_down"].as_u64() >= Some(arrived), "{line}");
    }
    for _ in 0..9 {
        get().with_context(|| proxy.daemon.describe())?;
    }
    wait_for("ten by the second", Duration::from_secs(1), || Ok(ended_by("two") == 10))
        .with_context(|| proxy.daemon.describe())?;
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
    wait_for("it is used again", Duration::from_secs(1), || Ok(ended_by("one") > before))
        .with_context(|| proxy.daemon.describe())
}

/// Reads all streams while bytes come by each, then does what ends them (as does dropping it); how many bytes came,
/// and how long the last went on.
fn read_until(streams: &[TcpStream], end: impl FnOnce() -> Result<()>) -> Result<(Vec<u64>, Duration)> {
    let counts: Vec<_> = streams.iter().map(|_| AtomicU64::new(0)).collect();
    let arrived = || -> Vec<u64> { counts.iter().map(|count| count.load(Ordering::Relaxed)).collect() };
    let last = std::thread::scope(|scope| -> Result<Duration> {
        // Here, so that it is dropped whatever goes wrong, before the readers are waited for.
        let end = end;
        let readers: Vec<_> = streams
            .iter()
            .zip(&counts)
            .map(|(mut stream, count)| {
                scope.spawn(move || {
                    let mut buffer = vec![0; 1 << 14];
                    while let Ok(length @ 1..) = peer::read(&mut stream, &mut buffer) {
                        count.fetch_add(length as u64, Ordering::Relaxed);
                    }
                    Instant::now()
                })
            })
            .collect();
        for _ in 0..3 {
            let before = arrived();
            wait_for("bytes by each stream", Duration::from_secs(5), || {
                Ok(arrived().iter().zip(&before).all(|(now, before)| now > before))
            })?;
        }
        let began = Instant::now();
        end()?;
        let ended = readers.into_iter().map(|reader| reader.join().expect("no panic"));
        Ok(ended.max().map_or(Duration::ZERO, |ended| ended.duration_since(began)))
    })?;
    Ok((arrived(), last))
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

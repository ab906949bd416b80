//! A proxy server on the proxy's own host, where `--own-traffic` captures what that sends as well.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::proxy::Proxy;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Family, Lab, Namespace, server, upstream, url};

use super::PORT;
use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("H10_socks5_server_on_this_host", captured),
    ("H10_own_traffic_by_a_server_on_this_host", |lab, family| {
        own(lab, family, dante(lab, family)?, BY_USER)
    }),
    ("H10_own_traffic_by_a_server_of_a_group_on_this_host", |lab, family| {
        own(lab, family, upstream::v2ray_of(lab, &lab.router, exit(family), GROUP, &[])?, BY_GROUP)
    }),
    ("H10_loop_through_a_server_on_this_host", connections_loop),
    ("H10_datagrams_loop_through_a_server_on_this_host", datagrams_loop),
    ("H10_the_proxys_own_port_with_a_server_on_this_host", own_port),
];

/// Whom the server's connections belong to, and rules that let them pass.
pub(super) const USER: &str = "nobody";
pub(super) const BY_USER: &str = "[[rule]]\nuid = 'nobody'\naction = 'pass'\n";
const GROUP: &str = "nogroup";
const BY_GROUP: &str = "[[rule]]\ngid = 'nogroup'\naction = 'pass'\n";

const OWN: &str = "--iface lan --own-traffic";

/// Where the server listens. From there dante sends as well.
pub(super) fn exit(family: Family) -> SocketAddr {
    at(family.uplink(), PORT)
}

fn dante(lab: &Lab, family: Family) -> Result<Daemon> {
    upstream::dante_of(lab, &lab.router, exit(family), Family::ALL.map(Family::uplink), USER)
}

fn config(family: Family, rules: &str) -> String {
    format!(
        "[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = 'socks5://{}'\n{rules}",
        exit(family)
    )
}

/// What is asked, on the server.
struct Asked {
    _web: Daemon,
    _dns: Daemon,
    _reflector: UdpServer,
}

impl Asked {
    fn start(lab: &Lab, family: Family) -> Result<Self> {
        Ok(Self {
            _web: server::web(lab, &lab.server, &[80])?,
            _dns: server::dns(lab, &lab.server, [Family::V4.anywhere(80), Family::V6.anywhere(80)])?,
            _reflector: UdpServer::reflector(&lab.server, at(family.anywhere(7), 7))?,
        })
    }
}

/// TCP, UDP and DNS of a client get through: to the server once, and from the proxy server.
fn expect_through(family: Family, proxy: &Proxy, client: &Namespace) -> Result<()> {
    let exit = family.uplink().to_string();
    let before = proxy.counter("tcp_connections")?;
    let page = curl(client, family).check()?.stdout;
    ensure!(page.starts_with(&format!("{exit} ")), "the web server sees {page:?}");
    let connections = proxy.counter("tcp_connections")? - before;
    ensure!(connections == 1, "one connection became {connections}");
    let got = server::dig(client, family.anywhere(53), family, Protocol::Udp)?;
    ensure!(got == family.anywhere(80), "the answer is {got}");
    let socket = peer::udp(client, at(family.unspecified(), 0))?;
    let mut seen = Vec::new();
    for _ in 0..10 {
        let (told, from) = peer::exchange(&socket, at(family.anywhere(7), 7), b"who am I?")?;
        ensure!(from == at(family.anywhere(7), 7), "{from} answers");
        seen.push(String::from_utf8(told)?.parse::<SocketAddr>()?);
    }
    ensure!(
        seen[0].ip() == family.uplink() && seen.iter().all(|one| one == &seen[0]),
        "it is seen as {seen:?}"
    );

    let to = [at(family.anywhere(80), 80), at(family.anywhere(53), 53), at(family.anywhere(7), 7)];
    let flows = proxy.flows()?;
    for to in to.map(|to| to.to_string()) {
        let by_exit =
            |flow: &&xtask::lab::proxy::FlowRecord| flow.action == "proxy" && flow.upstream == "exit";
        let proxied = flows.iter().filter(|flow| flow.destination == to).filter(by_exit).count();
        ensure!(proxied >= 1, "nothing went to {to} through the server: {flows:#?}");
    }
    Ok(())
}

fn curl(client: &Namespace, family: Family) -> xtask::lab::Cmd {
    client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &url(family.anywhere(80), 80, "/")])
}

/// Without `--own-traffic` no rule is needed.
fn captured(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _asked = Asked::start(lab, family)?;
    let proxy = ConfigFile::new(lab, &config(family, ""))?.launch(lab, "--iface lan").start()?;
    expect_through(family, &proxy, &lab.client)
}

/// With it, what a rule lets the server send passes, and all else goes through the server.
fn own(lab: &Lab, family: Family, _exit: Daemon, rule: &str) -> Result<()> {
    needs_proxy()?;
    let _asked = Asked::start(lab, family)?;
    let proxy = ConfigFile::new(lab, &config(family, rule))?.launch(lab, OWN).start()?;
    for client in [&lab.router, &lab.client] {
        expect_through(family, &proxy, client)
            .with_context(|| format!("from the {}; {}", client.role(), proxy.daemon.describe()))?;
    }
    let passed = proxy.flows()?.into_iter().filter(|flow| flow.action == "pass" && flow.rule == 1).count();
    ensure!(
        passed >= 6,
        "the server's own flows are not those that the rule lets pass: {:#?}",
        proxy.flows()?
    );
    Ok(())
}

/// As many as one client may have at one time.
const SHARE: u64 = 30;

/// Without a rule each connection of the server comes back to it, until this host has its share: all of them end
/// with that, it is counted, and a rule puts an end to it.
fn connections_loop(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _asked = Asked::start(lab, family)?;
    let file = ConfigFile::new(lab, &config(family, ""))?;
    let proxy = file.launch(lab, &format!("{OWN} --max-per-client {SHARE}")).start()?;
    for (number, client) in (1..).zip([&lab.client, &lab.router]) {
        let failed = curl(client, family).run()?;
        ensure!(!failed.status.success(), "it got through: {}", failed.describe());
        ensure!(failed.elapsed < patience(Duration::from_secs(5)), "it hangs: {}", failed.describe());
        let refused = proxy.counter("client_limit_tcp")?;
        ensure!(refused >= number, "the loop's end is not counted: {refused}");
        wait_for("the end of the loop", Duration::from_secs(5), || connections(&proxy, "tcp", 0))?;
    }
    // A client's own, and what the host may have.
    let made = proxy.counter("tcp_connections")?;
    ensure!(made <= 2 * (SHARE + 1), "two loops of {made} connections");
    expect_mended(lab, family, &file, &proxy)
}

/// The same of datagrams.
fn datagrams_loop(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _asked = Asked::start(lab, family)?;
    let file = ConfigFile::new(lab, &config(family, ""))?;
    // Not so short that on a slow machine the first flows are over before the last begin.
    let unreplied = format!("--udp-timeout-unreplied {}s", pace::seconds(1));
    let proxy = file.launch(lab, &format!("{OWN} --max-per-client {SHARE} {unreplied}")).start()?;
    let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
    socket.send_to(b"who am I?", at(family.anywhere(7), 7))?;
    wait_for("the host has its share", Duration::from_secs(5), || {
        Ok(proxy.counter("client_limit_udp")? >= 1)
    })?;
    let most = proxy.status()?["connections"]["udp"].as_u64();
    ensure!(most <= Some(SHARE + 1), "{most:?} flows");
    wait_for("the end of the loop", Duration::from_secs(10), || connections(&proxy, "udp", 0))?;
    expect_mended(lab, family, &file, &proxy)
}

/// The loop is over, and once a rule lets the server's traffic pass all get through.
fn expect_mended(lab: &Lab, family: Family, file: &ConfigFile, proxy: &Proxy) -> Result<()> {
    expect_calm(proxy)?;
    file.write(&config(family, BY_USER))?;
    proxy.cmd("reload")?.check()?;
    for client in [&lab.router, &lab.client] {
        expect_through(family, proxy, client)?;
    }
    Ok(())
}

fn connections(proxy: &Proxy, protocol: &str, number: u64) -> Result<bool> {
    Ok(proxy.status()?["connections"][protocol] == number)
}

/// Nothing goes round any more.
fn expect_calm(proxy: &Proxy) -> Result<()> {
    let used = proxy.daemon.cpu_time()?;
    thread::sleep(Duration::from_secs(1));
    let idle = proxy.daemon.cpu_time()?.saturating_sub(used);
    ensure!(
        idle < patience(Duration::from_millis(200)).min(Duration::from_millis(700)),
        "it uses {idle:?} a second"
    );
    Ok(())
}

/// Who asks for the proxy's own port, by the server or directly, is refused at once, as without a server.
fn own_port(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _asked = Asked::start(lab, family)?;
    let proxy = ConfigFile::new(lab, &config(family, BY_USER))?.launch(lab, OWN).start()?;
    let page = url(family.loopback(), 15_001, "/");
    let by = format!("socks5://{}", exit(family));
    let curl = |client: &Namespace| client.cmd("curl").args(["-sS", "-m", &pace::seconds(5)]);
    for (number, curl) in (1..).zip([curl(&lab.router), curl(&lab.client).args(["--proxy", &by])]) {
        let asked = curl.arg(&page).run()?;
        let (connections, refused) = (proxy.counter("tcp_connections")?, proxy.counter("loops_prevented")?);
        ensure!(
            !asked.status.success() && asked.elapsed < patience(Duration::from_secs(2)),
            "it is not refused: {}; there were {connections} connections",
            asked.describe()
        );
        ensure!((connections, refused) == (0, number), "{connections} connections, {refused} refused");
    }
    let to = at(family.loopback(), 15_001);
    peer::udp(&lab.router, at(family.loopback(), 4000))?.send_to(b"hello", to)?;
    wait_for("the datagram is refused", Duration::from_secs(2), || {
        Ok(proxy.counter("loops_prevented")? == 3)
    })?;
    expect_through(family, &proxy, &lab.client)
}

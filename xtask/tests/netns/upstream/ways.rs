//! Which flows go through which server, and how it is asked.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::proxy::Launch;
use xtask::lab::sockets::Protocol;
use xtask::lab::upstream::{self, USER};
use xtask::lab::{Family, Lab, server, url};

use super::{PORT, dante, exit, through};
use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("socks5_by_rule_and_reload", by_rule),
    ("socks5_with_faithful_handshakes", faithful),
    ("socks5_of_own_traffic", own_traffic),
    ("socks5_password_in_a_url_is_hidden", url_with_password),
    ("socks5_pipelined_by_dante", pipelined),
    ("upstream_password_file_is_watched", watched_password),
    ("upstream_behind_another", chain),
    ("upstream_behind_rules_of_others_and_reload", behind_rules),
    ("udp_that_the_upstream_does_not_carry", without_udp),
];

/// For both families at once.
pub(super) const ONCE: Scenarios =
    &[("socks5_server_by_name_on_this_host", by_name), ("upstream_is_asked_by_name", asked_by_name)];

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
            peer::try_connect(None, to, peer::PATIENCE)
                .and_then(|mut stream| peer::read(&mut stream, &mut [0; 1]))
        })?;
        ensure!(ended.is_err(), "{last}: a port where nobody listens answers");
        let socket = peer::udp(&lab.client, at(family.client(), 4000))?;
        socket.connect(at(family.anywhere(7), 7))?;
        socket.send(b"x")?;
        let refused = peer::receive(&socket, &mut [0; 16]).err().map(|error| error.kind());
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

/// A password that is mended in its file is used at once, where files are watched.
fn watched_password(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _exit = upstream::microsocks(lab, &lab.server, exit(family), true)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let password = lab.dir().join("password");
    fs::write(&password, "not it")?;
    let config = format!(
        "watch = true\n[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = 'socks5://{}'\n\
         username = '{}'\npassword_file = 'password'\n",
        exit(family),
        USER.0
    );
    let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
    let page = url(family.anywhere(80), 80, "/");
    let page = || lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).run();
    ensure!(page()?.code() != 0, "it gets through with a wrong password");
    fs::write(&password, USER.1)?;
    wait_for("the password to be used", Duration::from_secs(4), || Ok(page()?.code() == 0))
        .with_context(|| proxy.daemon.describe())?;
    ensure!(!proxy.daemon.log().contains(USER.1), "the password is told: {}", proxy.daemon.log());
    Ok(())
}

/// With `--steer none` a reload exchanges the upstream as well.
fn behind_rules(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _dante = dante(lab, family)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let (tables, ip, all) = (
        family.pick("iptables", "ip6tables"),
        family.pick("ip -4", "ip -6"),
        family.pick("0.0.0.0/0", "::/0"),
    );
    for command in [
        format!(
            "{tables} -t mangle -A PREROUTING -i lan -p tcp -j TPROXY --on-port 15001 --tproxy-mark 0x1/0x1"
        ),
        format!("{ip} rule add fwmark 1 lookup 100"),
        format!("{ip} route add local {all} dev lo table 100"),
    ] {
        lab.router.sh(&command)?;
    }
    let config =
        |upstream: &str| format!("[steer]\nby = 'none'\n[source]\nmode = 'proxy'\nupstream = '{upstream}'\n");
    let file = ConfigFile::new(lab, &config("direct"))?;
    let proxy = file.launch(lab, "").start()?;
    let page = url(family.anywhere(80), 80, "/");
    let source = || -> Result<String> {
        let page = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?;
        Ok(page.stdout.split(' ').next().unwrap_or_default().to_owned())
    };
    let seen = source()?;
    ensure!(seen == family.uplink().to_string(), "straight the server sees {seen}");
    file.write(&config(&format!("socks5://{}", exit(family))))?;
    proxy.cmd("reload")?.check()?;
    let seen = source()?;
    ensure!(seen == family.server().to_string(), "after the reload the server sees {seen}");
    Ok(())
}

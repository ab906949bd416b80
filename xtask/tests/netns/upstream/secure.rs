//! Through proxy servers that are spoken to inside TLS.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use xtask::lab::pace;
use xtask::lab::peer::{self, TcpServer};
use xtask::lab::proxy::{AUTHORITIES, Launch};
use xtask::lab::upstream;
use xtask::lab::{Family, Lab, server, url};

use super::{HTTP, Kind, carries_tcp, exit};
use crate::common::{Scenarios, at, needs_proxy};
use crate::policy::ConfigFile;

pub(super) const SCENARIOS: Scenarios = &[
    ("https_tcp_by_squid", |lab, family| {
        let pem = certified(lab, &[&family.server().to_string()])?;
        let squid = upstream::squid(lab, &lab.server, exit(family), Some(&pem))?;
        carries_tcp(lab, family, &squid, HTTPS)
    }),
    ("https_tcp_by_haproxy_and_tinyproxy", |lab, family| {
        let (pem, behind) = (certified(lab, &[&family.server().to_string()])?, at(family.server(), 1081));
        let _tinyproxy = upstream::tinyproxy(lab, &lab.server, behind, false)?;
        let haproxy = upstream::haproxy_with_tls(lab, &lab.server, exit(family), &pem, behind)?;
        carries_tcp(lab, family, &haproxy, HTTPS)
    }),
    ("https_server_proves_who_it_is", proves),
    ("https_in_chains", chains),
    ("F8_https_server_fails", fails),
];

const HTTPS: Kind = Kind { scheme: "https", ..HTTP };

/// Makes an authority, whom the system trusts from now on, and a certificate of it for these
/// names and addresses; the file that has it with its key.
pub(super) fn certified(lab: &Lab, names: &[&str]) -> Result<PathBuf> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new([])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, format!("for {names:?}"));
    fs::write(lab.dir().join(AUTHORITIES), params.self_signed(&key)?.pem())?;
    let authority = Issuer::new(params, key);
    let own = KeyPair::generate()?;
    let params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let certificate = params.signed_by(&own, &authority)?;
    let path = lab.dir().join("server.pem");
    fs::write(&path, certificate.pem() + &own.serialize_pem())?;
    Ok(path)
}

/// A page by curl from the client; its error where there is none.
fn page(lab: &Lab, to: IpAddr) -> Result<String> {
    let page = url(to, 80, "/");
    Ok(lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10), &page]).check()?.stdout)
}

/// Only a server that has the right certificate gets to know where its clients go; the log says
/// what is wrong with others.
fn proves(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let pem = certified(lab, &["exit.example.org"])?;
    fs::rename(lab.dir().join(AUTHORITIES), lab.dir().join("ca.pem"))?;
    let behind = at(family.server(), 1081);
    let tinyproxy = upstream::tinyproxy(lab, &lab.server, behind, false)?;
    let _haproxy = upstream::haproxy_with_tls(lab, &lab.server, exit(family), &pem, behind)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    // Whom the system trusts has nothing to do with it.
    certified(lab, &["nobody"])?;
    let url = format!("https://{}", exit(family));
    for (keys, reason) in [
        ("ca_file = 'ca.pem'\nserver_name = 'exit.example.org'\n", None),
        ("ca_file = 'ca.pem'\n", Some("not valid for name")),
        (
            "ca_file = 'ca.pem'\nserver_name = 'other.example.org'\n",
            Some("not valid for name \"other.example.org\""),
        ),
        ("server_name = 'exit.example.org'\n", Some("signed by nobody who is trusted")),
    ] {
        let config =
            format!("[source]\nupstream = 'exit'\n[[upstream]]\nname = 'exit'\nurl = '{url}'\n{keys}");
        let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
        let asked = tinyproxy.log().matches("CONNECT").count();
        let got = page(lab, family.anywhere(80));
        let Some(reason) = reason else {
            let page = got.with_context(|| proxy.daemon.describe())?;
            ensure!(page.contains(&format!(" {} 80", family.anywhere(80))), "{page:?}");
            ensure!(tinyproxy.log().matches("CONNECT").count() > asked, "another server was asked");
            continue;
        };
        ensure!(got.is_err(), "{keys}: it gets through");
        ensure!(proxy.daemon.log().contains(reason), "not told: {reason}; {}", proxy.daemon.describe());
        ensure!(proxy.counter("connect_proxy_failed")? > 0, "not counted");
        ensure!(
            tinyproxy.log().matches("CONNECT").count() == asked,
            "a server that proved nothing was asked"
        );
    }
    // Where the system trusts nobody, that is told before anything is captured.
    fs::remove_file(lab.dir().join(AUTHORITIES))?;
    let launch = Launch::new(lab, &format!("--iface lan --upstream {url}")).command()?.run()?;
    ensure!(launch.code() == 2, "{}", launch.describe());
    ensure!(launch.stderr.contains("no certificates of authorities"), "{}", launch.describe());
    Ok(())
}

/// A server inside TLS is reached through others, also inside TLS, and others through it.
fn chains(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let pem = certified(lab, &[&family.server().to_string()])?;
    let [plain, socks5] = [1081, 1082].map(|port| at(family.server(), port));
    let tinyproxy = upstream::tinyproxy(lab, &lab.server, plain, false)?;
    let _microsocks = upstream::microsocks(lab, &lab.server, socks5, false)?;
    let _haproxy = upstream::haproxy_with_tls(lab, &lab.server, exit(family), &pem, plain)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    let (secure, socks5) = (format!("https://{}", exit(family)), format!("socks5://{socks5}"));
    for (first, second) in [(&secure, &socks5), (&socks5, &secure), (&secure, &secure)] {
        let config = format!(
            "[source]\nupstream = 'far'\n[[upstream]]\nname = 'near'\nurl = '{first}'\n\
             [[upstream]]\nname = 'far'\nurl = '{second}'\nvia = 'near'\n"
        );
        let proxy = ConfigFile::new(lab, &config)?.launch(lab, "--iface lan").start()?;
        let asked = tinyproxy.log().matches("CONNECT").count();
        let page = page(lab, family.anywhere(80)).with_context(|| proxy.daemon.describe())?;
        ensure!(page.contains(&format!(" {} 80", family.anywhere(80))), "{page:?}");
        let times = tinyproxy.log().matches("CONNECT").count() - asked;
        ensure!(times >= [first, second].iter().filter(|url| **url == &secure).count(), "{first}, {second}");
        proxy.terminate(Duration::from_secs(15))?;
    }
    Ok(())
}

/// A server that speaks no TLS, or breaks off.
fn fails(lab: &Lab, family: Family) -> Result<()> {
    const SAYS: [(&[u8], &str); 3] = [
        (b"", "it closes the connection instead of an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it does not speak TLS"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "TLS: received fatal alert: HandshakeFailure"),
    ];
    certified(lab, &["nobody"])?;
    for (answer, reason) in SAYS {
        let proxy = super::through(lab, family, "https", "--connect-timeout 3s")?;
        let _faulty = TcpServer::start(&lab.server, exit(family), move |mut stream, _| {
            use std::io::Write as _;
            // Its client may be gone.
            let _ = peer::read(&mut stream, &mut [0; 4096]).and_then(|_| stream.write_all(answer));
        })?;
        let took = super::failing::expect_reset(&lab.client, at(family.anywhere(80), 80))?;
        ensure!(took < pace::patience(Duration::from_secs(2)), "{reason}: it took {took:?}");
        ensure!(proxy.daemon.log().contains(reason), "not told: {reason}; {}", proxy.daemon.describe());
        ensure!(proxy.counter("connect_proxy_failed")? == 1, "{reason}: not counted");
        proxy.terminate(Duration::from_secs(15))?;
    }
    Ok(())
}

//! Real servers in a namespace: nginx, dnsmasq, iperf3, socat.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::command::Cmd;
use super::daemon::Daemon;
use super::namespace::Namespace;
use super::pace::seconds;
use super::sockets::Protocol;
use super::{Family, Lab};

/// The name that [`dns`] knows.
pub const NAME: &str = "service.example.test";

/// A web server on the given ports of every address. `/` tells what it sees:
/// the client's address and port, its own address and port. `/files/` holds
/// [`Lab::dir`]`/www`.
///
/// # Errors
/// Where it does not start.
pub fn web(lab: &Lab, namespace: &Namespace, ports: &[u16]) -> Result<Daemon> {
    start_web(lab, namespace, &with(ports, ""), "")
}

/// As [`web`], on other ports over TLS as well, where it speaks HTTP/2 too, with a certificate that nobody trusts.
///
/// # Errors
/// Where it does not start.
pub fn web_with_tls(lab: &Lab, namespace: &Namespace, ports: &[u16], tls: &[u16]) -> Result<Daemon> {
    web_with_http2(lab, namespace, ports, tls, &[])
}

/// As [`web_with_tls`], on other ports with HTTP/2 and nothing else, not encrypted.
///
/// # Errors
/// Where it does not start.
pub fn web_with_http2(
    lab: &Lab,
    namespace: &Namespace,
    ports: &[u16],
    tls: &[u16],
    http2: &[u16],
) -> Result<Daemon> {
    let dir = directory(lab, namespace)?;
    let [key, certificate, config] = ["key.pem", "certificate.pem", "openssl.cnf"].map(|name| dir.join(name));
    // Its own may not be there.
    fs::write(&config, "[req]\ndistinguished_name = name\n[name]\n")?;
    Cmd::host("openssl")
        .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"])
        .args(["-subj", "/CN=test", "-days", "1", "-config"])
        .arg(&config)
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .check()?;
    let (key, certificate) = (key.display(), certificate.display());
    let directives = format!("ssl_certificate {certificate}; ssl_certificate_key {key};");
    start_web(
        lab,
        namespace,
        &[with(ports, ""), with(tls, "ssl http2"), with(http2, "http2")].concat(),
        &directives,
    )
}

/// Where a web server's own files are.
fn directory(lab: &Lab, namespace: &Namespace) -> Result<PathBuf> {
    let dir = lab.dir().join(format!("nginx-{}", namespace.role()));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Ports with what nginx is to speak there.
fn with(ports: &[u16], protocol: &'static str) -> Vec<(u16, &'static str)> {
    ports.iter().map(|&port| (port, protocol)).collect()
}

fn start_web(lab: &Lab, namespace: &Namespace, ports: &[(u16, &str)], directives: &str) -> Result<Daemon> {
    let dir = directory(lab, namespace)?;
    fs::create_dir_all(lab.dir().join("www"))?;
    let listen: Vec<String> = ports
        .iter()
        .map(|(port, protocol)| {
            format!(
                "listen {port} {protocol} backlog=4096; listen [::]:{port} {protocol} backlog=4096 ipv6only=on;"
            )
        })
        .collect();
    let listen = listen.concat();
    let (here, www) = (dir.display(), lab.dir().display());
    let temporary = temporary_paths(&dir);
    let config = format!(
        "user root; worker_processes 1; error_log stderr; pid {here}/pid;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           {temporary}\
           log_format seen '$remote_addr $remote_port -> $server_addr $server_port \"$request\" $status $body_bytes_sent';\n\
           access_log /dev/stdout seen;\n\
           default_type application/octet-stream;\n\
           server {{\n\
             {listen} {directives}\n\
             location = / {{ default_type text/plain; return 200 \"$remote_addr $remote_port $server_addr $server_port\\n\"; }}\n\
             location /files/ {{ alias {www}/www/; }}\n\
           }}\n\
         }}\n"
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config)?;
    let command = namespace.cmd("nginx").arg("-p").arg(&dir).arg("-c").arg(&path).args([
        "-e",
        "stderr",
        "-g",
        "daemon off;",
    ]);
    let mut daemon = Daemon::start(lab, "nginx", &command)?;
    for (port, _) in ports {
        daemon.wait_bound(namespace, Protocol::Tcp, *port)?;
    }
    Ok(daemon)
}

/// Directives that keep what nginx puts aside below a directory.
pub(super) fn temporary_paths(dir: &Path) -> String {
    let dir = dir.display();
    ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {dir}/{kind};\n"))
        .concat()
}

/// A DNS server on port 53 of every address (`0.0.0.0` and `[::]`), that answers
/// for [`NAME`] with these addresses and logs each query with its client.
///
/// # Errors
/// Where it does not start.
pub fn dns(lab: &Lab, namespace: &Namespace, answers: [IpAddr; 2]) -> Result<Daemon> {
    start_dns(lab, namespace, 53, &[], answers)
}

/// As [`dns`], on another port and on the loopback addresses alone.
///
/// # Errors
/// Where it does not start.
pub fn local_dns(lab: &Lab, namespace: &Namespace, port: u16, answers: [IpAddr; 2]) -> Result<Daemon> {
    let local = ["--bind-interfaces", "--listen-address=127.0.0.1,::1"];
    start_dns(lab, namespace, port, &local, answers)
}

fn start_dns(
    lab: &Lab,
    namespace: &Namespace,
    port: u16,
    more: &[&str],
    answers: [IpAddr; 2],
) -> Result<Daemon> {
    let mut command = namespace.cmd("dnsmasq").args(more).arg(format!("--port={port}")).args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--local-ttl=300",
        "--user=root",
        "--pid-file=",
        "--log-queries=extra",
        "--log-facility=-",
    ]);
    for answer in answers {
        command = command.arg(format!("--address=/{NAME}/{answer}"));
    }
    let mut daemon = Daemon::start(lab, "dnsmasq", &command)?;
    daemon.wait_bound(namespace, Protocol::Udp, port)?;
    daemon.wait_bound(namespace, Protocol::Tcp, port)?;
    Ok(daemon)
}

/// `dig` for [`NAME`] at a server, from a namespace: the answer.
///
/// # Errors
/// Where no answer comes.
pub fn dig(from: &Namespace, at: IpAddr, family: Family, over: Protocol) -> Result<IpAddr> {
    let output = from
        .cmd("dig")
        .args([family.flag(), "+short", "+tries=2", "+time=2", "+nocookie", family.pick("A", "AAAA")])
        .arg(match over {
            Protocol::Tcp => "+tcp",
            Protocol::Udp => "+notcp",
        })
        .arg(format!("@{at}"))
        .arg(NAME)
        .check()?;
    output
        .stdout
        .trim()
        .parse()
        .map_err(|_| anyhow::anyhow!("the answer is no address, {}", output.describe()))
}

/// An iperf3 server.
///
/// # Errors
/// Where it does not start.
pub fn iperf(lab: &Lab, namespace: &Namespace, port: u16) -> Result<Daemon> {
    let command = namespace.cmd("iperf3").args(["--server", "--forceflush", "--port"]).arg(port.to_string());
    let mut daemon = Daemon::start(lab, "iperf3", &command)?;
    daemon.wait_bound(namespace, Protocol::Tcp, port)?;
    Ok(daemon)
}

/// A socat that serves each TCP connection to `port`, of one family, with a shell command.
///
/// # Errors
/// Where it does not start.
pub fn socat_tcp(lab: &Lab, namespace: &Namespace, family: Family, port: u16, shell: &str) -> Result<Daemon> {
    let listen = format!("{}:{port},fork,reuseaddr", family.pick("TCP4-LISTEN", "TCP6-LISTEN"));
    let command = namespace.cmd("socat").arg(listen).arg(format!("SYSTEM:{shell}"));
    let mut daemon = Daemon::start(lab, "socat", &command)?;
    daemon.wait_bound(namespace, Protocol::Tcp, port)?;
    Ok(daemon)
}

/// A socat that answers each datagram to one address and port with the output of a shell command.
///
/// # Errors
/// Where it does not start.
pub fn socat_udp(
    lab: &Lab,
    namespace: &Namespace,
    address: IpAddr,
    port: u16,
    shell: &str,
) -> Result<Daemon> {
    let listen = match address {
        IpAddr::V4(address) => format!("UDP4-RECVFROM:{port},bind={address},fork"),
        IpAddr::V6(address) => format!("UDP6-RECVFROM:{port},bind=[{address}],fork"),
    };
    // By itself socat gives the shell half a second once the datagram has ended.
    let wait = ["-t", &seconds(5)];
    let command = namespace.cmd("socat").args(wait).arg(listen).arg(format!("SYSTEM:{shell}"));
    let mut daemon = Daemon::start(lab, "socat", &command)?;
    daemon.wait_bound(namespace, Protocol::Udp, port)?;
    Ok(daemon)
}

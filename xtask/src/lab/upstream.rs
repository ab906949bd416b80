//! Real proxy servers in a namespace: dante, microsocks, shadowsocks, v2ray, tinyproxy, squid; and servers that are
//! told of the client by the PROXY protocol: nginx, `HAProxy`.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;

use super::Lab;
use super::daemon::Daemon;
use super::namespace::Namespace;
use super::server::temporary_paths;
use super::sockets::Protocol;

/// User and password that servers want, where they want one.
pub const USER: (&str, &str) = ("alice", "open-sesame");

/// A dante, which speaks SOCKS5 at this address, over TCP and UDP, and sends from `external`.
///
/// # Errors
/// Where it does not start.
pub fn dante(lab: &Lab, namespace: &Namespace, at: SocketAddr, external: [IpAddr; 2]) -> Result<Daemon> {
    dante_of(lab, namespace, at, external, "root")
}

/// As [`dante`], with connections that are a user's and its group's.
///
/// # Errors
/// Where it does not start.
pub fn dante_of(
    lab: &Lab,
    namespace: &Namespace,
    at: SocketAddr,
    external: [IpAddr; 2],
    user: &str,
) -> Result<Daemon> {
    let rules: String = ["0.0.0.0/0", "::/0"]
        .iter()
        .flat_map(|from| {
            let client = format!("client pass {{ from: {from} to: {from} }}\n");
            let socks = ["0.0.0.0/0", "::/0"].map(|to| format!("socks pass {{ from: {from} to: {to} }}\n"));
            [client].into_iter().chain(socks)
        })
        .collect();
    let [one, other] = external;
    let config = format!(
        "logoutput: stderr\ninternal: {} port = {}\nexternal: {one}\nexternal: {other}\nexternal.rotation: same-same\n\
         clientmethod: none\nsocksmethod: none\nuser.privileged: root\nuser.unprivileged: {user}\n{rules}",
        at.ip(),
        at.port()
    );
    let path = lab.dir().join("danted.conf");
    fs::write(&path, config)?;
    let command = namespace.cmd("danted").arg("-f").arg(&path).arg("-p").arg(lab.dir().join("danted.pid"));
    bound(Daemon::start(lab, "danted", &command)?, namespace, at)
}

/// A microsocks, which speaks SOCKS5 at this address, over TCP alone, with [`USER`] or without.
///
/// # Errors
/// Where it does not start.
pub fn microsocks(lab: &Lab, namespace: &Namespace, at: SocketAddr, with_user: bool) -> Result<Daemon> {
    let mut command =
        namespace.cmd("microsocks").args(["-i", &at.ip().to_string(), "-p", &at.port().to_string()]);
    if with_user {
        command = command.args(["-u", USER.0, "-P", USER.1]);
    }
    bound(Daemon::start(lab, "microsocks", &command)?, namespace, at)
}

/// A tinyproxy, which speaks HTTP at this address, with [`USER`] or without.
///
/// # Errors
/// Where it does not start.
pub fn tinyproxy(lab: &Lab, namespace: &Namespace, at: SocketAddr, with_user: bool) -> Result<Daemon> {
    let user = if with_user { format!("BasicAuth {} {}\n", USER.0, USER.1) } else { String::new() };
    let config = format!("Listen {}\nPort {}\nTimeout 600\nLogLevel Connect\n{user}", at.ip(), at.port());
    let path = lab.dir().join("tinyproxy.conf");
    fs::write(&path, config)?;
    let command = namespace.cmd("tinyproxy").arg("-d").arg("-c").arg(&path);
    bound(Daemon::start(lab, "tinyproxy", &command)?, namespace, at)
}

/// A squid, which speaks HTTP at this address; inside TLS where there is a file with its
/// certificate and key.
///
/// # Errors
/// Where it does not start.
pub fn squid(lab: &Lab, namespace: &Namespace, at: SocketAddr, pem: Option<&Path>) -> Result<Daemon> {
    let port = pem.map_or_else(
        || format!("http_port {at}"),
        |pem| format!("https_port {at} tls-cert={}", pem.display()),
    );
    let dir = lab.dir().join("squid");
    fs::create_dir_all(&dir)?;
    let here = dir.display();
    let config = format!(
        "{port}\nhttp_access allow all\ncache deny all\ncache_mem 8 MB\npid_filename none\n\
         access_log none\ncache_log /dev/null\ncoredump_dir {here}\ncache_effective_user proxy\n\
         shutdown_lifetime 1 seconds\npinger_enable off\nmax_filedescriptors 4096\nnetdb_filename none\nmemory_cache_shared off\ncollapsed_forwarding off\n"
    );
    let path = dir.join("squid.conf");
    fs::write(&path, config)?;
    // What it keeps in shared memory it leaves there.
    let start = "mount -t tmpfs none /dev/shm && exec squid \"$@\"";
    let command = namespace
        .cmd("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", start, "squid"])
        .args(["-N", "-d", "1", "-n", "lab", "-f"])
        .arg(&path);
    bound(Daemon::start(lab, "squid", &command)?, namespace, at)
}

fn bound(mut daemon: Daemon, namespace: &Namespace, at: SocketAddr) -> Result<Daemon> {
    daemon.wait_bound(namespace, Protocol::Tcp, at.port())?;
    Ok(daemon)
}

/// An nginx that expects the PROXY protocol at this address, and answers what that tells: the
/// client's address and port, the address and port that it asked for.
///
/// # Errors
/// Where it does not start.
pub fn nginx_that_is_told(lab: &Lab, namespace: &Namespace, at: SocketAddr) -> Result<Daemon> {
    let dir = lab.dir().join("nginx-told");
    fs::create_dir_all(&dir)?;
    let here = dir.display();
    let temporary = temporary_paths(&dir);
    let config = format!(
        "user root; worker_processes 1; error_log stderr; pid {here}/pid; events {{ worker_connections 64; }}\n\
         http {{ {temporary} access_log off; default_type text/plain; server {{ listen {at} proxy_protocol; location / {{\n\
         return 200 \"$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port\"; }} }} }}\n"
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config)?;
    let command = namespace.cmd("nginx").arg("-c").arg(&path).args(["-e", "stderr", "-g", "daemon off;"]);
    bound(Daemon::start(lab, "nginx-told", &command)?, namespace, at)
}

/// A `HAProxy` that expects the PROXY protocol at this address, and answers the same.
///
/// # Errors
/// Where it does not start.
pub fn haproxy_that_is_told(lab: &Lab, namespace: &Namespace, at: SocketAddr) -> Result<Daemon> {
    let config = format!(
        "defaults\n mode http\n timeout client 10s\n timeout connect 10s\n timeout server 10s\n\
         frontend told\n bind {at} accept-proxy\n\
         http-request return status 200 content-type text/plain lf-string \"%[src] %[src_port] %[dst] %[dst_port]\"\n"
    );
    let path = lab.dir().join("haproxy.cfg");
    fs::write(&path, config)?;
    let command = namespace.cmd("haproxy").arg("-db").arg("-f").arg(&path);
    bound(Daemon::start(lab, "haproxy", &command)?, namespace, at)
}

/// A `HAProxy` that is inside TLS, at this address, what another server is without.
///
/// # Errors
/// Where it does not start.
pub fn haproxy_with_tls(
    lab: &Lab,
    namespace: &Namespace,
    at: SocketAddr,
    pem: &Path,
    behind: SocketAddr,
) -> Result<Daemon> {
    let config = format!(
        "defaults\n mode tcp\n timeout client 60s\n timeout connect 10s\n timeout server 60s\n\
         frontend secure\n bind {at} ssl crt {}\n default_backend plain\n backend plain\n server one {behind}\n",
        pem.display()
    );
    let path = lab.dir().join("haproxy-tls.cfg");
    fs::write(&path, config)?;
    let command = namespace.cmd("haproxy").arg("-db").arg("-f").arg(&path);
    bound(Daemon::start(lab, "haproxy-tls", &command)?, namespace, at)
}

/// A shadowsocks client, which speaks SOCKS5 at this address over TCP and UDP, and its server.
///
/// # Errors
/// Where one of them does not start.
pub fn shadowsocks(lab: &Lab, namespace: &Namespace, at: SocketAddr) -> Result<[Daemon; 2]> {
    const SERVER_PORT: u16 = 8388;
    let common = ["-k", "secret", "-m", "aes-256-gcm", "-u", "-p", "8388", "-s"];
    let server = namespace.cmd("ss-server").args(common).arg(at.ip().to_string());
    let server =
        bound(Daemon::start(lab, "ss-server", &server)?, namespace, SocketAddr::new(at.ip(), SERVER_PORT))?;
    let (ip, port) = (at.ip().to_string(), at.port().to_string());
    let local = namespace.cmd("ss-local").args(common).args([&ip, "-b", &ip, "-l", &port]);
    Ok([server, bound(Daemon::start(lab, "ss-local", &local)?, namespace, at)?])
}

/// A v2ray, which speaks SOCKS5 at this address over TCP and UDP, and for which these names have
/// these addresses.
///
/// # Errors
/// Where it does not start.
pub fn v2ray(lab: &Lab, namespace: &Namespace, at: SocketAddr, hosts: &[(&str, IpAddr)]) -> Result<Daemon> {
    v2ray_of(lab, namespace, at, "root", hosts)
}

/// As [`v2ray`], by a process of this group.
///
/// # Errors
/// Where it does not start.
pub fn v2ray_of(
    lab: &Lab,
    namespace: &Namespace,
    at: SocketAddr,
    group: &str,
    hosts: &[(&str, IpAddr)],
) -> Result<Daemon> {
    let hosts: serde_json::Map<_, _> =
        hosts.iter().map(|(name, ip)| ((*name).to_owned(), ip.to_string().into())).collect();
    let config = serde_json::json!({
        "log": {"loglevel": "warning"},
        "inbounds": [{
            "protocol": "socks", "listen": at.ip(), "port": at.port(),
            "settings": {"auth": "noauth", "udp": true, "ip": at.ip()}
        }],
        "dns": {"hosts": hosts},
        "outbounds": [{"protocol": "freedom", "settings": {"domainStrategy": "UseIP"}}]
    });
    let path = lab.dir().join("v2ray.json");
    fs::write(&path, config.to_string())?;
    let group = ["--regid", group, "--clear-groups", "v2ray"];
    let command = namespace.cmd("setpriv").args(group).arg("-config").arg(&path);
    bound(Daemon::start(lab, "v2ray", &command)?, namespace, at)
}

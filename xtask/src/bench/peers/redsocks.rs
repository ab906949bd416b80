//! redsocks: it goes through a proxy server only, here one beside it.

use std::fs;
use std::net::SocketAddr;

use anyhow::Result;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Family, Lab, upstream};

use super::{PORT, Running, rules};
use crate::bench::limits;

pub(super) fn start(lab: &Lab) -> Result<Running> {
    rules::redirect(lab)?;
    let server = SocketAddr::new(Family::V4.loopback(), 1080);
    // microsocks would hold it back: in bulk it is a seventh as fast.
    let behind = upstream::v2ray(lab, &lab.router, server, &[])?;
    let config = format!(
        "base {{ log_debug = off; log_info = off; log = \"stderr\"; daemon = off; redirector = iptables;\n\
         redsocks_conn_max = {}; }}\n\
         redsocks {{ local_ip = 0.0.0.0; local_port = {PORT}; ip = {}; port = {}; type = socks5; listenq = 16384; }}\n",
        limits::piped_connections()?,
        server.ip(),
        server.port()
    );
    let path = lab.dir().join("redsocks.conf");
    fs::write(&path, config)?;
    let mut daemon = Daemon::start(lab, "redsocks", &lab.router.cmd("redsocks").arg("-c").arg(&path))?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running { behind: Some(behind), ..Running::of(daemon) })
}

//! `HAProxy`: a transparent listener, a server that is the original destination, as the client.

use std::fs;

use anyhow::Result;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Lab};

use super::{PORT, Running, rules};

pub(super) fn start(lab: &Lab) -> Result<Running> {
    rules::tproxy_tcp(lab)?;
    // By default it has a thread a core, and as many connections as it can have open. 0.0.0.0 is
    // the original destination, without a port its port.
    let config = format!(
        "defaults\n mode tcp\n option splice-auto\n\
         timeout connect 10s\n timeout client 1h\n timeout server 1h\n\
         listen original\n bind 0.0.0.0:{PORT} transparent backlog 16384\n\
         source 0.0.0.0 usesrc clientip\n server destination 0.0.0.0\n"
    );
    let path = lab.dir().join("haproxy.cfg");
    fs::write(&path, config)?;
    let command = lab.router.cmd("haproxy").arg("-db").arg("-f").arg(&path);
    let mut daemon = Daemon::start(lab, "haproxy", &command)?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running::of(daemon))
}

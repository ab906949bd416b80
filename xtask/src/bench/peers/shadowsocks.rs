//! shadowsocks-libev: ss-redir, and the server that it goes through, here one beside it.

use anyhow::Result;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Lab};

use super::{IDLE, PORT, Running, rules};

const SERVER_PORT: u16 = 8388;

pub(super) fn start(lab: &Lab) -> Result<Running> {
    rules::redirect(lab)?;
    rules::routes(lab)?;
    rules::tproxy_udp(lab, PORT)?;
    let (server, idle) = (SERVER_PORT.to_string(), IDLE.to_string());
    let common = ["-s", "127.0.0.1", "-p", &server, "-k", "secret", "-m", "aes-128-gcm", "-u", "-t", &idle];
    let common = |program| lab.router.cmd(program).args(common).arg("--no-delay");
    let mut behind = Daemon::start(lab, "ss-server", &common("ss-server"))?;
    behind.wait_bound(&lab.router, Protocol::Tcp, SERVER_PORT)?;
    let redir = common("ss-redir").args(["-b", "0.0.0.0", "-l", &PORT.to_string()]);
    let mut front = Daemon::start(lab, "ss-redir", &redir)?;
    front.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running { behind: Some(behind), ..Running::of(front) })
}

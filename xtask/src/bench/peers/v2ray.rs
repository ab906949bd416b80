//! v2ray: what it is handed goes to where it was going, as this host.

use std::fs;

use anyhow::Result;
use serde_json::json;
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Lab};

use super::{IDLE, PORT, Running, rules};

pub(super) fn start(lab: &Lab) -> Result<Running> {
    rules::tproxy(lab)?;
    let config = json!({
        "log": {"loglevel": "error"},
        "policy": {"levels": {"0": {"connIdle": IDLE}}},
        "inbounds": [{
            "protocol": "dokodemo-door", "listen": "0.0.0.0", "port": PORT,
            "settings": {"network": "tcp,udp", "followRedirect": true},
            "streamSettings": {"sockopt": {"tproxy": "tproxy"}}
        }],
        "outbounds": [{"protocol": "freedom"}]
    });
    let path = lab.dir().join("v2ray.json");
    fs::write(&path, config.to_string())?;
    let mut daemon = Daemon::start(lab, "v2ray", &lab.router.cmd("v2ray").arg("-config").arg(&path))?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    daemon.wait_bound(&lab.router, Protocol::Udp, PORT)?;
    Ok(Running::of(daemon))
}

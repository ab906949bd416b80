//! `tproxy-experiments`, with one of its movers: to where a client wanted to go, as this host.

use anyhow::{Context as _, Result};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Daemon, Lab};

use super::{PORT, Running, rules};
use crate::bench::arena::Programs;

pub(super) fn start(lab: &Lab, programs: &Programs, mover: &str) -> Result<Running> {
    let program = programs.experiments.as_ref().context("tproxy-experiments is not built")?;
    rules::tproxy_tcp(lab)?;
    let command = lab.router.cmd(program).arg("--mover").args(mover.split(' '));
    let command = command.args(["--port", &PORT.to_string()]);
    let mut daemon = Daemon::start(lab, "tproxy-experiments", &command)?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running::of(daemon))
}

//! `tproxy-experiments`.

use anyhow::{Context as _, Result};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Cmd, Daemon, Lab};

use super::{PORT, Running, rules};
use crate::bench::arena::Programs;

/// With one of its movers: to where a client wanted to go, as this host.
pub(super) fn relay(lab: &Lab, programs: &Programs, mover: &str) -> Result<Running> {
    rules::tproxy_tcp(lab)?;
    let command = command(lab, programs)?.args(["relay", "--mover"]).args(mover.split(' '));
    let command = command.args(["--port", &PORT.to_string()]);
    let mut daemon = Daemon::start(lab, "tproxy-experiments", &command)?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running::of(daemon))
}

/// New connections by the fewest system calls, or with a task for each.
pub(super) fn connections(lab: &Lab, programs: &Programs, how: &[&str]) -> Result<Running> {
    rules::tproxy_tcp(lab)?;
    let command = command(lab, programs)?.args(["connections", "--port", &PORT.to_string()]).args(how);
    let mut daemon = Daemon::start(lab, "tproxy-experiments", &command)?;
    daemon.wait_bound(&lab.router, Protocol::Tcp, PORT)?;
    Ok(Running::of(daemon))
}

/// UDP flows, with a socket for each and nothing else.
pub(super) fn flows(lab: &Lab, programs: &Programs) -> Result<Running> {
    rules::tproxy(lab)?;
    let command = command(lab, programs)?.args(["flows", "--port", &PORT.to_string()]);
    let mut daemon = Daemon::start(lab, "tproxy-experiments", &command)?;
    daemon.wait_bound(&lab.router, Protocol::Udp, PORT)?;
    Ok(Running::of(daemon))
}

/// Forwarding at TC, where the router itself forwards nothing.
pub(super) fn forward(lab: &Lab, programs: &Programs) -> Result<Running> {
    lab.router.set_sysctls(&[("net/ipv4/ip_forward", "0")])?;
    let command = command(lab, programs)?.args(["forward", "lan", "wan"]);
    let mut daemon = Daemon::start(lab, "tproxy-experiments", &command)?;
    daemon.wait_ready("its programs are attached", |daemon| Ok(daemon.log().contains("lan wan")))?;
    Ok(Running::of(daemon))
}

fn command(lab: &Lab, programs: &Programs) -> Result<Cmd> {
    Ok(lab.router.cmd(programs.experiments.as_ref().context("tproxy-experiments is not built")?))
}

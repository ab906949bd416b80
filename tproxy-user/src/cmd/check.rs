//! `check`: prints the plan and what would stop `run`; changes nothing.

use crate::config::{Config, Steer};
use crate::failure::Failure;
use crate::instance::{self, Paths};
use crate::interfaces::{self, Host};
use crate::output;
use crate::plan::Plan;
use crate::{netlink, owner, routing};

/// Prints the plan.
///
/// # Errors
/// What `run` would fail with, as far as it can be seen without privilege.
pub fn run(config: &Config, json: bool) -> anyhow::Result<()> {
    let (host, conflict) = super::runtime()?.block_on(look(config))?;
    let mut plan = Plan::new(config, &host)?;
    let paths = Paths::of(&config.pin);
    if let Some(pid) = paths.running()? {
        plan.warnings.push(format!("instance '{}' is running as pid {pid}", paths.name));
    }
    if json {
        output::print_json(&plan.to_json())?;
    } else {
        output::print(&plan.to_string())?;
        for warning in &plan.warnings {
            super::complain(&format!("warning: {warning}"));
        }
    }
    plan.require_interfaces(&host)?;
    match conflict.or_else(|| port_taken(config, &plan, &paths)) {
        Some(conflict) => Err(Failure::Conflict(conflict).into()),
        None => Ok(()),
    }
}

/// Who has a port that `run` needs, as far as it can be seen; the running
/// instance of this very configuration does not count.
fn port_taken(config: &Config, plan: &Plan, paths: &Paths) -> Option<String> {
    if config.steering.on_port == 0 || paths.running().ok().flatten().is_some() {
        return None;
    }
    plan.sockets.iter().find_map(|socket| {
        let protocol = if socket.protocol == "tcp" { owner::Protocol::Tcp } else { owner::Protocol::Udp };
        let owner = owner::of_port(protocol, socket.address)?;
        Some(format!(
            "cannot listen on {} {}: {owner} has it; choose another port with --on-port",
            socket.protocol, socket.address
        ))
    })
}

async fn look(config: &Config) -> anyhow::Result<(Host, Option<String>)> {
    let handle = netlink::connect()?;
    let (table, mark) = (config.steering.table, config.steering.mark);
    let host = interfaces::snapshot(&handle, table).await?;
    let conflict = match config.steering.by {
        Steer::None => None,
        Steer::Ebpf => match instance::claimed_by_another(&Paths::of(&config.pin), table, mark)? {
            Some(conflict) => Some(conflict),
            None => routing::conflict::find(&handle, table, mark).await?,
        },
    };
    Ok((host, conflict))
}

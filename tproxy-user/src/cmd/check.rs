//! `check`: prints the plan and what would stop `run`, what becomes of a packet, or what
//! differs from what runs; changes nothing.

use anyhow::Context as _;
use serde_json::json;
use similar::{Change, ChangeTag, TextDiff};

use crate::config::{Config, Steer};
use crate::failure::Failure;
use crate::instance::control::{self, Request};
use crate::instance::{self, Paths};
use crate::interfaces::{self, Host};
use crate::output;
use crate::plan::Plan;
use crate::policy::explain::explain;
use crate::policy::question::Question;
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

/// Prints what becomes of a packet.
///
/// # Errors
/// [`Failure::Usage`] where the question leaves something open.
pub fn packet(config: &Config, question: &Question, json: bool) -> anyhow::Result<()> {
    let (host, _) = super::runtime()?.block_on(look(config))?;
    let plan = Plan::new(config, &host)?;
    let answer =
        explain(&plan, question).map_err(|error| Failure::usage(format_args!("--packet: {error}")))?;
    if json {
        output::print_json(&answer)?;
    } else {
        let by = answer.rule.map_or_else(String::new, |rule| format!(" by rule {rule}"));
        let not =
            answer.not.iter().map(|miss| format!("  not rule {}: {} differs\n", miss.rule, miss.condition));
        let not: String = not.collect();
        output::print(&format!("{question}\n{}{by}: {}\n{not}", answer.action, answer.because))?;
    }
    Ok(())
}

/// Prints what differs from what runs, as `diff -u` does; nothing where nothing does.
///
/// # Errors
/// [`Failure::NotRunning`] (exit code 3) where none runs.
pub fn diff(config: &Config, json: bool) -> anyhow::Result<()> {
    let (host, _) = super::runtime()?.block_on(look(config))?;
    let plan = Plan::new(config, &host)?.to_string();
    let paths = Paths::of(&config.pin);
    if paths.running()?.is_none() {
        let pin = config.pin.display();
        return Err(Failure::NotRunning(format!("no proxy is running with --pin {pin}")).into());
    }
    let answer = control::ask(&paths.control(), Request::Plan).context("the proxy does not answer")?;
    let runs = answer["plan"].as_str().context("the proxy has another version")?;
    let diff = TextDiff::from_lines(runs, &plan);
    if json {
        let changed = diff.iter_all_changes().filter(|change| change.tag() != ChangeTag::Equal);
        let (new, old): (Vec<_>, Vec<_>) = changed.partition(|change| change.tag() == ChangeTag::Insert);
        let lines = |changes: Vec<Change<&str>>| -> Vec<String> {
            changes.iter().map(|change| change.value().trim().to_owned()).collect()
        };
        output::print_json(&json!({"removed": lines(old), "added": lines(new)}))?;
    } else {
        output::print(&diff.unified_diff().header("what runs", "this configuration").to_string())?;
    }
    Ok(())
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

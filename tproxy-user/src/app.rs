//! The composition root: configuration → running proxy → nothing left behind.

mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rtnetlink::Handle;
use tproxy_common::abi::ListenerKind;

use crate::config::{Config, Handshake, Steer};
use crate::failure::Failure;
use crate::instance::Instance;
use crate::instance::control;
use crate::listener::{self, BindError, WorkerListeners};
use crate::owner;
use crate::plan::Plan;
use crate::relay::{Routes, Shared};
use crate::reload::{Retry, Watched};
use crate::rulebook::Rulebook;
use crate::shutdown::{self, Controller, Signals};
use crate::stats::Stats;
use crate::steering::Steering;
use crate::tun::Tun;
use crate::worker::{self, WorkerError, WorkerHandle};
use crate::{interfaces, limits, memory, netlink, status, undo};
use upkeep::Upkeep;

/// Reads the configuration again; called on a thread of its own.
pub type Reread = fn() -> anyhow::Result<Config>;

/// Sets up, relays until a signal, drains, and undoes everything. `reread` is for
/// reloads; without, there are none.
///
/// # Errors
///
/// Where something cannot be set up, or undone; what can be undone is.
pub fn run(config: &Config, reread: Option<Reread>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // From here on a signal ends the run in an orderly way.
        let mut signals = Signals::new().context("cannot handle signals")?;
        let handle = netlink::connect()?;
        let mut instance = Instance::acquire(config)?;
        let outcome = serve(config, reread, &handle, &mut instance, &mut signals).await;
        let undone = undo::everything(instance.state(), &handle).await;
        tracing::debug!(removed = ?undone.done, "undone");
        let undone = undone.into_result().context("cannot undo everything; try: tproxy-user cleanup");
        if undone.is_ok() {
            instance.finish()?;
        }
        outcome.and(undone.map(drop))
    })
}

async fn serve(
    config: &Config,
    reread: Option<Reread>,
    handle: &Handle,
    instance: &mut Instance,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    // The configuration was read a moment ago.
    let watched = Watched::new(&config.files);
    reclaim(config, handle, instance).await?;
    let files = limits::raise_open_files().context("cannot raise the limit of open files")?;
    // Before the first look, so that no change between is missed.
    let mut watch = netlink::Watch::new().context("cannot watch for changes of the network")?;
    let host = interfaces::snapshot(handle, config.steering.table).await?;
    let plan = Plan::new(config, &host)?;
    plan.require_interfaces(&host)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }

    let listeners = listener::bind(config).map_err(name_the_owner)?;
    let stats = Arc::new(Stats::new(listeners.len()));
    let tun = match config.steering.handshake {
        Handshake::Faithful => Some(Tun::create(config.workers, handle).await?),
        Handshake::Eager => None,
    };
    let rulebook = Rulebook::default();
    rulebook.targets.hold(&config.upstream, std::iter::empty())?;
    let mut steering = match config.steering.by {
        Steer::Ebpf => {
            let parts = (&listeners[..], tun.as_ref());
            Some(Steering::prepare(config, &plan, parts, handle, instance, &stats, &rulebook).await?)
        }
        Steer::None => None,
    };
    let control = control::bind(&instance.paths().control()).context("cannot make the control socket")?;
    let addresses = addresses(&listeners);
    let targets = rulebook.targets.clone();
    let (controller, workers) = start_workers(config, listeners, tun, &stats, rulebook)?;
    // Last of all: from here on packets come.
    if let Some(steering) = &mut steering {
        steering.start(instance).await?;
    }
    announce(config, steering.as_ref(), files);
    // Loading takes megabytes, which nothing later needs.
    memory::give_back();

    let reporter = status::Reporter::new(config, instance, addresses, stats, targets);
    if let Some(steering) = &steering {
        reporter.note(steering);
    }
    let mut workers: FuturesUnordered<_> = workers.into_iter().map(WorkerHandle::finished).collect();
    let mut upkeep = Upkeep {
        config: config.clone(),
        reread,
        steering: &mut steering,
        instance,
        reporter,
        retry: Retry::default(),
    };
    let told = Box::pin(upkeep.until_a_signal(signals, &mut watch, control, watched));
    // A worker ends before that only by a fault of this program. Its share of
    // the clients would find nobody: rather start afresh.
    let died = tokio::select! {
        () = told => Ok(()),
        Some(worker) = workers.next() => worker,
    };
    let ended = end(config, steering, controller, workers, signals).await;
    died?;
    ended
}

/// Removes what a killed run of this instance left, but for what this run
/// takes over: its programs decide over new flows, and its rules deliver late
/// packets, until those of this run are there.
async fn reclaim(config: &Config, handle: &Handle, instance: &mut Instance) -> anyhow::Result<()> {
    let Some(leftover) = instance.leftover() else { return Ok(()) };
    let takes_over = config.steering.by == Steer::Ebpf
        && leftover.journal_netns == instance.state().netns
        && leftover.pin == config.pin;
    let mut journal = leftover.journal.clone();
    let mut routing = None;
    let report = if takes_over {
        routing = journal.routing.take_if(|claim| claim.table == config.steering.table);
        let mut report = undo::Report::default();
        undo::network(&journal, handle, &mut report).await;
        report
    } else {
        undo::everything(leftover, handle).await
    };
    for line in &report.done {
        tracing::info!("left by a killed run: {line}");
    }
    report.into_result().context("cannot remove what a killed run left")?;
    instance.forget_leftover(routing)?;
    Ok(())
}

/// Adds to "port taken" by whom.
fn name_the_owner(error: BindError) -> anyhow::Error {
    let BindError::Taken { protocol, addr, .. } = &error else { return error.into() };
    let kind = if *protocol == "TCP" { owner::Protocol::Tcp } else { owner::Protocol::Udp };
    match owner::of_port(kind, *addr) {
        Some(owner) => Failure::conflict(format_args!(
            "cannot listen on {protocol} {addr}: {owner} has it; choose another port with --on-port"
        ))
        .into(),
        None => error.into(),
    }
}

/// The listeners as `status` prints them.
fn addresses(listeners: &[WorkerListeners]) -> Vec<String> {
    let name = |kind| if matches!(kind, ListenerKind::Tcp4 | ListenerKind::Tcp6) { "tcp" } else { "udp" };
    listeners
        .iter()
        .flat_map(WorkerListeners::iter)
        .map(|listener| format!("{} {}", name(listener.kind), listener.addr))
        .collect()
}

fn start_workers(
    config: &Config,
    listeners: Vec<WorkerListeners>,
    tun: Option<Tun>,
    stats: &Arc<Stats>,
    rulebook: Rulebook,
) -> anyhow::Result<(Controller, Vec<WorkerHandle>)> {
    let (controller, shutdown) = shutdown::channel();
    let routes = match config.steering.by {
        Steer::Ebpf => Routes::new(&config.pin, rulebook).context("cannot read the flow table")?,
        Steer::None => Routes::by_default(rulebook),
    };
    let shared = Shared::new(config, &listeners, Arc::clone(stats), routes);
    let mut queues = tun.into_iter().flat_map(Tun::into_queues);
    let workers = listeners
        .into_iter()
        .enumerate()
        .map(|(index, listeners)| worker::spawn(index, listeners, queues.next(), &shared, shutdown.clone()))
        .collect::<Result<_, _>>()?;
    Ok((controller, workers))
}

fn announce(config: &Config, steering: Option<&Steering>, files: u64) {
    if let Some(steering) = steering {
        tracing::info!("ready: capturing on {}", steering.describe());
    } else {
        tracing::info!("ready: relaying what rules of yours send to port {}", config.steering.on_port);
    }
    tracing::debug!("up to {files} open files");
}

/// How long the listeners stay open once no SYN reaches them any more: clients
/// whose SYN was answered believe themselves connected, and their
/// acknowledgements are under way. The time after which TCP itself takes one for
/// lost (RFC 6298, section 2.1).
const HANDSHAKES: Duration = Duration::from_secs(1);

/// No new flows; what is there may finish until the drain time-out.
async fn end(
    config: &Config,
    mut steering: Option<Steering>,
    controller: Controller,
    mut workers: FuturesUnordered<impl Future<Output = Result<(), WorkerError>>>,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let mut patience = Duration::ZERO;
    // It stays until the workers are done: what they let in takes its way by its programs.
    if let Some(steering) = &mut steering {
        steering.stop()?;
        if config.capture.scope.tcp {
            patience = HANDSHAKES.min(config.timeouts.drain);
        }
    }
    tokio::select! {
        () = tokio::time::sleep(patience) => {}
        // One that asks for a reload asks for nothing any more.
        name = signals.end(true) => {
            tracing::info!("{name} again: stopping at once");
            controller.stop();
        }
    }
    let mut outcome = Ok(());
    let rest = config.timeouts.drain.saturating_sub(patience);
    controller.drain_then_stop(rest, signals, join(&mut workers, &mut outcome)).await;
    join(&mut workers, &mut outcome).await;
    outcome.map_err(Into::into)
}

/// Waits for all workers; keeps the first error.
async fn join(
    running: &mut FuturesUnordered<impl Future<Output = Result<(), WorkerError>>>,
    outcome: &mut Result<(), WorkerError>,
) {
    while let Some(worker) = running.next().await {
        if outcome.is_ok() {
            *outcome = worker;
        }
    }
}

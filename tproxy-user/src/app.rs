//! The composition root: configuration → running proxy → nothing left behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rtnetlink::Handle;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tproxy_common::abi::ListenerKind;

use crate::config::{Config, Handshake, SourceMode, Steer};
use crate::failure::Failure;
use crate::instance::Instance;
use crate::instance::control::{self, Request};
use crate::listener::{self, BindError, WorkerListeners};
use crate::owner;
use crate::plan::Plan;
use crate::relay::{Routes, Shared};
use crate::reload::{Reloaded, Retry, Watched};
use crate::rulebook::Rulebook;
use crate::shutdown::{self, Asked, Controller, Signals};
use crate::sockopt::OwnMark;
use crate::stats::Stats;
use crate::steering::Steering;
use crate::tun::Tun;
use crate::upstream::checks;
use crate::upstream::direct::Direct;
use crate::worker::{self, WorkerError, WorkerHandle};
use crate::{cmd, interfaces, limits, netlink, status, telemetry, undo};

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

/// After this a change of the network that could not be followed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// How often it is looked whether others have taken off what is ours. Netlink
/// tells at once of filters, rules and routes; of links that are detached and of
/// settings nobody does. New connections go past the proxy until it is noticed,
/// and a client repeats its SYN after a second; a look costs two system calls a
/// program (clsact: three dumps).
const CHECK: Duration = Duration::from_secs(1);

/// What goes on while the workers relay.
struct Upkeep<'a> {
    config: Config,
    reread: Option<Reread>,
    steering: &'a mut Option<Steering>,
    instance: &'a mut Instance,
    reporter: status::Reporter,
    retry: Retry,
}

impl Upkeep<'_> {
    /// Serves the control socket and follows the network and the configuration until a
    /// signal comes.
    async fn until_a_signal(
        &mut self,
        signals: &mut Signals,
        watch: &mut netlink::Watch,
        control: UnixListener,
        mut files: Watched,
    ) {
        let (asks, mut asked) = mpsc::channel(1);
        let reporter = self.reporter.clone();
        let answer = |request| {
            let (asks, reporter) = (asks.clone(), reporter.clone());
            async move {
                match request {
                    Request::Status => reporter.status(),
                    Request::Reload => reload_by(asks).await,
                    Request::Plan => reporter.plan(),
                }
            }
        };
        let direct = Direct {
            source: SourceMode::Proxy,
            mark: OwnMark(self.config.steering.own_mark),
            timeout: self.config.timeouts.connect,
        };
        let checks = checks::run(self.reporter.targets(), direct);
        let answers = control::serve(control, answer);
        // Beside each other: a reload does not keep waiting who asks what is going on.
        tokio::select! {
            () = self.follow_all(signals, watch, &mut asked, &mut files) => {}
            () = answers => {}
            never = checks => match never {},
        }
    }

    /// One thing after the other, until a signal comes that ends it.
    async fn follow_all(
        &mut self,
        signals: &mut Signals,
        watch: &mut netlink::Watch,
        asked: &mut mpsc::Receiver<oneshot::Sender<Value>>,
        files: &mut Watched,
    ) {
        let mut behind = false;
        let mut ticks = tokio::time::interval(CHECK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                signal = signals.next(self.reread.is_some()) => match signal {
                    Asked::End(name) => return tracing::info!("{name}: draining"),
                    Asked::Reload => drop(self.reload(files, false).await),
                },
                Some(reply) = asked.recv() => {
                    // Who asked may be gone.
                    drop(reply.send(self.reload(files, false).await));
                }
                () = watch.changed() => behind = self.follow(behind).await,
                () = tokio::time::sleep(AGAIN), if behind => behind = self.follow(behind).await,
                _ = ticks.tick() => {
                    if let Some(steering) = self.steering.as_mut().filter(|_| !behind) {
                        // What fails here fails in `follow` as well, which tells.
                        behind = steering.check(self.instance).await.is_err();
                    }
                    if self.config.watch {
                        let changed = files.changed();
                        if changed || self.retry.is_due(Instant::now()) {
                            self.reload(files, !changed).await;
                        }
                    }
                }
            }
        }
    }

    /// Follows a change of the network. Whether that is to be tried again; said once.
    async fn follow(&mut self, behind: bool) -> bool {
        let Some(steering) = self.steering.as_mut() else { return false };
        let followed = steering.follow(self.instance).await;
        if let Err(error) = &followed
            && !behind
        {
            tracing::warn!("cannot follow a change of the network, trying again: {error:#}");
        }
        self.reporter.note(steering);
        followed.is_err()
    }

    /// Reads the configuration again and takes what can change. What came of it. `again`: nobody
    /// asks for it, it has failed before.
    async fn reload(&mut self, files: &mut Watched, again: bool) -> Value {
        match self.try_reload(files).await {
            Ok(restart) => {
                self.retry.done();
                tracing::info!("reloaded: {} rules", self.config.capture.rules.len());
                for key in &restart {
                    tracing::warn!("{key} has changed, which a restart alone can follow");
                }
                json!({"rules": self.config.capture.rules.len(), "restart": restart})
            }
            Err(error) => {
                if self.retry.failed(&format!("{error:#}"), again, Instant::now()) {
                    tracing::error!("cannot reload, all stays as it is: {error:#}");
                }
                json!({"error": format!("{error:#}"), "exit_code": cmd::exit_code(&error)})
            }
        }
    }

    async fn try_reload(&mut self, files: &mut Watched) -> anyhow::Result<Vec<&'static str>> {
        let Some(reread) = self.reread else {
            return Err(
                Failure::usage("there is no config file to read again: it runs by its flags alone").into()
            );
        };
        let before = Watched::new(&self.config.files);
        // It may be a million networks.
        let read = tokio::task::spawn_blocking(reread).await??;
        let reloaded = Reloaded::new(&self.config, &read);
        let watched = before.joined(&reloaded.config.files);
        if let Some(steering) = self.steering.as_mut() {
            steering.reload(reloaded.config.clone(), self.instance).await?;
            self.reporter.note(steering);
        }
        telemetry::set_level(reloaded.config.log.level);
        self.config = reloaded.config;
        *files = watched;
        Ok(reloaded.restart)
    }
}

/// Has the proxy reload, and waits for what came of it.
async fn reload_by(asks: mpsc::Sender<oneshot::Sender<Value>>) -> Value {
    let (reply, answer) = oneshot::channel();
    if asks.send(reply).await.is_err() {
        return json!({"error": "the proxy is ending"});
    }
    answer.await.unwrap_or_else(|_| json!({"error": "the proxy is ending"}))
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

//! What goes on while the workers relay: the network changes, the configuration does, and somebody
//! asks.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::Reread;
use crate::config::{Config, SourceMode};
use crate::failure::Failure;
use crate::instance::Instance;
use crate::instance::control::{self, Request};
use crate::reload::{Reloaded, Retry, Watched};
use crate::shutdown::{Asked, Signals};
use crate::sockopt::OwnMark;
use crate::steering::Steering;
use crate::upstream::checks;
use crate::upstream::direct::Direct;
use crate::{cmd, netlink, status, telemetry};

/// After this a change of the network that could not be followed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// How often it is looked whether others have taken off what is ours. Netlink
/// tells at once of filters, rules and routes; of links that are detached and of
/// settings nobody does. New connections go past the proxy until it is noticed,
/// and a client repeats its SYN after a second; a look costs two system calls a
/// program (clsact: three dumps).
const CHECK: Duration = Duration::from_secs(1);

/// What goes on while the workers relay.
pub(super) struct Upkeep<'a> {
    pub(super) config: Config,
    pub(super) reread: Option<Reread>,
    pub(super) steering: &'a mut Option<Steering>,
    pub(super) instance: &'a mut Instance,
    pub(super) reporter: status::Reporter,
    pub(super) retry: Retry,
}

impl Upkeep<'_> {
    /// Serves the control socket and follows the network and the configuration until a
    /// signal comes.
    pub(super) async fn until_a_signal(
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
        } else {
            self.reporter.targets().hold(&reloaded.config.upstream, std::iter::empty())?;
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

//! Checks of proxy servers, one after the other for each, while the run lasts.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::direct::Direct;
use super::outbound::Outbound;
use crate::policy::targets::Targets;
use crate::stats::WorkerStats;

/// How often it is looked which checks are due.
const TICK: Duration = Duration::from_millis(250);

/// Checks those of the upstreams that are to be, also as they come by a reload. `direct` says by
/// which mark.
pub async fn run(targets: Targets, direct: Direct) -> Infallible {
    let stats = WorkerStats::default();
    let mut running = FuturesUnordered::new();
    let mut last: Vec<(Arc<Outbound>, Instant)> = Vec::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let used = targets.outbounds();
                last.retain(|(known, _)| used.iter().any(|outbound| Arc::ptr_eq(outbound, known)));
                for outbound in used {
                    let Some(check) = outbound.proxy().check else { continue };
                    let now = Instant::now();
                    match last.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &outbound)) {
                        Some((_, begun)) if now.duration_since(*begun) < check.interval.max(check.timeout) => continue,
                        Some((_, begun)) => *begun = now,
                        None => last.push((Arc::clone(&outbound), now)),
                    }
                    let (direct, stats) = (Direct { timeout: check.timeout, ..direct }, &stats);
                    running.push(async move { outbound.check(&check, &direct, stats).await });
                }
            }
            Some(()) = running.next() => {}
        }
    }
}

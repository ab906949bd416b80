//! Runs a case that keeps a number of exchanges under way.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::poller::Poller;

/// How often a case looks after what no event tells of.
const TICK: Duration = Duration::from_millis(10);

/// How long, after its time, a case waits for what is still under way.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// An exchange that ends is followed by another one until the case is to stop.
pub(crate) trait Case {
    fn poller(&self) -> &Poller;

    /// An event of what was added to the poller with this key.
    fn advance(&mut self, key: usize) -> Result<()>;

    /// Looks after what no event tells of.
    fn tick(&mut self, now: Instant) -> Result<()>;

    /// Begins nothing from now on.
    fn stop(&mut self);

    /// Exchanges that have begun, and have not ended.
    fn under_way(&self) -> usize;

    /// Exchanges that have worked.
    fn completed(&self) -> u64;

    /// Whether it has ended before its time.
    fn is_done(&self) -> bool {
        false
    }
}

/// What a case did in its time.
pub(crate) struct Done {
    pub(crate) completed: u64,
    pub(crate) elapsed: Duration,
}

/// Runs a case for this time. What is under way at the end may still complete: its times count,
/// as the longest are among them, but it is not `completed`.
pub(crate) fn drive(case: &mut impl Case, lasts: Duration) -> Result<Done> {
    let elapsed = until(case, lasts, Case::is_done)?;
    let completed = case.completed();
    case.stop();
    until(case, GRACE, |case| case.under_way() == 0)?;
    Ok(Done { completed, elapsed })
}

fn until<C: Case>(case: &mut C, limit: Duration, is_done: fn(&C) -> bool) -> Result<Duration> {
    let mut room = Poller::room();
    let started = Instant::now();
    let mut ticked = started;
    case.tick(started)?;
    loop {
        for key in case.poller().wait(&mut room, Some(TICK))? {
            case.advance(key)?;
        }
        let now = Instant::now();
        if is_done(case) || now - started >= limit {
            return Ok(now - started);
        }
        if now - ticked >= TICK {
            ticked = now;
            case.tick(now)?;
        }
    }
}

//! Runs a case that keeps a number of exchanges under way.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::poller::Poller;
use crate::report::{per_second, seconds};

/// How often a case looks after what no event tells of.
const TICK: Duration = Duration::from_millis(10);

/// How long, after its time, a case waits for what is still under way.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// The exchanges of a case: how many there are and were.
#[derive(Default)]
pub(crate) struct Exchanges {
    under_way: usize,
    completed: u64,
    stopped: bool,
}

impl Exchanges {
    /// One has begun.
    pub(crate) const fn begin(&mut self) {
        self.under_way += 1;
    }

    /// One has worked.
    pub(crate) const fn complete(&mut self) {
        self.under_way -= 1;
        self.completed += 1;
    }

    /// One has not.
    pub(crate) const fn fail(&mut self) {
        self.under_way -= 1;
    }

    /// Those that have begun, and have not ended.
    pub(crate) const fn under_way(&self) -> usize {
        self.under_way
    }

    /// Those that have worked.
    pub(crate) const fn completed(&self) -> u64 {
        self.completed
    }

    /// Whether none is to begin any more.
    pub(crate) const fn are_stopped(&self) -> bool {
        self.stopped
    }
}

/// An exchange that ends is followed by another one until they are to stop.
pub(crate) trait Case {
    fn poller(&self) -> &Poller;

    fn exchanges(&mut self) -> &mut Exchanges;

    /// An event of what was added to the poller with this key.
    fn advance(&mut self, key: usize) -> Result<()>;

    /// Looks after what no event tells of.
    fn tick(&mut self, now: Instant) -> Result<()>;

    /// Whether it has ended before its time.
    fn is_done(&mut self) -> bool {
        false
    }
}

/// What a case did in its time, as it is told.
#[derive(Serialize)]
pub(crate) struct Done {
    completed: u64,
    seconds: f64,
    per_second: f64,
}

/// Runs a case for this time. What is under way at the end may still complete: its times count,
/// as the longest are among them, but it is not `completed`.
pub(crate) fn drive(case: &mut impl Case, lasts: Duration) -> Result<Done> {
    let elapsed = until(case, lasts, Case::is_done)?;
    let completed = case.exchanges().completed;
    case.exchanges().stopped = true;
    until(case, GRACE, |case| case.exchanges().under_way == 0)?;
    Ok(Done { completed, seconds: seconds(elapsed), per_second: per_second(completed, elapsed) })
}

fn until<C: Case>(case: &mut C, limit: Duration, is_done: fn(&mut C) -> bool) -> Result<Duration> {
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

//! What this run has made, and when to put back what another program removed of
//! it: at once, and at growing intervals where it keeps removing it. Two programs
//! that each undo the other would else keep a core busy, and the traffic in
//! neither's hands.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::stats::{Stats, Value, WorkerStats};

/// From the first repair of a part to the second; doubled after each.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, at which a repair costs nothing that could be measured.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// A part that held for so long is as good as new.
const QUIET: Duration = Duration::from_mins(5);

/// The parts, each told by its name.
#[derive(Debug)]
pub(super) struct Upkeep {
    made: HashSet<String>,
    repairs: Repairs,
    /// A part is missing, and its time has not come.
    behind: bool,
    stats: Arc<Stats>,
}

/// Why a part is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is new.
    New,
    /// It was there.
    Repair(Repair),
}

impl Upkeep {
    pub(super) fn new(stats: Arc<Stats>) -> Self {
        Self { made: HashSet::new(), repairs: Repairs::default(), behind: false, stats }
    }

    /// Whether a part that is missing may be made at `now`, and what that is.
    pub(super) fn may_make(&mut self, part: &str, now: Instant) -> Option<Kind> {
        if !self.made.contains(part) {
            return Some(Kind::New);
        }
        let repair = self.repairs.admit(part, now);
        self.behind |= repair.is_none();
        repair.map(Kind::Repair)
    }

    /// Notes how that went. Only what is new and failed is an error: of a repair
    /// the log tells, and it is tried again.
    pub(super) fn made(
        &mut self,
        part: &str,
        kind: Kind,
        result: anyhow::Result<()>,
        counter: impl FnOnce(&WorkerStats) -> &Value,
    ) -> anyhow::Result<()> {
        match (kind, &result) {
            (Kind::New, Ok(())) => self.found(part),
            (Kind::New, Err(_)) => return result,
            (Kind::Repair(repair), outcome) => {
                repair.tell(part, outcome.as_ref().err());
                if outcome.is_ok() {
                    counter(self.stats.upkeep()).inc();
                }
            }
        }
        Ok(())
    }

    /// A part is there.
    pub(super) fn found(&mut self, part: &str) {
        self.made.insert(part.to_owned());
    }

    /// The programs of an interface, or another place, are no longer wanted, or went with it.
    pub(super) fn forget(&mut self, place: &str) {
        let at = format!(" at {place}");
        self.made.retain(|part| !part.ends_with(&at));
    }

    /// These are all rules and routes now, as commands of `ip`.
    pub(super) fn routing_is(&mut self, parts: impl Iterator<Item = String>) {
        self.made.retain(|part| !part.starts_with("ip "));
        self.made.extend(parts);
    }

    /// Whether a part waits to be put back.
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    /// All parts are looked through now.
    pub(super) fn caught_up(&mut self) {
        self.behind = false;
    }
}

/// The parts that were put back lately.
#[derive(Debug, Default)]
struct Repairs(HashMap<String, Episode>);

#[derive(Debug)]
struct Episode {
    latest: Instant,
    pause: Duration,
}

/// What to say of a repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repair {
    /// The part was removed for the first time.
    First,
    /// It was removed again: from now on this is not said any more.
    Again,
    /// It is still being removed.
    Still,
}

impl Repairs {
    /// Whether a part that is missing may be put back at `now`, and what to say
    /// of it. `None`: later.
    fn admit(&mut self, part: &str, now: Instant) -> Option<Repair> {
        self.0.retain(|_, episode| now.duration_since(episode.latest) < QUIET);
        let Some(episode) = self.0.get_mut(part) else {
            self.0.insert(part.to_owned(), Episode { latest: now, pause: FIRST_PAUSE });
            return Some(Repair::First);
        };
        if now.duration_since(episode.latest) < episode.pause {
            return None;
        }
        let again = episode.pause == FIRST_PAUSE;
        *episode = Episode { latest: now, pause: (episode.pause * 2).min(LONGEST_PAUSE) };
        Some(if again { Repair::Again } else { Repair::Still })
    }
}

impl Repair {
    /// Says it: one line for a part that was removed, one where it keeps being removed.
    fn tell(self, part: &str, error: Option<&anyhow::Error>) {
        let done =
            error.map_or_else(|| "put back".to_owned(), |error| format!("cannot put it back: {error:#}"));
        match self {
            Self::First => tracing::warn!("{part}: removed by another program; {done}"),
            Self::Again => tracing::warn!(
                "{part}: removed by another program again; {done}; from now on tried at growing intervals, \
                 up to {} s, without a word (`status` counts)",
                LONGEST_PAUSE.as_secs()
            ),
            Self::Still => tracing::debug!("{part}: removed by another program; {done}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_keeps_being_removed_is_put_back_ever_less_often() {
        let (mut repairs, start) = (Repairs::default(), Instant::now());
        let mut times = Vec::new();
        for tenth in 0..3000 {
            if let Some(repair) = repairs.admit("rule", start + Duration::from_millis(tenth * 100)) {
                times.push((tenth / 10, repair));
            }
        }
        let (seconds, said): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        assert_eq!(seconds, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]);
        assert_eq!(said[..3], [Repair::First, Repair::Again, Repair::Still]);
        assert!(said[3..].iter().all(|said| *said == Repair::Still));
    }

    #[test]
    fn parts_do_not_wait_for_each_other_and_are_forgotten() {
        let (mut repairs, start) = (Repairs::default(), Instant::now());
        assert_eq!(repairs.admit("rule", start), Some(Repair::First));
        assert_eq!(repairs.admit("route", start), Some(Repair::First));
        assert_eq!(repairs.admit("rule", start), None);
        assert_eq!(repairs.admit("rule", start + QUIET), Some(Repair::First));
        assert_eq!(repairs.0.len(), 1);
    }
}

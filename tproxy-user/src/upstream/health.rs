//! Whether a proxy server works: what checks and flows tell of it.

use std::sync::{Mutex, PoisonError};

use crate::config::upstream::Check;

/// What is known. It works until it is known not to.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

#[derive(Clone, Copy, Debug, Default)]
struct State {
    down: bool,
    /// Failures in a row, while it works.
    failures: u32,
    /// Checks in a row that went well, while it does not.
    successes: u32,
}

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It does not work any more.
    Down,
    /// It works again.
    Up,
}

impl Health {
    /// Whether it works.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !self.0.lock().unwrap_or_else(PoisonError::into_inner).down
    }

    /// A flow got through it, or did not. Without a `check` the latest flow is what counts.
    pub fn flow(&self, worked: bool, check: Option<&Check>) -> Option<Change> {
        self.note(worked, check.map_or(1, |check| check.fall), 1)
    }

    /// A check went well, or did not.
    pub fn check(&self, worked: bool, check: &Check) -> Option<Change> {
        self.note(worked, check.fall, check.rise)
    }

    fn note(&self, worked: bool, fall: u32, rise: u32) -> Option<Change> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (run, limit) = match (state.down, worked) {
            (false, false) => (&mut state.failures, fall),
            (true, true) => (&mut state.successes, rise),
            _ => {
                (state.failures, state.successes) = (0, 0);
                return None;
            }
        };
        *run += 1;
        if *run < limit {
            return None;
        }
        *state = State { down: !state.down, ..State::default() };
        Some(if state.down { Change::Down } else { Change::Up })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_falls_and_rises_after_so_many_in_a_row() {
        let (health, check) = (Health::default(), Check { fall: 3, rise: 2, ..Check::default() });
        let mut note = |worked| health.check(worked, &check);
        let told: Vec<_> = [false, false, true, false, false, false, false, true, false, true, true, false]
            .into_iter()
            .map(&mut note)
            .collect();
        let (down, up) = (Some(Change::Down), Some(Change::Up));
        assert_eq!(told, [None, None, None, None, None, down, None, None, None, None, up, None]);
        assert!(health.is_up());
    }

    #[test]
    fn a_flow_that_gets_through_is_proof() {
        let (health, check) = (Health::default(), Check { fall: 2, ..Check::default() });
        assert_eq!(health.flow(false, Some(&check)), None);
        assert_eq!(health.check(false, &check), Some(Change::Down));
        assert_eq!(health.flow(true, Some(&check)), Some(Change::Up));
        assert_eq!(health.flow(false, None), Some(Change::Down));
        assert_eq!(health.flow(true, None), Some(Change::Up));
    }
}

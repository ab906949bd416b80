//! The targets of diverted flows, by number.
//!
//! The kernel decides over a flow and notes the number; the relay, which asks for it
//! once there are rules, finds the target.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tproxy_common::abi::Decision;

/// Targets. A number means the same target for as long as the process lives, for
/// flows keep theirs when the rules change.
#[derive(Clone, Debug, Default)]
pub struct Targets(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    targets: RwLock<Vec<SocketAddr>>,
    rules: AtomicBool,
    bind: AtomicBool,
}

/// There have been more targets than there are numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {} targets since the start: start again", Decision::NUMBERS)]
pub struct TooManyTargets;

impl Targets {
    /// The number of a target.
    ///
    /// # Errors
    ///
    /// [`TooManyTargets`].
    pub fn number(&self, target: SocketAddr) -> Result<u16, TooManyTargets> {
        let mut targets = self.0.targets.write().unwrap_or_else(PoisonError::into_inner);
        let at = targets.iter().position(|known| *known == target).unwrap_or_else(|| {
            targets.push(target);
            targets.len() - 1
        });
        u16::try_from(at).ok().filter(|number| *number < Decision::NUMBERS).ok_or(TooManyTargets)
    }

    /// From now on some flow may have been decided over by a rule; if rules `bind`, one
    /// may not go to its destination.
    pub fn ask_for(&self, bind: bool) {
        self.0.rules.store(true, Ordering::Relaxed);
        self.0.bind.fetch_or(bind, Ordering::Relaxed);
    }

    /// Whether some flow may have been decided over by a rule.
    #[must_use]
    pub fn are_asked_for(&self) -> bool {
        self.0.rules.load(Ordering::Relaxed)
    }

    /// Whether some flow may not go to its destination.
    #[must_use]
    pub fn bind(&self) -> bool {
        self.0.bind.load(Ordering::Relaxed)
    }

    /// The target with this number.
    #[must_use]
    pub fn get(&self, number: u16) -> Option<SocketAddr> {
        self.0.targets.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(number)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay() {
        let targets = Targets::default();
        let target = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let numbers: Vec<_> = [53, 80, 53].into_iter().map(|port| targets.number(target(port))).collect();
        assert_eq!(numbers, [Ok(0), Ok(1), Ok(0)]);
        assert_eq!(targets.clone().get(1), Some(target(80)));
        assert_eq!(targets.get(2), None);
        for port in 0..Decision::NUMBERS - 2 {
            assert!(targets.number(target(1000 + port)).is_ok());
        }
        assert_eq!(targets.number(target(9)), Err(TooManyTargets));
    }
}

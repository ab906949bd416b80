//! An even rate.

use std::time::Duration;

const SECOND: u128 = 1_000_000_000;

/// So many a second; the first at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    per_second: u32,
}

impl Pace {
    pub(crate) const fn new(per_second: u32) -> Self {
        Self { per_second }
    }

    /// How many are due by then.
    pub(crate) fn due(self, elapsed: Duration) -> u64 {
        let passed = elapsed.as_nanos() * u128::from(self.per_second) / SECOND;
        u64::try_from(passed).unwrap_or(u64::MAX).saturating_add(1)
    }

    /// When the one after the first `n` is due.
    pub(crate) fn time_of(self, n: u64) -> Duration {
        let nanoseconds = (u128::from(n) * SECOND).div_ceil(u128::from(self.per_second));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_due_at_its_time_and_not_before() {
        for rate in [1, 3, 7_777, 1_000_000, u32::MAX] {
            let pace = Pace::new(rate);
            for n in [0, 1, 2, 1_000, 123_456_789] {
                let time = pace.time_of(n);
                assert!(pace.due(time) > n, "{rate} a second, {n}");
                if let Some(before) = time.checked_sub(Duration::from_nanos(1)) {
                    assert!(pace.due(before) <= n, "{rate} a second, {n}");
                }
            }
            assert_eq!(pace.due(Duration::from_mins(1)), 60 * u64::from(rate) + 1);
        }
    }
}

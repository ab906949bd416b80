//! Sets of numbers: prefixes, port ranges and single values alike.

/// Ranges of numbers, first and last, in order, with a gap between any two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    /// The set of all numbers that are in one of these ranges, first and last included.
    #[must_use]
    pub fn new(mut ranges: Vec<(u128, u128)>) -> Self {
        ranges.sort_unstable();
        ranges.dedup_by(|next, range| {
            let joins = range.1.checked_add(1).is_none_or(|after| next.0 <= after);
            if joins {
                range.1 = range.1.max(next.1);
            }
            joins
        });
        Self(ranges)
    }

    /// Ranges, first and last, in order, with a gap between any two.
    #[must_use]
    pub fn as_slice(&self) -> &[(u128, u128)] {
        &self.0
    }

    /// The numbers up to `most` that are not in the set.
    #[must_use]
    pub fn complement(&self, most: u128) -> Self {
        let mut gaps = Vec::new();
        let mut next = Some(0);
        for (first, last) in &self.0 {
            if let Some(next) = next
                && next < *first
            {
                gaps.push((next, first - 1));
            }
            next = last.checked_add(1);
        }
        gaps.extend(next.filter(|next| *next <= most).map(|next| (next, most)));
        Self(gaps)
    }

    /// The numbers that are in this set or in the other.
    #[must_use]
    pub fn union(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        Self::new(self.0)
    }

    /// The numbers that are in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut own, mut others) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut both = Vec::new();
        while let (Some(one), Some(another)) = (own.peek(), others.peek()) {
            let (first, last) = (one.0.max(another.0), one.1.min(another.1));
            if first <= last {
                both.push((first, last));
            }
            if one.1 < another.1 {
                own.next()
            } else {
                others.next()
            };
        }
        Self(both)
    }

    /// Whether all numbers of the other set are in this one.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.intersection(other) == *other
    }

    /// Whether no number is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a number is in the set.
    #[must_use]
    pub fn contains(&self, number: u128) -> bool {
        let after = self.0.partition_point(|range| range.0 <= number);
        after.checked_sub(1).is_some_and(|at| number <= self.0[at].1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        let ranges = Ranges::new(vec![(10, 19), (20, 29), (5, 7), (12, 13), (31, u128::MAX), (40, 50)]);
        assert_eq!(ranges.as_slice(), [(5, 7), (10, 29), (31, u128::MAX)]);
    }

    proptest! {
        #[test]
        fn a_set_holds_what_one_of_its_ranges_holds(
            ranges in prop::collection::vec((0_u128..64, 0_u128..8), 0..8),
            others in prop::collection::vec((0_u128..64, 0_u128..8), 0..8),
            number in 0_u128..80,
        ) {
            let inclusive = |ranges: Vec<(u128, u128)>| -> Vec<_> {
                ranges.into_iter().map(|(first, more)| (first, first + more)).collect()
            };
            let ranges = inclusive(ranges);
            let held = ranges.iter().any(|range| (range.0..=range.1).contains(&number));
            let (ranges, others) = (Ranges::new(ranges), Ranges::new(inclusive(others)));
            prop_assert_eq!(ranges.contains(number), held);
            prop_assert_eq!(ranges.complement(79).contains(number), !held);
            let both = ranges.intersection(&others);
            prop_assert_eq!(both.contains(number), held && others.contains(number));
            prop_assert!(ranges.covers(&both) && others.covers(&both));
            prop_assert_eq!(ranges.covers(&others), (0..80).all(|n| ranges.contains(n) || !others.contains(n)));
            prop_assert!(Ranges::new(both.as_slice().to_vec()) == both);
        }
    }
}

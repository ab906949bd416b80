//! Medians and spreads of rounds.

use serde::Serialize;

/// The middle and the extremes of some rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// Half of the rounds are below, half above.
    pub(crate) median: f64,
    /// The least of all.
    pub(crate) least: f64,
    /// The most of all.
    pub(crate) most: f64,
}

impl Spread {
    /// Of at least one round.
    pub(crate) fn of(rounds: &[f64]) -> Option<Self> {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, least, most })
    }
}

/// Median of the rounds' own ratios: what disturbs the machine for longer than a round
/// disturbs both. `None` where there is nothing to divide by.
pub(crate) fn ratio(own: &[f64], other: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = own.iter().zip(other).map(|(own, other)| own / other).collect();
    Spread::of(&ratios).map(|spread| spread.median).filter(|ratio| ratio.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |rounds| Spread::of(rounds).map(|spread| (spread.median, spread.least, spread.most));
        assert_eq!(spread(&[5.0, 1.0, 3.0]), Some((3.0, 1.0, 5.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]), Some((3.0, 1.0, 9.0)));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn ratios_are_those_of_the_rounds() {
        // The machine was half as fast in the second round: no reason for another ratio.
        assert_eq!(ratio(&[80.0, 40.0, 79.0], &[100.0, 50.0, 100.0]), Some(0.8));
        assert_eq!(ratio(&[1.0], &[0.0]), None);
        assert_eq!(ratio(&[0.0], &[0.0]), None);
        assert_eq!(ratio(&[1.0], &[]), None);
    }
}

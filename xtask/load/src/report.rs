//! What a case tells.

use std::fmt::Display;
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

/// Prints one JSON object on one line.
pub(crate) fn print(report: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(report)?;
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}

/// How many a second.
pub(crate) fn per_second(count: u64, elapsed: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "no case counts up to 2^52")]
    rounded(count as f64 / elapsed.as_secs_f64())
}

/// So many bytes as gigabits a second.
pub(crate) fn gigabits_per_second(bytes: u64, elapsed: Duration) -> f64 {
    rounded(per_second(bytes, elapsed) * 8e-9)
}

/// Seconds, to the microsecond.
pub(crate) fn seconds(elapsed: Duration) -> f64 {
    (elapsed.as_secs_f64() * 1e6).round() / 1e6
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Times, to three digits, with nothing allocated for one.
pub(crate) struct Latency(Histogram<u64>);

/// The longest time told apart, in nanoseconds; it also stands for longer ones.
const LONGEST: u64 = 60_000_000_000;

impl Latency {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, LONGEST, 3)?))
    }

    pub(crate) fn record(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(LONGEST));
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        #[expect(clippy::cast_precision_loss, reason = "a minute in nanoseconds is below 2^52")]
        let micros = |nanoseconds: u64| rounded(nanoseconds as f64 / 1e3);
        let at = |quantile| micros(self.0.value_at_quantile(quantile));
        Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: micros(self.0.max()) }
    }
}

/// Of [`Latency`], in microseconds; all of them 0 where nothing was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Percentiles {
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

/// What did not work: how often, and why the first time.
#[derive(Default)]
pub(crate) struct Failures {
    count: u64,
    first: Option<String>,
}

impl Failures {
    pub(crate) fn add(&mut self, why: impl Display) {
        self.count += 1;
        self.first.get_or_insert_with(|| why.to_string());
    }

    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// Their number. The first one's reason goes to stderr.
    pub(crate) fn tell(&self) -> u64 {
        if let Some(first) = &self.first {
            eprintln!("tproxy-load: {} failed, the first: {first}", self.count);
        }
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_microseconds() {
        let mut latency = Latency::new().expect("a histogram");
        assert_eq!(latency.percentiles().max.to_bits(), 0f64.to_bits());
        for micros in 1..=100 {
            latency.record(Duration::from_micros(micros));
        }
        let told = latency.percentiles();
        for (value, expected) in [(told.p50, 50.0), (told.p90, 90.0), (told.p99, 99.0), (told.max, 100.0)] {
            assert!((value - expected).abs() <= expected / 1000.0, "{told:?}");
        }
    }
}

//! How the micro-benchmarks of this workspace measure.

use std::time::Duration;

use criterion::Criterion;

/// Some seconds for a dozen benchmarks. What they call takes nanoseconds and does not wait, so
/// longer would tell no more.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(50)
        .nresamples(10_000)
        .without_plots()
}

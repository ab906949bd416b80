//! How long a lab is patient: longer on a machine that emulates another.

use std::sync::OnceLock;
use std::time::Duration;

/// Environment variable: how many times longer everything may take than on
/// real hardware (default 1). Loads become smaller by the same factor.
pub const SLOWDOWN: &str = "TPROXY_LAB_SLOWDOWN";

/// The factor of [`SLOWDOWN`].
#[must_use]
pub fn slowdown() -> u32 {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    *FACTOR.get_or_init(|| {
        let factor = std::env::var(SLOWDOWN).ok().and_then(|value| value.parse().ok());
        factor.unwrap_or(1).max(1)
    })
}

/// A limit for something that a faster machine does within `limit`.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    limit * slowdown()
}

/// [`patience`] in whole seconds, for the command line of a program.
#[must_use]
pub fn seconds(limit: u32) -> String {
    (limit * slowdown()).to_string()
}

/// The part of a load of `count` that is right for this machine; at least 1.
#[must_use]
pub fn share(count: u64) -> u64 {
    (count / u64::from(slowdown())).max(1)
}

//! Checks of upstreams, as they are written and resolved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::file::value::{Count, Target, Time};
use crate::config::upstream;

/// How it is found out whether an upstream works.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Check {
    /// From one check to the next.
    pub interval: Option<Time>,
    /// The longest that one takes.
    pub timeout: Option<Time>,
    /// Failures in a row after which it does not work.
    pub fall: Option<Count>,
    /// Successes in a row after which it works again.
    pub rise: Option<Count>,
    /// What is tried: a handshake (the default), a connection alone, or a request.
    pub by: Option<CheckBy>,
    /// Where a request goes to; with by = "request" alone.
    pub target: Option<Target>,
}

/// What a check tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckBy {
    /// A connection to the server.
    Connect,
    /// What is said there before a request.
    Handshake,
    /// A connection through the server to `target`.
    Request,
}

impl Check {
    pub(super) fn resolve(&self) -> Result<upstream::Check, String> {
        let usual = upstream::Check::default();
        let by = match (self.by, &self.target) {
            (Some(CheckBy::Request), Some(target)) => upstream::CheckBy::Request(target.0),
            (Some(CheckBy::Request), None) => {
                return Err("by = \"request\" needs a target, such as target = \"1.1.1.1:80\"".to_owned());
            }
            (_, Some(_)) => return Err("a target is of by = \"request\" alone".to_owned()),
            (Some(CheckBy::Connect), None) => upstream::CheckBy::Connect,
            (Some(CheckBy::Handshake) | None, None) => upstream::CheckBy::Handshake,
        };
        Ok(upstream::Check {
            interval: self.interval.as_ref().map_or(usual.interval, |time| time.0),
            timeout: self.timeout.as_ref().map_or(usual.timeout, |time| time.0),
            fall: self.fall.as_ref().map_or(usual.fall, |count| count.0),
            rise: self.rise.as_ref().map_or(usual.rise, |count| count.0),
            by,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_have_defaults_and_say_what_they_try() {
        let check = |text: &str| toml::from_str::<Check>(text).expect("a table").resolve();
        assert_eq!(check(""), Ok(upstream::Check::default()));
        let request =
            check("interval = '1s'\nfall = 1\nby = 'request'\ntarget = '192.0.2.1:80'").expect("valid");
        assert_eq!(request.by, upstream::CheckBy::Request(([192, 0, 2, 1], 80).into()));
        assert_eq!((request.interval.as_secs(), request.fall, request.rise), (1, 1, 2));
        assert!(check("by = 'request'").expect_err("no target").contains("needs a target"));
        assert!(check("target = '192.0.2.1:80'").expect_err("no request").contains("alone"));
    }
}

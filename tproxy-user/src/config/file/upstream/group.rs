//! Groups of upstreams, as they are written and resolved.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Upstreams, named};
use crate::config::upstream::{self, Policy};

/// Upstreams of which one is chosen for each flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Group {
    /// What rules call it.
    pub name: String,
    /// Names of upstreams; direct, too.
    pub members: Vec<String>,
    /// Which of those that work: failover (the default), round-robin, least-latency, source-hash.
    pub policy: Option<Policy>,
}

impl Group {
    pub(super) fn resolve(&self, known: &Upstreams) -> Result<upstream::Group, (&'static str, String)> {
        let name = named(&self.name)?;
        if self.members.is_empty() {
            return Err(("members", "expected names of upstreams, such as [\"exit\", \"exit2\"]".to_owned()));
        }
        let members = self.members.iter().map(|name| known.find(name)).collect::<Result<_, _>>();
        let policy = self.policy.unwrap_or_default();
        Ok(upstream::Group { name: name.into(), members: members.map_err(|why| ("members", why))?, policy })
    }
}

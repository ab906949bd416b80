//! Names that rules use, and the numbers that the kernel has for them now.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::config::rule::Rule;

/// Where control groups are, of version 2.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Numbers by name. What is not there now has none, and rules that name it match nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    interfaces: Vec<(u32, String)>,
    cgroups: BTreeMap<String, u64>,
}

impl Names {
    /// Of the interfaces among these (index and name) and the control groups that rules name.
    #[must_use]
    pub fn new(interfaces: &[(u32, String)], rules: &[Rule]) -> Self {
        let globs: Vec<_> = rules.iter().flat_map(|rule| &rule.conditions.interfaces).collect();
        let is_named = |(_, name): &&(u32, String)| globs.iter().any(|glob| means(glob, name));
        let named = rules.iter().flat_map(|rule| &rule.conditions.cgroups);
        // The number of a group is that of its directory (`cgroup_id`, Linux 5.5).
        let number =
            |name: &String| Some((name.clone(), Path::new(CGROUPS).join(name).metadata().ok()?.ino()));
        Self {
            interfaces: interfaces.iter().filter(is_named).cloned().collect(),
            cgroups: named.filter_map(number).collect(),
        }
    }

    /// The interfaces that a name or glob means.
    pub fn interfaces(&self, glob: &str) -> impl Iterator<Item = u32> {
        self.interfaces.iter().filter(move |(_, name)| means(glob, name)).map(|(index, _)| *index)
    }

    /// The number of a control group.
    #[must_use]
    pub fn cgroup(&self, name: &str) -> Option<u64> {
        self.cgroups.get(name).copied()
    }

    /// The numbers of the groups from the root down to this one.
    #[must_use]
    pub fn ancestors(name: &str) -> Vec<u64> {
        let path = Path::new(CGROUPS).join(name);
        let from_root: Vec<_> = path.ancestors().take_while(|path| path.starts_with(CGROUPS)).collect();
        from_root.into_iter().rev().map_while(|path| Some(path.metadata().ok()?.ino())).collect()
    }
}

/// Whether a name or glob means an interface.
fn means(glob: &str, name: &str) -> bool {
    name == glob || glob::Pattern::new(glob).is_ok_and(|glob| glob.matches(name))
}

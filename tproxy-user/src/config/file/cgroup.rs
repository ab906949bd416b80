//! From a systemd unit to its control group.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;

/// Where control groups are, of version 2.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// Where the groups of users are.
const USERS: &str = "user.slice";

/// Directories that are looked into for a unit. A host has some hundreds; containers add
/// some each, and are not where units of the host are.
const MOST: usize = 10_000;

/// The control group that is meant, as a path below `root`.
///
/// A unit is where systemd has put it, or where it would put a system service.
pub(super) fn resolve(root: &Path, name: &str) -> String {
    if name.contains('/') || !is_unit(name) {
        let path = name.strip_prefix(ROOT).unwrap_or(name);
        return path.split('/').filter(|part| !matches!(*part, "" | ".")).collect::<Vec<_>>().join("/");
    }
    find(root, name).unwrap_or_else(|| place(name))
}

/// Where systemd puts a unit that says nothing else: slices within each other by their
/// dashes (systemd.slice(5)), others in the slice of the system.
fn place(name: &str) -> String {
    let Some(slice) = name.strip_suffix(".slice") else { return format!("system.slice/{name}") };
    let outer = slice.match_indices('-').map(|(at, _)| &slice[..at]);
    outer.chain([slice]).map(|slice| format!("{slice}.slice")).collect::<Vec<_>>().join("/")
}

/// Whether systemd has control groups of such names (systemd.unit(5)).
fn is_unit(name: &str) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(_, kind)| matches!(kind, "service" | "scope" | "slice" | "socket" | "mount" | "swap"))
}

/// The directory of this name that is nearest to the root, but for what users make.
fn find(root: &Path, name: &str) -> Option<String> {
    let mut left = VecDeque::from([root.to_owned()]);
    for _ in 0..MOST {
        let directory = left.pop_front()?;
        if directory.ends_with(name) {
            return Some(directory.strip_prefix(root).ok()?.to_str()?.to_owned());
        }
        // One that has gone, or may not be read, has none to find.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        // A user may make groups below their own, of any name.
        if directory.ends_with(USERS) {
            continue;
        }
        let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut below: Vec<_> = directories.map(|entry| entry.path()).collect();
        below.sort_unstable();
        left.extend(below);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_found_or_placed() {
        let root = tempfile::tempdir().expect("a directory");
        for group in
            ["system.slice/sshd.service", "machine.slice/app.slice/a.service", "user.slice/b.service"]
        {
            fs::create_dir_all(root.path().join(group)).expect("made");
        }
        for (name, expected) in [
            ("sshd.service", "system.slice/sshd.service"),
            ("a.service", "machine.slice/app.slice/a.service"),
            ("b.service", "system.slice/b.service"),
            ("a//./b/", "a/b"),
            ("user.slice", "user.slice"),
            ("nginx.service", "system.slice/nginx.service"),
            ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
            ("docker/1234", "docker/1234"),
            ("/sys/fs/cgroup/user.slice/", "user.slice"),
            ("/user.slice/a.service", "user.slice/a.service"),
            ("mine", "mine"),
        ] {
            assert_eq!(resolve(root.path(), name), expected, "{name}");
        }
    }
}

//! The control groups (version 2), mounted for a test, since they may be nowhere.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The hierarchy; it is unmounted in the end.
pub(crate) struct Hierarchy(TempDir);

impl Hierarchy {
    pub(crate) fn mount() -> Self {
        let root = tempfile::tempdir().expect("a directory");
        mount(Some("none"), root.path(), Some("cgroup2"), MsFlags::empty(), None::<&str>)
            .expect("a hierarchy of control groups");
        Self(root)
    }

    /// Where its root is.
    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        umount2(self.root(), MntFlags::MNT_DETACH).expect("mounted");
    }
}

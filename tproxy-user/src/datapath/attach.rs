//! Programs and their attachment.

use std::path::Path;

/// Removes what is pinned in a directory, and the directory. Returns the paths
/// that were removed; a directory that is not there is an empty one.
///
/// # Errors
/// Where something cannot be removed.
pub fn remove_pins(_pin: &Path) -> anyhow::Result<Vec<String>> {
    Ok(Vec::new())
}

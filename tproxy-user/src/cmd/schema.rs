//! `schema`: the JSON schema of the config file.

use crate::config::file;
use crate::output;

/// Prints the schema.
///
/// # Errors
/// Where standard output cannot be written.
pub fn run() -> anyhow::Result<()> {
    output::print_json(&file::schema())?;
    Ok(())
}

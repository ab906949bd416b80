//! `import`: a configuration from rules of iptables or nft.

use std::io::Read as _;
use std::path::Path;

use anyhow::Context as _;

use crate::failure::Failure;
use crate::import::{self, Error};
use crate::output;

/// Reads a file, or standard input, and prints the configuration.
///
/// # Errors
/// [`Failure::Usage`] (exit code 2) where none can be made of the input.
pub fn run(file: Option<&Path>) -> anyhow::Result<()> {
    let (name, bytes) = if let Some(file) = file.filter(|file| *file != Path::new("-")) {
        let bytes = std::fs::read(file)
            .map_err(|error| Failure::usage(format_args!("cannot read {}: {error}", file.display())))?;
        (file.display().to_string(), bytes)
    } else {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
        ("standard input".to_owned(), bytes)
    };
    // Only comments have other characters than ASCII.
    let imported = import::import(&String::from_utf8_lossy(&bytes)).map_err(|error| {
        if let Error::Nothing(lost) = &error {
            complain(lost);
        }
        Failure::usage(format_args!("{name}: {error}"))
    })?;
    complain(&imported.lost);
    output::print(&imported.toml)?;
    Ok(())
}

fn complain(lost: &[String]) {
    for line in lost {
        super::complain(line);
    }
}

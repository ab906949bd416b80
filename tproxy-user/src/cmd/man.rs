//! `man`: writes the manual pages.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use clap::{Command, CommandFactory as _};
use clap_mangen::Man;

use crate::cli::Cli;

/// Writes `tproxy-user.1` and a page for each command.
///
/// # Errors
/// Where the directory cannot be written.
pub fn run(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
    let mut program = Cli::command();
    program.build();
    let name = program.get_name().to_owned();
    for command in
        program.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help")
    {
        let page = format!("{name}-{}", command.get_name());
        write(&command.clone().display_name(page.clone()), &page, dir)?;
    }
    write(&program, &name, dir)
}

fn write(command: &Command, page: &str, dir: &Path) -> anyhow::Result<()> {
    let path = dir.join(format!("{page}.8"));
    let mut text = Vec::new();
    Man::new(command.clone()).title(page).section("8").render(&mut text)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

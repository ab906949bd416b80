//! Where results are left: JSON, plots, the README.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::json;

use super::series::Series;
use super::{plots, table};
use crate::workspace;

const BEGIN: &str = "<!-- `cargo xtask bench --record` writes from here -->";
const END: &str = "<!-- to here -->";

/// Where the plots of the README are, from the root of the checkout.
const ASSETS: &str = "xtask/assets/bench";

/// What it was measured on, and how.
#[derive(Debug, Serialize)]
pub(crate) struct Conditions {
    date: String,
    kernel: String,
    processor: String,
    cores: usize,
    rounds: u32,
    seconds: u64,
}

impl Conditions {
    pub(crate) fn now(rounds: u32, seconds: u64) -> Result<Self> {
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let model = processors.lines().find_map(|line| line.strip_prefix("model name"));
        Ok(Self {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: model.map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':'])).to_owned(),
            cores: std::thread::available_parallelism()?.get(),
            rounds,
            seconds,
        })
    }
}

/// `target/bench`, made where it is not there.
pub(crate) fn directory() -> Result<PathBuf> {
    let directory = workspace::target().join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// Writes all rounds, and the plots; gives the files.
pub(crate) fn save(conditions: &Conditions, all: &[Series]) -> Result<Vec<PathBuf>> {
    let directory = directory()?;
    let path = directory.join("results.json");
    let results = json!({
        "conditions": conditions, "series": all.iter().map(Series::json).collect::<Vec<_>>()
    });
    fs::write(&path, format!("{results:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    let mut files = vec![path];
    files.extend(plots::draw(&directory, all)?);
    Ok(files)
}

/// Writes the table in the README, and the plots beside it.
pub(crate) fn record(conditions: &Conditions, all: &[Series]) -> Result<()> {
    let assets = workspace::root().join(ASSETS);
    fs::create_dir_all(&assets)?;
    let plots = plots::draw(&assets, all)?;
    let readme = workspace::root().join("README.md");
    let text = fs::read_to_string(&readme)?;
    let new = replaced(&text, &section(conditions, all, &plots))?;
    fs::write(&readme, new).with_context(|| format!("cannot write {}", readme.display()))
}

fn section(conditions: &Conditions, all: &[Series], plots: &[PathBuf]) -> String {
    let Conditions { date, kernel, processor, cores, rounds, seconds } = conditions;
    let day = date.get(..10).unwrap_or(date);
    let images: String = plots.iter().map(|plot| image(plot)).collect();
    format!(
        "`cargo xtask bench --rounds {rounds} --seconds {seconds}`, {day}, {cores} cores ({processor}), Linux {kernel}: \
         medians of {rounds} rounds; where there are parentheses, they have the least and the most.\n\n{images}\n{}",
        table::markdown(all)
    )
}

fn image(plot: &Path) -> String {
    let name = plot.file_stem().unwrap_or_default().to_string_lossy();
    format!("![{name}]({ASSETS}/{name}.svg)\n")
}

/// The text with another section between the marks.
fn replaced(text: &str, section: &str) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("README.md has no {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("README.md has no {END} after {BEGIN}"))?;
    Ok(format!("{before}{BEGIN}\n\n{section}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_nothing_else() {
        let text = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let new = replaced(&text, "new\n").expect("marks");
        assert_eq!(new, format!("before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"));
        assert_eq!(replaced(&new, "new\n").expect("marks"), new);
        replaced("no marks", "new").expect_err("nowhere to write");
    }

    #[test]
    fn the_readme_has_the_marks() {
        let readme = fs::read_to_string(workspace::root().join("README.md")).expect("the README");
        replaced(&readme, "").expect("marks");
    }
}

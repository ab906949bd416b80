//! `doctor`: what on this host would keep `run` with the same flags from working.

use std::fmt::Write as _;
use std::process::ExitCode;

use crate::config::Config;
use crate::doctor::{self, Finding, Level, facts};
use crate::output;

/// Prints the findings; nothing is changed. The exit code is 1 where one is a FAIL.
///
/// # Errors
/// Where the host cannot be looked at, or the flags make no sense on it.
pub fn run(config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let facts = super::runtime()?.block_on(facts::collect(config))?;
    let findings = doctor::diagnose(&facts);
    if json {
        output::print_json(&findings)?;
    } else {
        output::print(&text(&findings))?;
    }
    let fails = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A line a finding, its mend below, and the sum.
fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.id.len()).max().unwrap_or_default();
    let mut text = String::new();
    for Finding { id, level, text: said, mend } in findings {
        let level = match level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{level:<4}  {id:<width$}  {said}");
        if let Some(mend) = mend {
            let how = if mend.starts_with("--") { "start with" } else { "mend" };
            let _ = writeln!(text, "{:6}{:width$}  {how}: {mend}", "", "");
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let sum = match (count(Level::Fail), count(Level::Warn)) {
        (0, 0) => "nothing is in the way".to_owned(),
        (0, warnings) => format!("nothing is in the way; {warnings} to look at"),
        (fails, warnings) => format!("{fails} in the way, {warnings} to look at"),
    };
    text + &sum + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_the_mend_below_its_finding() {
        let finding = |id, level, mend: Option<&str>| Finding {
            id,
            level,
            text: "so it is".to_owned(),
            mend: mend.map(str::to_owned),
        };
        let findings = [
            finding("kernel", Level::Ok, None),
            finding("interface", Level::Fail, Some("ip link set eth0 up")),
            finding("port", Level::Warn, Some("--on-port 2")),
        ];
        assert_eq!(
            text(&findings),
            "ok    kernel     so it is\n\
             FAIL  interface  so it is\n                 mend: ip link set eth0 up\n\
             warn  port       so it is\n                 start with: --on-port 2\n\
             1 in the way, 1 to look at\n"
        );
    }
}

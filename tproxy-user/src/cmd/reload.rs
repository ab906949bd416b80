//! `reload`: has the running proxy read its configuration again.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::Value;

use crate::failure::Failure;
use crate::instance::Paths;
use crate::instance::control::{self, Request};
use crate::output;

/// Asks for it, and tells what came of it.
///
/// # Errors
/// [`Failure::NotRunning`] (exit code 3) where none runs.
pub fn run(pin: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let paths = Paths::of(pin);
    if paths.running()?.is_none() {
        return Err(Failure::NotRunning(format!("no proxy is running with --pin {}", pin.display())).into());
    }
    let answer = control::ask(&paths.control(), Request::Reload).context("the proxy does not answer")?;
    if json {
        output::print_json(&answer)?;
    }
    if let Some(error) = answer["error"].as_str() {
        super::complain(&format!("nothing has changed: {error}"));
        let code = answer["exit_code"].as_u64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        return Ok(code.into());
    }
    if !json {
        output::print(&text(&answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(answer: &Value) -> String {
    let keys: Vec<_> = answer["restart"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let rest = if keys.is_empty() {
        String::new()
    } else {
        format!("only a restart changes: {}\n", keys.join(", "))
    };
    format!("reloaded: {} rules\n{rest}", answer["rules"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_a_restart_is_named() {
        let answer = |restart: &[&str]| serde_json::json!({"rules": 3, "restart": restart});
        assert_eq!(text(&answer(&[])), "reloaded: 3 rules\n");
        let some = text(&answer(&["steer.table", "limits"]));
        assert_eq!(some, "reloaded: 3 rules\nonly a restart changes: steer.table, limits\n");
    }
}

//! `status`: is a proxy running, and how does it do?

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use tproxy_common::counter::Counters;

use crate::cli::DataArgs;
use crate::failure::Failure;
use crate::instance::control::{self, Request};
use crate::instance::state::State;
use crate::instance::{Instance, Paths};
use crate::output::{self, Align, Table, bytes, span};
use crate::stats::Snapshot;

/// Prints it.
///
/// # Errors
/// [`Failure::NotRunning`] (exit code 3) where none runs.
pub fn run(args: &DataArgs) -> anyhow::Result<()> {
    let paths = Paths::of(&args.pin);
    let state = paths.read_state()?;
    if let Some(pid) = paths.running()? {
        let live = control::ask(&paths.control(), Request::Status).context("it gives no live data");
        let status = live.unwrap_or_else(|error| {
            super::complain(&format!("pid {pid}: {error:#}"));
            from_state(pid, state.as_ref())
        });
        return print(&status, args.json);
    }
    let left = leftovers(&args.pin, state.as_ref());
    if args.json {
        output::print_json(&json!({"running": false, "left_by_killed_run": left}))?;
    }
    let pin = args.pin.display();
    Err(Failure::NotRunning(if left.is_empty() {
        format!("no proxy is running with --pin {pin}")
    } else {
        format!(
            "no proxy is running with --pin {pin}, but a run that was killed left {}; mend: tproxy-user cleanup --pin {pin}",
            left.join(", ")
        )
    })
    .into())
}

/// What can be told of a proxy that does not answer.
fn from_state(pid: i32, state: Option<&State>) -> Value {
    json!({
        "running": true,
        "pid": pid,
        "version": state.map(|state| &state.version),
        "since": state.map(|state| &state.since),
        "config": state.map(|state| &state.config),
    })
}

/// What a killed run left, in words.
pub(crate) fn leftovers(pin: &std::path::Path, state: Option<&State>) -> Vec<String> {
    let mut left = Vec::new();
    if pin.join(tproxy_common::abi::map::FLOWS).exists() {
        left.push("pinned maps and programs".to_owned());
    }
    let Some(state) = state else { return left };
    let journal = &state.journal;
    left.extend(journal.routing.map(|claim| format!("rules and routes of table {}", claim.table)));
    left.extend(journal.sysctls.iter().map(|change| format!("{} = {}", change.name, change.new)));
    left.extend(journal.filters.iter().map(|made| format!("a filter on {}", made.ifname)));
    left.extend(journal.qdiscs.iter().map(|made| format!("the clsact qdisc of {}", made.ifname)));
    if left.is_empty() {
        left.push("its state file".to_owned());
    }
    left
}

fn print(status: &Value, json: bool) -> anyhow::Result<()> {
    if json {
        output::print_json(status)?;
    } else {
        output::print(&text(status, SystemTime::now()))?;
    }
    Ok(())
}

/// A list of objects as words, by what makes the words of one.
fn list(value: &Value, words: impl Fn(&Value) -> String) -> String {
    let items: Vec<String> = value.as_array().into_iter().flatten().map(words).collect();
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

/// A string without its quotes, anything else as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The status for people. Fields that are missing are left out.
fn text(status: &Value, now: SystemTime) -> String {
    let since = status["since"].as_str().unwrap_or("?");
    let age = humantime::parse_rfc3339(since)
        .ok()
        .and_then(|start| now.duration_since(start).ok())
        .unwrap_or(Duration::ZERO);
    let mut text = format!(
        "running as pid {}, version {}, for {} (since {since})\n",
        status["pid"],
        plain(&status["version"]),
        span(age)
    );
    let mut line = |title: &str, words: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{:<13}{words}", format!("{title}:"));
    };
    let interface = |item: &Value| format!("{} ({})", plain(&item["name"]), plain(&item["attach"]));
    let upstream = |item: &Value| {
        let up = if item["up"] == Value::Bool(false) { "down" } else { "up" };
        format!("{} {up}", plain(&item["name"]))
    };
    for (key, title, words) in [
        ("interfaces", "interfaces", &interface as &dyn Fn(&Value) -> String),
        ("listeners", "listeners", &plain),
        ("upstreams", "upstreams", &upstream),
    ] {
        if !status[key].is_null() {
            line(title, list(&status[key], words));
        }
    }
    if let Some(connections) = status["connections"].as_object() {
        let counts: Vec<_> = connections.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        line("connections", counts.join(", "));
    }
    if let (Some(rules), Some(size)) =
        (status["policy"]["rules"].as_u64(), status["policy"]["bytes"].as_u64())
    {
        line("rules", format!("{rules}, {} in the kernel", bytes(size)));
    }
    if let Some(resident) = status["memory_bytes"].as_u64() {
        line("memory", bytes(resident));
    }
    if let Some(counters) = status["counters"].as_object() {
        text.push('\n');
        text.push_str(&counter_table(counters));
    }
    text
}

/// The counters that are not zero, in the order of the list, with what they mean.
fn counter_table(counters: &Map<String, Value>) -> String {
    let mut table = Table::new([("COUNTER", Align::Left), ("VALUE", Align::Right), ("MEANING", Align::Left)]);
    let of_programs = Counters::default().entries().map(|(name, _, help)| (name, help));
    let of_relay = Snapshot::default().entries().map(|entry| (entry.name, entry.help));
    let known: Vec<_> = of_programs.into_iter().chain(of_relay).collect();
    let known_ones = known.iter().filter_map(|(name, help)| Some((*name, counters.get(*name)?, *help)));
    let others = counters
        .iter()
        .filter(|(name, _)| known.iter().all(|(other, _)| other != name))
        .map(|(name, value)| (&**name, value, ""));
    let mut empty = true;
    for (name, value, help) in known_ones.chain(others).filter(|(_, value, _)| value.as_u64() != Some(0)) {
        table.push([name.to_owned(), value.to_string(), help.to_owned()]);
        empty = false;
    }
    if empty { "no packets yet\n".to_owned() } else { table.to_string() }
}

/// The first fields of the contract's `status --json`, for the handler of
/// [`Request::Status`] to add to.
#[must_use]
pub fn basics(instance: &Instance) -> Map<String, Value> {
    let state = instance.state();
    let Value::Object(map) = json!({
        "running": true,
        "pid": state.pid,
        "version": state.version,
        "since": state.since,
        "config": state.config,
    }) else {
        unreachable!("the macro above makes an object")
    };
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_shows_what_is_not_zero() {
        let status = json!({
            "running": true, "pid": 7, "version": "1.0", "since": "2001-09-09T01:46:40Z",
            "interfaces": [{"name": "eth0", "attach": "tcx"}, {"name": "wg0", "attach": "clsact"}],
            "listeners": ["tcp 127.0.0.1:15001"],
            "upstreams": [{"name": "direct", "up": true}],
            "connections": {"tcp": 3, "udp": 4},
            "policy": {"rules": 2, "bytes": 2048},
            "memory_bytes": 5 << 20,
            "counters": {"steered_udp": 5, "pass_local": 0, "of_a_later_version": 1},
        });
        let now = humantime::parse_rfc3339("2001-09-09T01:52:00Z").expect("time");
        let text = text(&status, now);
        for part in [
            "running as pid 7, version 1.0, for 5m20s",
            "interfaces:  eth0 (tcx), wg0 (clsact)",
            "upstreams:   direct up",
            "connections: 3 tcp, 4 udp",
            "rules:       2, 2.0 KiB in the kernel",
            "memory:      5.0 MiB",
            "steered_udp             5  UDP datagrams handed to the proxy's listener.",
            "of_a_later_version      1",
        ] {
            assert!(text.contains(part), "{part} not in\n{text}");
        }
        assert!(!text.contains("pass_local"), "{text}");
    }

    #[test]
    fn text_of_a_silent_proxy() {
        let text = text(&from_state(7, None), SystemTime::UNIX_EPOCH);
        assert_eq!(text, "running as pid 7, version null, for 0s (since ?)\n");
    }
}

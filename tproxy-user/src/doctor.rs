//! What could keep a proxy from working on this host, found before it runs.
//!
//! [`facts`] looks, [`diagnose`] judges: facts → findings, pure.

mod filter;
mod handshake;
mod hooks;
mod interfaces;
mod process;
mod routing;

pub mod facts;
pub mod nft;

use serde::Serialize;

use facts::Facts;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Level {
    /// As it should be.
    #[serde(rename = "ok")]
    Ok,
    /// It works, but not everything, or it could not be looked at.
    #[serde(rename = "warn")]
    Warn,
    /// Captured traffic would get lost, or `run` refuses to start.
    #[serde(rename = "FAIL")]
    Fail,
}

/// The judgement of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check, such as `packet-filter`.
    pub id: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What is so, and what follows from it.
    pub text: String,
    /// What mends it: a command for the shell, or flags to start with (`--…`).
    pub mend: Option<String>,
}

impl Finding {
    fn new(id: &'static str, level: Level, text: impl Into<String>) -> Self {
        Self { id, level, text: text.into(), mend: None }
    }

    fn ok(id: &'static str, text: impl Into<String>) -> Self {
        Self::new(id, Level::Ok, text)
    }

    fn warn(id: &'static str, text: impl Into<String>) -> Self {
        Self::new(id, Level::Warn, text)
    }

    fn fail(id: &'static str, text: impl Into<String>) -> Self {
        Self::new(id, Level::Fail, text)
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }
}

type Check = fn(&Facts) -> Vec<Finding>;

/// What every run needs.
const ALWAYS: [Check; 5] =
    [process::kernel, process::capabilities, process::open_files, process::ports, process::instance];

/// What steering by eBPF needs besides.
const STEERING: [Check; 23] = [
    process::bpf_file_system,
    process::control_groups,
    process::memlock,
    process::btf,
    process::jit,
    interfaces::named,
    interfaces::addresses,
    interfaces::trunks,
    interfaces::ipv6,
    interfaces::forwarding,
    interfaces::harmless,
    interfaces::own_traffic,
    routing::loopback,
    routing::table_and_mark,
    routing::earlier_rules,
    hooks::ingress_qdisc,
    hooks::programs,
    hooks::xdp,
    filter::rules_of_others,
    filter::conntrack,
    filter::legacy,
    handshake::tun,
    handshake::answers,
];

/// Judges what was found, check by check.
#[must_use]
pub fn diagnose(facts: &Facts) -> Vec<Finding> {
    let steering = if facts.steers() { &STEERING[..] } else { &[] };
    ALWAYS.iter().chain(steering).flat_map(|check| check(facts)).collect()
}

#[cfg(test)]
mod tests;

//! Breaks a host on purpose, asks `doctor`, and mends it by what is printed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use xtask::lab::peer;
use xtask::lab::proxy::{self, Launch};
use xtask::lab::{Family, Lab};

use crate::common::{SERVICE_PORT, at, needs_proxy, service, start_proxy};
use crate::interfaces::expect_capture;

/// One finding of `doctor --json`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Finding {
    pub(super) id: String,
    pub(super) level: String,
    pub(super) text: String,
    pub(super) mend: Option<String>,
}

/// Something that is broken on purpose.
#[derive(Clone, Copy)]
pub(super) struct Broken<'a> {
    pub(super) flags: &'a str,
    /// What breaks it, for sh(1).
    pub(super) script: &'a str,
    pub(super) id: &'a str,
    pub(super) level: &'a str,
    /// Part of the text.
    pub(super) says: &'a str,
    /// Traffic of this protocol does not get through a proxy that is started all the same.
    pub(super) lost: Option<&'a str>,
    /// It does, once that is mended.
    pub(super) works: bool,
}

pub(super) const fn fails<'a>(id: &'a str, script: &'a str) -> Broken<'a> {
    Broken { flags: "--iface lan", script, id, level: "FAIL", says: "", lost: None, works: false }
}

pub(super) const fn warns<'a>(id: &'a str, script: &'a str) -> Broken<'a> {
    Broken { level: "warn", ..fails(id, script) }
}

pub(super) fn sh(lab: &Lab, script: &str) -> Result<()> {
    lab.router.cmd("sh").args(["-ec", script]).check().map(drop)
}

/// The findings; the exit code must fit them.
pub(super) fn examine(command: &xtask::lab::Cmd) -> Result<Vec<Finding>> {
    let output = command.run()?;
    let findings: Vec<Finding> =
        serde_json::from_str(&output.stdout).with_context(|| format!("not JSON: {}", output.describe()))?;
    let fails = findings.iter().any(|finding| finding.level == "FAIL");
    ensure!(output.code() == i32::from(fails), "the exit code does not fit: {}", output.describe());
    ensure!(
        findings.iter().all(|finding| ["ok", "warn", "FAIL"].contains(&&*finding.level)),
        "{findings:#?}"
    );
    Ok(findings)
}

pub(super) fn doctor(lab: &Lab, flags: &str) -> Result<Vec<Finding>> {
    examine(&Launch::new(lab, &format!("doctor --json {flags}")).command()?)
}

/// Makes sure that all is well with one of the checks.
pub(super) fn no_finding(lab: &Lab, flags: &str, id: &str) -> Result<()> {
    let found: Vec<_> =
        doctor(lab, flags)?.into_iter().filter(|finding| finding.id == id && finding.level != "ok").collect();
    ensure!(found.is_empty(), "{flags}: {found:#?}");
    Ok(())
}

pub(super) fn works(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, flags)?;
    expect_capture(lab, family, &proxy)?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// Flags with those that a finding asks for.
pub(super) fn with(flags: &str, mend: &str) -> String {
    // Of interfaces the one that was wrong goes; other flags were not given before.
    if mend.starts_with("--iface") { mend.to_owned() } else { format!("{flags} {mend}") }
}

impl Broken<'_> {
    /// Breaks it: only then is there the finding.
    pub(super) fn find(&self, lab: &Lab, _: Family) -> Result<Finding> {
        needs_proxy()?;
        let Self { flags, id, level, says, .. } = *self;
        if flags == "--iface lan" {
            no_finding(lab, flags, id)?;
        }
        sh(lab, self.script)?;
        let findings = doctor(lab, flags)?;
        let found =
            findings.iter().find(|found| found.id == id && found.level == level && found.text.contains(says));
        found.cloned().with_context(|| format!("no {level} of {id} that says '{says}': {findings:#?}"))
    }

    /// Breaks it, mends it by what is printed.
    pub(super) fn examine(&self, lab: &Lab, family: Family) -> Result<()> {
        let finding = self.find(lab, family)?;
        if let Some(protocol) = self.lost {
            expect_lost(lab, family, self.flags, protocol)?;
        }
        let mend = finding.mend.with_context(|| format!("nothing mends '{}'", finding.text))?;
        let flags = if mend.starts_with("--") {
            with(self.flags, &mend)
        } else {
            sh(lab, &mend).with_context(|| format!("the mend of '{}'", finding.text))?;
            self.flags.to_owned()
        };
        no_finding(lab, &flags, self.id).with_context(|| format!("after: {mend}"))?;
        if self.works {
            works(lab, family, &flags).with_context(|| format!("after: {mend}"))?;
        }
        Ok(())
    }
}

/// What is said to be in the way is in the way.
pub(super) fn expect_lost(lab: &Lab, family: Family, flags: &str, protocol: &str) -> Result<()> {
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, flags)?;
    let to = at(family.anywhere(7), SERVICE_PORT);
    let got_through = if protocol == "tcp" {
        peer::connect(&lab.client, None, to, Duration::from_secs(2)).is_ok_and(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(2))).is_ok()
                && peer::ask(&mut stream, "hello?").is_ok()
        })
    } else {
        let socket = peer::udp(&lab.client, at(family.client(), 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        peer::exchange(&socket, to, b"hello?").is_ok()
    };
    let captured = proxy.counter("steered_tcp_new")? + proxy.counter("steered_udp")? > 0;
    proxy.kill()?;
    proxy::cleanup(lab)?;
    ensure!(captured && !got_through, "a FAIL, but {protocol} got through the proxy");
    Ok(())
}

//! What a host looks like where a proxy could have left something.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result, bail};
use aya::programs::{SchedClassifier, TcAttachType};
use serde_json::Value;

use xtask::lab::{Lab, Namespace, firewall};

/// Output of the commands that would show a leftover, by command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    /// Takes one of the lab's router.
    ///
    /// # Errors
    /// Where one of the commands fails.
    pub(crate) fn take(lab: &Lab) -> Result<Self> {
        let router = &lab.router;
        let mut seen = BTreeMap::new();
        let mut commands = vec![
            "tc qdisc show".to_owned(),
            "bpftool net show".to_owned(),
            "ip -4 rule show".to_owned(),
            "ip -6 rule show".to_owned(),
            "ip -4 route show table 100".to_owned(),
            "ip -6 route show table 100".to_owned(),
            "ip -4 route show table all".to_owned(),
        ];
        let interfaces = interfaces(router)?;
        for interface in &interfaces {
            for direction in ["ingress", "egress"] {
                commands.push(format!("tc filter show dev {interface} {direction}"));
            }
        }
        for command in commands {
            // A table without any route does not exist, says `ip`.
            let output = router.cmd("sh").arg("-c").arg(&command).run()?;
            let text = if output.stderr.contains("table does not exist") {
                String::new()
            } else {
                output.expect_code(0)?.stdout
            };
            seen.insert(command, text);
        }
        seen.insert("programs attached by tcx".into(), tcx_programs(router, &interfaces)?);
        seen.insert("sk_lookup programs of the namespace".into(), namespace_links(router)?);
        seen.insert("sysctls".into(), router.sh("sysctl --all --pattern ^net\\.ipv[46]")?.stdout);
        seen.insert("pinned under /sys/fs/bpf".into(), own_entries(Path::new("/sys/fs/bpf"), lab.name())?);
        seen.insert("state under /run/tproxy".into(), own_entries(Path::new("/run/tproxy"), lab.name())?);
        seen.insert("nft list ruleset".into(), firewall::rules(router)?);
        Ok(Self(seen))
    }

    /// Refuses any difference to what was `before`.
    ///
    /// # Errors
    /// The lines that came and went, by command.
    pub(crate) fn expect_same(&self, before: &Self) -> Result<()> {
        self.compare(before, |_| true)
    }

    /// The same where the scenario itself changed routes and interfaces.
    ///
    /// # Errors
    /// As [`expect_same`](Self::expect_same).
    pub(crate) fn expect_same_of_the_proxy(&self, before: &Self) -> Result<()> {
        self.compare(before, |command| {
            !command.contains("route show table all") && !command.starts_with("sysctls")
        })
    }

    /// The same where the scenario itself added filters, and priorities of ours moved.
    ///
    /// # Errors
    /// As [`expect_same`](Self::expect_same).
    pub(crate) fn expect_same_but_for_others(&self, before: &Self) -> Result<()> {
        self.compare(before, |command| {
            !command.starts_with("tc filter")
                && !command.starts_with("bpftool net")
                && !command.contains("route show table all")
        })
    }

    fn compare(&self, before: &Self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let mut differences = String::new();
        for (command, now) in self.0.iter().filter(|(command, _)| wanted(command)) {
            let then = before.0.get(command).map_or("", String::as_str);
            let gone = then.lines().filter(|line| !now.contains(line)).map(|line| format!("    - {line}\n"));
            let came = now.lines().filter(|line| !then.contains(line)).map(|line| format!("    + {line}\n"));
            let lines: String = gone.chain(came).collect();
            if !lines.is_empty() {
                write!(differences, "  {command}\n{lines}")?;
            }
        }
        if differences.is_empty() { Ok(()) } else { bail!("the router is not as before:\n{differences}") }
    }
}

fn interfaces(namespace: &Namespace) -> Result<Vec<String>> {
    let links: Value = serde_json::from_str(&namespace.sh("ip -json link show")?.stdout)?;
    let names = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
    Ok(names.map(Into::into).collect())
}

/// Asked of the kernel itself: bpftool before 7.2 does not list tcx.
fn tcx_programs(namespace: &Namespace, interfaces: &[String]) -> Result<String> {
    namespace.enter(|| {
        let mut text = String::new();
        for interface in interfaces {
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                // An error: the kernel has no tcx (before 6.6), so nothing is attached that way.
                let Ok((_, programs)) = SchedClassifier::query_tcx(interface, direction) else {
                    continue;
                };
                for program in programs {
                    writeln!(text, "{interface} {direction:?} {}", program.name_as_str().unwrap_or("?"))?;
                }
            }
        }
        Ok(text)
    })?
}

fn namespace_links(namespace: &Namespace) -> Result<String> {
    let inode = namespace.inode()?;
    // It lists the links of all namespaces, and fails where one of another
    // scenario goes at that moment.
    let mut listed = namespace.sh("bpftool --json link show");
    for _ in 0..20 {
        if listed.is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        listed = namespace.sh("bpftool --json link show");
    }
    let links: Value = serde_json::from_str(&listed?.stdout)?;
    let own = links.as_array().into_iter().flatten().filter(|link| link["netns_ino"] == inode);
    let shown: Vec<_> = own
        .map(|link| {
            format!(
                "{} {}
",
                link["type"], link["attach_type"]
            )
        })
        .collect();
    Ok(shown.concat())
}

/// Names of a directory's entries that belong to a lab.
fn own_entries(dir: &Path, name: &str) -> Result<String> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        entries => entries.with_context(|| format!("cannot read {}", dir.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let file = entry?.file_name().to_string_lossy().into_owned();
        if file == name || file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-')) {
            names.push(format!("{file}\n"));
        }
    }
    names.sort();
    Ok(names.concat())
}

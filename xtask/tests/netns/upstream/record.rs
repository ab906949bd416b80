//! A server that is given by a name, whose record changes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::{self, patience};
use xtask::lab::proxy::{Launch, binary};
use xtask::lab::{Family, Lab, server, upstream, url};

use super::PORT;
use crate::common::{Scenarios, at, needs_proxy};

pub(super) const SCENARIOS: Scenarios = &[
    ("upstream_whose_record_changes", |lab, family| {
        // Nobody is at the old address any more: it does not take the time that records are used.
        changes(lab, family, false, Duration::from_secs(3))
    }),
    ("upstream_whose_record_changes_with_another_at_the_old_address", |lab, family| {
        changes(lab, family, true, Duration::from_secs(35))
    }),
];

/// A program that starts the proxy where `/etc/hosts` is this file.
fn with_hosts(lab: &Lab, hosts: &str) -> Result<PathBuf> {
    let path = lab.dir().join("with-hosts");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount --propagation private sh -c 'mount --bind \"$0\" /etc/hosts && exec \"$@\"' {hosts} {} \"$@\"\n",
        binary()?.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn changes(lab: &Lab, family: Family, another: bool, within: Duration) -> Result<()> {
    needs_proxy()?;
    let hosts = lab.dir().join("hosts");
    let [old, new] = [family.server(), family.anywhere(9)];
    // It speaks another protocol.
    let _another =
        if another { Some(upstream::microsocks(lab, &lab.server, at(old, PORT), false)?) } else { None };
    let _new = upstream::tinyproxy(lab, &lab.server, at(new, PORT), false)?;
    let _web = server::web(lab, &lab.server, &[80])?;
    // In place: it is this very file that the proxy sees.
    fs::write(&hosts, format!("{old} exit.lab\n"))?;
    let launch =
        Launch::new(lab, &format!("--iface lan --upstream http://exit.lab:{PORT} --connect-timeout 2s"));
    let proxy = launch.binary(with_hosts(lab, &hosts.display().to_string())?).start()?;
    let page = url(family.anywhere(80), 80, "/");
    let page = || lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(5), &page]).run();
    ensure!(page()?.code() != 0, "it gets through before the record changes");
    fs::write(&hosts, format!("{new} exit.lab\n"))?;
    wait_for("the new address to be used", patience(within), || Ok(page()?.code() == 0))
        .with_context(|| proxy.daemon.describe())?;
    Ok(())
}

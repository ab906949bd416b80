//! Reloads that are refused, and what they leave as it was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::daemon::wait_for;
use xtask::lab::pace;
use xtask::lab::{Family, Lab};

use super::load::Stop;
use super::{reload, rule};
use crate::bad_input::expect_refusal;
use crate::common::needs_proxy;
use crate::matching::unused;
use crate::policy::{
    Client, ConfigFile,
    Fate::{Passed, Proxied, Rejected},
    all_reflectors, target, tcp_fate,
};
use crate::snapshot::Snapshot;

/// Configurations with an error, and what the message names.
const INVALID: [(&str, &[&str]); 9] = [
    ("[capture\n", &["tproxy.toml:1:"]),
    ("\n[[rule]]\naction = 'pas'\n", &["tproxy.toml:3:", "pass"]),
    ("[capture]\n\ninterfces = ['lan']\n", &["tproxy.toml:3:", "interfaces"]),
    ("[[rule]]\nto = ['198.18.0.0/33']\naction = 'pass'\n", &["tproxy.toml:2:", "198.18.0.0/33"]),
    ("[[rule]]\naction = 'divert'\n", &["tproxy.toml:1:", "target"]),
    ("[[rule]]\nto_file = 'wrong.txt'\naction = 'pass'\n", &["wrong.txt:3:", "10.0.0.0/33"]),
    ("[[rule]]\nto_file = 'empty.txt'\naction = 'pass'\n", &["empty.txt", "no network"]),
    ("[[rule]]\n\n\nto_file = 'missing.txt'\naction = 'pass'\n", &["tproxy.toml:4:", "missing.txt"]),
    ("[[rule]]\nuid = 'nobody-of-this-name'\naction = 'pass'\n", &["tproxy.toml:2:", "nobody-of-this-name"]),
];

fn write_wrong_files(lab: &Lab) -> Result<()> {
    fs::write(lab.dir().join("wrong.txt"), "# networks\n10.0.0.0/8\n10.0.0.0/33\n10.0.0.0/34\n")?;
    Ok(fs::write(lab.dir().join("empty.txt"), "# nothing\n\n")?)
}

pub(super) fn invalid(lab: &Lab, _: Family) -> Result<()> {
    write_wrong_files(lab)?;
    let _servers = all_reflectors(lab, &[1, 2, 3])?;
    let capture = "[capture]\ninterfaces = 'lan'\n";
    let valid = format!("{capture}{}{}", rule(1, "pass"), rule(2, "reject"));
    needs_proxy()?;
    let config = ConfigFile::new(lab, &valid)?;
    let mut proxy = config.launch(lab, "").start()?;
    let before = Snapshot::take(lab)?;
    let fates = |families: &[Family]| -> Result<()> {
        for family in families {
            for (net, fate) in [(1, Passed), (2, Rejected), (3, Proxied)] {
                Client::of(lab, *family).expect(target(*family, net), fate)?;
            }
        }
        Ok(())
    };
    // What is refused only once the host is looked at, beside what the file itself tells.
    let nowhere = format!("[capture]\ninterfaces = ['lan', 'nosuch0']\n{}", rule(1, "drop"));
    let nothing = rule(1, "drop");
    let of_the_host: [(&str, &[&str]); 3] = [
        (&nowhere, &["nosuch0"]),
        (&nothing, &["--iface"]),
        ("[capture]\ninterfaces = 'lo'\n", &["lo", "--own-traffic"]),
    ];
    for (content, words) in INVALID.into_iter().chain(of_the_host) {
        config.write(content)?;
        let output = proxy.cmd("reload")?.run()?.expect_code(2)?;
        let lines = output.stderr.lines().count();
        ensure!(
            lines == 1 && words.iter().all(|word| output.stderr.contains(word)),
            "expected one line with {words:?}, {}",
            output.describe()
        );
    }
    fates(&Family::ALL)?;
    let logged = || Ok::<_, anyhow::Error>(proxy.daemon.log().matches("cannot reload").count());
    let told = logged()?;
    ensure!(told == INVALID.len() + of_the_host.len(), "the log tells of {told} of them");
    config.write(&rule(1, "drop"))?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_for("the log to tell of the reload by signal", Duration::from_secs(5), || {
        Ok(proxy.daemon.log().matches("cannot reload").count() > told)
    })?;
    fates(&Family::ALL)?;
    fs::remove_file(&config.0)?;
    let output = proxy.cmd("reload")?.run()?.expect_code(2)?;
    ensure!(output.stderr.contains("tproxy.toml"), "{}", output.describe());
    fates(&[Family::V4])?;
    Snapshot::take(lab)?.expect_same(&before)?;
    // And a valid one is taken.
    config.write(&format!("{capture}{}", rule(3, "reject")))?;
    reload(&proxy)?;
    Client::of(lab, Family::V4).expect(target(Family::V4, 3), Rejected)
}

/// That an interface cannot be captured shows late.
pub(super) fn fails_halfway(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = all_reflectors(lab, &[1])?;
    // The qdisc keeps clsact out.
    lab.router.sh("ip link add spare0 type veth peer name spare1")?;
    lab.router.sh("tc qdisc add dev spare0 ingress")?;
    let capture = |interfaces| format!("[capture]\ninterfaces = {interfaces}\n");
    let config = ConfigFile::new(lab, &capture("['lan']"))?;
    let proxy = config.launch(lab, "--attach clsact").start()?;
    let before = Snapshot::take(lab)?;
    config.write(&(capture("['lan2', 'spare0']") + &rule(1, "reject")))?;
    // Who comes meanwhile is not rejected for a moment.
    let stop = AtomicBool::new(false);
    let stop = &stop;
    thread::scope(|scope| -> Result<()> {
        let ends = Stop(stop);
        let probe = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (from, to) = (unused(Family::V4.client()), target(Family::V4, 1));
                let (fate, _) = tcp_fate(&lab.client, from, to, Duration::from_secs(5))?;
                ensure!(fate == Proxied, "{from} to {to} was {fate:?}");
            }
            Ok(())
        });
        for _ in 0..pace::share(20) {
            let output = proxy.cmd("reload")?.run()?.expect_code(5)?;
            ensure!(output.stderr.contains("spare0"), "{}", output.describe());
        }
        drop(ends);
        probe.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    let expect_as_before = || -> Result<()> {
        for family in Family::ALL {
            Client::of(lab, family).expect(target(family, 1), Proxied)?;
            Client::guest(lab, family).expect(target(family, 1), Passed)?;
        }
        Ok(())
    };
    expect_as_before()?;
    Snapshot::take(lab)?.expect_same(&before)?;
    let status = proxy.status()?;
    ensure!(status["policy"]["rules"] == 0, "status tells of rules that do not hold: {}", status["policy"]);
    // Nor do they come to hold when the network changes.
    lab.router.sh("ip addr add 203.0.113.9/24 dev lan2")?;
    thread::sleep(Duration::from_millis(300));
    expect_as_before()?;
    lab.router.sh("tc qdisc del dev spare0 ingress")?;
    reload(&proxy)?;
    Client::guest(lab, Family::V4).expect(target(Family::V4, 1), Rejected)
}

pub(super) fn without(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let launch = || xtask::lab::proxy::Launch::new(lab, "--iface lan");
    expect_refusal(
        lab,
        &xtask::lab::proxy::Launch::new(lab, "reload").command()?,
        3,
        &["no proxy is running"],
    )?;
    let proxy = launch().start()?;
    expect_refusal(lab, &proxy.cmd("reload")?, 2, &["no config file"])
}

pub(super) fn bad_config(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    write_wrong_files(lab)?;
    let config = ConfigFile::new(lab, "")?;
    let command = || config.launch(lab, "--iface lan").command();
    for (content, words) in INVALID {
        config.write(content)?;
        expect_refusal(lab, &command()?, 2, words)?;
    }
    fs::write(&config.0, b"watch = true\n[capture]\nto = '\xff'\n")?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml:3:", "UTF-8"])?;
    fs::remove_file(&config.0)?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml", "No such file"])?;
    fs::create_dir(&config.0)?;
    expect_refusal(lab, &command()?, 2, &["tproxy.toml", "directory"])
}

//! Reloads: what changes, what stays, and that nothing is lost on the way (F3, H9).

mod load;
mod outlived;
mod refused;

use std::io::Write;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use xtask::lab::daemon::wait_for;
use xtask::lab::proxy::binary;
use xtask::lab::{Family, Lab, Output, Proxy};

use crate::common::{Scenarios, needs_proxy};
use crate::matching::unused;
use crate::policy::{
    Client, ConfigFile,
    Fate::{self, Passed, Proxied, Rejected},
    all_reflectors, nets, replace, start_with_rules, target, tcp_fate,
};
use crate::snapshot::Snapshot;

/// All are for both families at once.
pub(crate) const ONCE: Scenarios = &[
    ("F3_reload_under_load", load::under_load),
    ("F3_no_packet_by_a_mixture", load::mixture),
    ("F3_invalid_config_changes_nothing", refused::invalid),
    ("F3_reload_that_fails_halfway_changes_nothing", refused::fails_halfway),
    ("H9_flows_outlive_their_rule", outlived::outlive),
    ("H9_diverted_flows_keep_their_target", outlived::targets),
    ("H9_a_port_is_used_again_after_a_reload", outlived::port_used_again),
    ("H9_the_proxy_takes_the_port_of_a_passed_connection", outlived::port_of_passed),
    ("reload_names_what_needs_a_restart", restart),
    ("reload_by_signal", by_signal),
    ("reload_finds_the_proxy_by_its_flags", by_flags),
    ("reload_by_watched_file", by_watched_file),
    ("reload_that_failed_is_tried_again", tried_again),
    ("reload_keeps_nobody_waiting", keeps_nobody_waiting),
    ("check_tells_what_differs_from_what_runs", differs),
    ("reload_adds_and_removes_interfaces", interfaces),
    ("reload_without_a_config_file_or_a_proxy", refused::without),
    ("bad_config_exit_2", refused::bad_config),
];

fn reload(proxy: &Proxy) -> Result<Output> {
    proxy.cmd("reload")?.check()
}

/// A rule over some networks "anywhere".
fn rule(net: u8, action: &str) -> String {
    format!("[[rule]]\nto = {}\naction = '{action}'\n", nets(net))
}

fn restart(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (proxy, config) = start_with_rules(lab, "--table 100", "")?;
    let changed = "[capture]\nown_traffic = true\n[steer]\non_port = 15002\ntable = 200\n[timeouts]\nudp = '9s'\n\
         [log]\nlevel = 'debug'\nformat = 'json'\n";
    config.write(&(changed.to_owned() + &rule(1, "reject")))?;
    let output = reload(&proxy)?;
    ensure!(
        output.stdout
            == "reloaded: 1 rules\nonly a restart changes: capture.own_traffic, steer.on_port, log.format, timeouts.udp\n",
        "the table is set by a flag, {}",
        output.describe()
    );
    for key in ["capture.own_traffic", "steer.on_port", "log.format", "timeouts.udp"] {
        ensure!(proxy.daemon.log().contains(key), "the log does not name {key}:\n{}", proxy.daemon.log());
    }
    // The level holds from now on.
    ensure!(!proxy.daemon.log().contains("DEBUG"), "{}", proxy.daemon.log());
    reload(&proxy)?;
    wait_for("the log to tell more", Duration::from_secs(5), || Ok(proxy.daemon.log().contains("DEBUG")))?;
    let json: serde_json::Value = serde_json::from_str(&proxy.cmd("reload --json")?.check()?.stdout)?;
    ensure!(json["rules"] == 1 && json["restart"][1] == "steer.on_port", "{json}");
    let status = proxy.status()?;
    ensure!(status["policy"]["rules"] == 1, "{}", status["policy"]);
    for family in Family::ALL {
        Client::of(lab, family).expect(target(family, 1), Rejected)?;
    }
    Ok(())
}

/// Waits until new connections of both families are rejected.
fn wait_rejected(lab: &Lab, net: u8, within: Duration) -> Result<()> {
    wait_for("the new rules to hold", within, || {
        let fates = Family::ALL.map(|family| {
            tcp_fate(&lab.client, unused(family.client()), target(family, net), Duration::from_secs(1))
        });
        let mut rejected = true;
        for fate in fates {
            rejected &= fate?.0 == Rejected;
        }
        Ok(rejected)
    })
}

fn by_signal(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (mut proxy, config) = start_with_rules(lab, "", "")?;
    config.write(&rule(1, "reject"))?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_rejected(lab, 1, Duration::from_secs(2))?;
    wait_for("the log to tell of it", Duration::from_secs(2), || {
        Ok(proxy.daemon.log().contains("reloaded: 1 rules"))
    })?;
    // Many at once are no more than the last.
    for _ in 0..20 {
        proxy.daemon.signal(Signal::SIGHUP)?;
    }
    config.write("")?;
    proxy.daemon.signal(Signal::SIGHUP)?;
    wait_for("the rules to go", Duration::from_secs(5), || Ok(proxy.status()?["policy"]["rules"] == 0))?;
    proxy.terminate(Duration::from_secs(10)).map(drop)
}

/// Of which the config file says which proxy it is.
fn by_flags(lab: &Lab, _: Family) -> Result<()> {
    let (proxy, config) = start_with_rules(lab, "", "")?;
    let command = || Ok::<_, anyhow::Error>(lab.router.cmd(binary()?).args(["reload", "--iface", "lan"]));
    command()?.run()?.expect_code(3)?;
    config.write(&format!("steer.pin = '{}'\n{}", lab.pin().display(), rule(1, "reject")))?;
    command()?.arg("--config").arg(&config.0).check()?;
    ensure!(proxy.status()?["policy"]["rules"] == 1, "{}", proxy.status()?["policy"]);
    Ok(())
}

fn by_watched_file(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1, 2])?;
    let networks = lab.dir().join("networks.txt");
    let of_net = |n: u8| Family::ALL.map(|family| family.anywhere_net(n) + "\n").concat();
    fs::write(&networks, of_net(8))?;
    let rules = "watch = true\n[[rule]]\nto_file = 'networks.txt'\naction = 'reject'\n";
    let (proxy, config) = start_with_rules(lab, "", rules)?;
    for family in Family::ALL {
        Client::of(lab, family).expect_tcp(target(family, 1), Proxied)?;
    }
    // By a line that is appended.
    let mut file = fs::File::options().append(true).open(&networks)?;
    file.write_all(of_net(1).as_bytes())?;
    wait_rejected(lab, 1, Duration::from_secs(4))?;
    // A mistake changes nothing, and what mends it is noticed.
    replace(&networks, "10.0.0.0/33\n")?;
    wait_for("the mistake to be told", Duration::from_secs(4), || {
        Ok(proxy.daemon.log().contains("networks.txt:1: '10.0.0.0/33'"))
    })?;
    Client::of(lab, Family::V4).expect_tcp(target(Family::V4, 1), Rejected)?;
    replace(&networks, &of_net(2))?;
    wait_rejected(lab, 2, Duration::from_secs(4))?;
    Client::of(lab, Family::V4).expect_tcp(target(Family::V4, 1), Proxied)?;
    // The config file itself.
    config.write(&("watch = true\n".to_owned() + &rule(1, "reject")))?;
    wait_rejected(lab, 1, Duration::from_secs(4))
}

/// What was wrong is mended where nobody watches: in a file that only the new configuration names.
fn tried_again(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let (proxy, config) = start_with_rules(lab, "--watch", "")?;
    let refused = || Ok::<_, anyhow::Error>(proxy.daemon.log().matches("cannot reload").count());
    config.write("[[rule]]\nto_file = 'later.txt'\naction = 'reject'\n")?;
    wait_for("the reload to fail", Duration::from_secs(4), || Ok(refused()? == 1))?;
    // It fails a second time, without a word.
    thread::sleep(Duration::from_millis(2500));
    ensure!(refused()? == 1, "it is told again and again:\n{}", proxy.daemon.log());
    let networks = Family::ALL.map(|family| family.anywhere_net(1)).join("\n");
    replace(&lab.dir().join("later.txt"), &networks)?;
    wait_rejected(lab, 1, Duration::from_secs(8))
}

/// A million networks take a while; who asks for `status` meanwhile is answered at once.
fn keeps_nobody_waiting(lab: &Lab, _: Family) -> Result<()> {
    let networks: Vec<_> = (0..1_000_000_u32)
        .map(|number| format!("{}/32\n", std::net::Ipv4Addr::from_bits(0x0b00_0000 + 2 * number)))
        .collect();
    fs::write(lab.dir().join("million.txt"), networks.concat())?;
    let (proxy, config) = start_with_rules(lab, "", "")?;
    config.write("[[rule]]\nto_file = 'million.txt'\naction = 'drop'\n")?;
    let (took, answers) = thread::scope(|scope| -> Result<_> {
        let started = Instant::now();
        let reload = scope.spawn(|| reload(&proxy));
        let mut answers = Vec::new();
        while !reload.is_finished() {
            let asked = Instant::now();
            proxy.status()?;
            answers.push(asked.elapsed());
        }
        reload.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        Ok((started.elapsed(), answers))
    })?;
    ensure!(proxy.status()?["policy"]["bytes"].as_u64() > Some(8_000_000), "the networks are not there");
    let slowest = answers.iter().max().copied().unwrap_or(took);
    ensure!(slowest < took / 3, "the reload took {took:?}, and one of {} answers {slowest:?}", answers.len());
    Ok(())
}

fn differs(lab: &Lab, _: Family) -> Result<()> {
    let networks = lab.dir().join("networks.txt");
    fs::write(&networks, "198.51.100.0/24\n")?;
    let rules = "[[rule]]\nto_file = 'networks.txt'\naction = 'pass'\n";
    let (proxy, config) = start_with_rules(lab, "", rules)?;
    let diff = || -> Result<Vec<String>> {
        let command = format!("check --config {} --iface lan --diff", config.0.display());
        let changed = |line: &&str| {
            line.starts_with(['+', '-']) && !line.starts_with("+++") && !line.starts_with("---")
        };
        let output = proxy.cmd(&command)?.check()?.stdout;
        Ok(output.lines().filter(changed).map(str::to_owned).collect())
    };
    ensure!(diff()?.is_empty(), "nothing has changed: {:#?}", diff()?);
    // As long as before.
    fs::write(&networks, "198.51.101.0/24\n")?;
    let lines = diff()?;
    ensure!(lines.len() == 2 && lines.iter().all(|line| line.contains("networks.txt")), "{lines:#?}");
    let keys = "[steer]\nown_mark = 16\nattach = 'clsact'\n[log]\nlevel = 'warn'\naccess = 'json'\n";
    config.write(&(keys.to_owned() + rules))?;
    let lines = diff()?;
    for expected in
        ["+  steer.own_mark: 0x10", "+  steer.attach: clsact", "+  log.level: warn", "+  log.access: json"]
    {
        ensure!(lines.iter().any(|line| line == expected), "no {expected}: {lines:#?}");
    }
    // A reload takes the networks and the level.
    reload(&proxy)?;
    let lines = diff()?;
    ensure!(
        lines.len() == 6 && !lines.iter().any(|line| line.contains("networks.txt") || line.contains("level")),
        "{lines:#?}"
    );
    Ok(())
}

fn interfaces(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = all_reflectors(lab, &[1])?;
    let capture = |interfaces| format!("[capture]\ninterfaces = {interfaces}\n");
    let config = ConfigFile::new(lab, &capture("'lan'"))?;
    let proxy = config.launch(lab, "").start()?;
    let expect = |of_client: Fate, of_guest: Fate| -> Result<()> {
        for family in Family::ALL {
            Client::of(lab, family).expect(target(family, 1), of_client)?;
            Client::guest(lab, family).expect(target(family, 1), of_guest)?;
        }
        Ok(())
    };
    let before = Snapshot::take(lab)?;
    for (interfaces, of_client, of_guest, names) in [
        ("['lan', 'lan2']", Proxied, Proxied, vec!["lan", "lan2"]),
        ("'lan2'", Passed, Proxied, vec!["lan2"]),
        ("'la?'", Proxied, Passed, vec!["lan"]),
    ] {
        config.write(&capture(interfaces))?;
        reload(&proxy)?;
        expect(of_client, of_guest).with_context(|| interfaces.to_owned())?;
        let status = proxy.status()?;
        let captured = status["interfaces"].as_array().into_iter().flatten();
        let captured: Vec<_> =
            captured.filter(|i| i["role"] == "capture").filter_map(|i| i["name"].as_str()).collect();
        ensure!(captured == names, "{interfaces}: status names {captured:?}");
    }
    Snapshot::take(lab)?.expect_same(&before)
}

//! What another program removes of ours is noticed, counted and put back (H6).

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::patience;
use xtask::lab::peer;
use xtask::lab::{Family, Lab, Proxy};

use crate::common::{SERVICE_PORT, Scenarios, TCX, at, needs_linux, needs_proxy, service, start_proxy};
use crate::company::{NEXT, filter};
use crate::interfaces::expect_capture;
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H6_tcx_link_is_detached", |lab, family| {
        needs_linux(TCX, "tcx")?;
        put_back(lab, family, "", "programs_put_back", |lab| {
            for link in links(lab)? {
                lab.router.sh(&format!("bpftool link detach pinned {link}"))?;
            }
            Ok(())
        })
    }),
    ("H6_pins_are_removed", |lab, family| {
        put_back(lab, family, "", "programs_put_back", |lab| {
            links(lab)?.iter().try_for_each(|link| Ok(fs::remove_file(link)?))
        })
    }),
    ("clsact_H6_qdisc_is_deleted", |lab, family| {
        put_back(lab, family, "--attach clsact", "programs_put_back", |lab| {
            lab.router.sh("tc qdisc del dev lan clsact")?;
            lab.router.sh("tc qdisc del dev wan clsact").map(drop)
        })
    }),
    ("clsact_H6_filters_are_deleted", |lab, family| {
        put_back(lab, family, "--attach clsact", "programs_put_back", |lab| {
            for side in ["dev lan ingress", "dev lan egress", "dev wan ingress"] {
                lab.router.sh(&format!("tc filter del {side}"))?;
            }
            Ok(())
        })
    }),
    ("clsact_H6_filter_is_replaced_by_anothers", |lab, family| {
        put_back(lab, family, "--attach clsact", "programs_put_back", |lab| {
            let shown = lab.router.sh("tc filter show dev lan ingress")?.stdout;
            let ours =
                shown.lines().find(|line| line.contains("tproxy_capture")).context("no filter of ours")?;
            let mut words = ours.split_whitespace().skip_while(|word| *word != "pref").skip(1);
            // In one step, so that ours cannot be back in between.
            filter(lab, "replace", "ingress", words.next().context("no priority")?.parse()?, NEXT)
        })
    }),
    ("H6_rules_are_deleted", |lab, family| put_back(lab, family, "", "rules_put_back", delete_rules)),
    ("H6_connections_outlive_deleted_rules", connections_outlive),
    ("H6_routes_are_flushed", |lab, family| {
        put_back(lab, family, "", "rules_put_back", |lab| {
            lab.router.sh("ip -4 route flush table 100")?;
            lab.router.sh("ip -6 route flush table 100").map(drop)
        })
    }),
    ("H6_loopback_goes_down_and_up", |lab, family| {
        put_back(lab, family, "", "rules_put_back", |lab| {
            lab.router.sh("ip link set lo down")?;
            std::thread::sleep(Duration::from_millis(300));
            lab.router.sh("ip link set lo up").map(drop)
        })
    }),
    ("H6_accept_local_is_reset", |lab, family| {
        put_back(lab, family, "--own-traffic", "settings_put_back", |lab| {
            lab.router.set_sysctls(&[("net/ipv4/conf/lo/accept_local", "0")])
        })
    }),
    ("H6_device_of_faithful_handshakes_goes_down", |lab, family| {
        put_back(lab, family, "--handshake faithful", "settings_put_back", |lab| {
            lab.router.sh("ip link set tproxy0 down").map(drop)
        })
    }),
    ("clsact_H6_device_of_faithful_handshakes_loses_its_program", |lab, family| {
        put_back(lab, family, "--handshake faithful --attach clsact", "programs_put_back", |lab| {
            lab.router.sh("tc qdisc del dev tproxy0 clsact").map(drop)
        })
    }),
    ("H6_two_programs_do_not_fight", fight),
];

/// The pinned links of the lab's proxy, that of `sk_lookup` among them.
fn links(lab: &Lab) -> Result<Vec<String>> {
    let entries = fs::read_dir(lab.pin().join("links"))?;
    entries.map(|entry| Ok(entry?.path().to_string_lossy().into_owned())).collect()
}

fn removals(proxy: &Proxy) -> usize {
    proxy.daemon.log().lines().filter(|line| line.contains("removed by another program")).count()
}

fn put_back(
    lab: &Lab,
    family: Family,
    flags: &str,
    counter: &str,
    interfere: fn(&Lab) -> Result<()>,
) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let proxy = start_proxy(lab, &format!("--iface lan {flags}"))?;
    expect_capture(lab, family, &proxy)?;
    let complete = Snapshot::take(lab)?;
    for round in 1..=2 {
        let earlier = proxy.counter(counter)?;
        interfere(lab)?;
        wait_for("what was removed to be counted", Duration::from_secs(3 * round), || {
            Ok(proxy.counter(counter)? > earlier)
        })
        .with_context(|| format!("round {round}, the log:\n{}", proxy.daemon.log()))?;
        expect_capture(lab, family, &proxy).with_context(|| format!("round {round}"))?;
        wait_for("all to be there again", Duration::from_secs(3 * round), || {
            Ok(Snapshot::take(lab)?.expect_same_but_for_others(&complete).is_ok())
        })
        .with_context(|| {
            format!("{:?}", Snapshot::take(lab).map(|now| now.expect_same_but_for_others(&complete)))
        })?;
    }
    ensure!(removals(&proxy) > 0, "the log does not tell:\n{}", proxy.daemon.log());
    let repairs = proxy.counter(counter)?;
    // Once put back it is left alone.
    std::thread::sleep(Duration::from_millis(2500));
    ensure!(proxy.counter(counter)? == repairs, "still being put back:\n{}", proxy.daemon.log());
    proxy.terminate(Duration::from_secs(10))?;
    if lab.router.sh("tc filter show dev lan ingress")?.stdout.contains("pref 29808") {
        // The other program's filter kept the qdisc.
        lab.router.sh("tc qdisc del dev lan clsact")?;
    }
    Snapshot::take(lab)?.expect_same(&before)
}

fn delete_rules(lab: &Lab) -> Result<()> {
    for rule in ["-4 rule del iif lan", "-6 rule del iif lan", "-4 rule del iif wan", "-6 rule del iif wan"] {
        lab.router.sh(&format!("ip {rule} lookup 100"))?;
    }
    Ok(())
}

/// What is said while the rules are gone must not reach the server from the client,
/// which the server does not know: it would reset the connection.
fn connections_outlive(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let to = at(family.anywhere(1), SERVICE_PORT);
    let mut stream = peer::connect(&lab.client, None, to, patience(Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(10))))?;
    peer::ask(&mut stream, "before")?;
    for round in 1..=3 {
        let earlier = proxy.counter("rules_put_back")?;
        delete_rules(lab)?;
        let lost = peer::ask(&mut stream, "while they are gone").err();
        ensure!(lost.is_none(), "round {round}: {lost:?}");
        wait_for("the rules to be put back", Duration::from_secs(3 * round), || {
            Ok(proxy.counter("rules_put_back")? > earlier)
        })?;
    }
    Ok(())
}

/// Another program removes a rule as soon as it sees it.
fn fight(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let stop = AtomicBool::new(false);
    let fought = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut removed = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let line = format!("{} rule del iif lan lookup 100", family.flag());
                let gone = lab.router.cmd("ip").args(line.split_whitespace()).run();
                removed += u64::from(gone.is_ok_and(|output| output.code() == 0));
                std::thread::sleep(Duration::from_millis(10));
            }
            removed
        });
        std::thread::sleep(Duration::from_secs(1));
        let used = proxy.daemon.cpu_time();
        std::thread::sleep(Duration::from_secs(9));
        let used = used.and_then(|before| Ok(proxy.daemon.cpu_time()?.saturating_sub(before)));
        stop.store(true, Ordering::Relaxed);
        let removed = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<_, anyhow::Error>((used?, removed))
    });
    let (used, removed) = fought?;
    // At 0, 1, 3 and 7 s, and what was there at the start.
    ensure!(
        (3..=6).contains(&removed),
        "the rule was put back {removed} times in 10 s:\n{}",
        proxy.daemon.log()
    );
    ensure!(used < patience(Duration::from_millis(300)), "{used:?} of processor time in 9 s: it fights");
    ensure!(removals(&proxy) == 2, "{} lines instead of 2:\n{}", removals(&proxy), proxy.daemon.log());
    wait_for("the rule to be back after the fight", Duration::from_secs(16), || {
        Ok(expect_capture(lab, family, &proxy).is_ok())
    })
}

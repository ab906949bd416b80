//! Plans applied to and undone from a real kernel.

use std::time::Duration;

use tproxy_user::clsact::{self, Qdisc};
use tproxy_user::config::Mark;
use tproxy_user::instance::Instance;
use tproxy_user::instance::state::QdiscMade;
use tproxy_user::interfaces::{self, Host};
use tproxy_user::plan::{Plan, Role};
use tproxy_user::routing::{self, Changes, Routing};
use tproxy_user::{netlink, undo};

use super::world::{Outcome, Test, block_on, config, ensure, expect_as_before, picture, sh};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("routing_is_applied_once_and_undone", routing_is_applied_once_and_undone),
    ("routing_follows_the_plan", routing_follows_the_plan),
    ("what_another_broke_is_put_back", what_another_broke_is_put_back),
    ("large_tables_work", large_tables_work),
    ("conflicts_are_found", conflicts_are_found),
    ("instances_do_not_disturb_each_other", instances_do_not_disturb_each_other),
    ("a_killed_run_is_undone", a_killed_run_is_undone),
    ("changed_settings_of_others_stay", changed_settings_of_others_stay),
    ("clsact_is_undone", clsact_is_undone),
    ("clsact_with_filters_of_others_stays", clsact_with_filters_of_others_stays),
    ("hosts_are_seen_as_they_are", hosts_are_seen_as_they_are),
    ("hosts_without_ipv6", hosts_without_ipv6),
    ("changes_are_noticed", changes_are_noticed),
];

/// A router: two interfaces with addresses. (Bridges, since not every kernel has
/// dummy devices.)
fn router() {
    sh(
        "ip link add lan0 type bridge; ip link add wan0 type bridge; ip link set lan0 up; ip link set wan0 up; \
        ip addr add 10.1.0.1/24 dev lan0; ip addr add 192.0.2.1/24 dev wan0; ip addr add 2001:db8::1/64 dev wan0 nodad; \
        ip route add default via 192.0.2.254",
    );
}

async fn host(table: u32) -> Host {
    interfaces::snapshot(&netlink::connect().expect("netlink"), table).await.expect("snapshot")
}

async fn plan(flags: &str) -> Plan {
    let config = config(flags);
    Plan::new(&config, &host(config.steering.table).await).expect("plan")
}

fn routing(table: u32) -> Routing {
    Routing::new(netlink::connect().expect("netlink"), table)
}

fn routing_is_applied_once_and_undone() -> Outcome {
    router();
    let before = picture();
    block_on(async {
        let plan = plan("--iface lan0 --own-traffic").await;
        let routing = routing(100);
        let first = routing.apply(&plan.rules, &plan.routes).await.expect("applied");
        ensure!(first == Changes { added: 8, removed: 0 }, "{first:?}");
        let rules = sh("ip rule; ip -6 rule");
        for line in ["iif lan0 lookup 100", "iif wan0 lookup 100", "fwmark 0x3/0x3 iif lo lookup 100"] {
            ensure!(rules.matches(line).count() == 2, "{line} not twice in {rules}");
        }
        ensure!(rules.matches("100:\tfrom all fwmark 0x1/0x1 iif").count() == 4, "{rules}");
        let route = sh("ip route show table 100; ip -6 route show table 100");
        ensure!(route.matches("local default dev lo proto 116").count() == 2, "{route}");
        let second = routing.apply(&plan.rules, &plan.routes).await.expect("applied again");
        ensure!(second == Changes::default(), "{second:?}");
        let undone = routing.remove().await.expect("undone");
        ensure!(undone == Changes { added: 0, removed: 8 }, "{undone:?}");
        let again = routing.remove().await.expect("undone again");
        ensure!(again == Changes::default(), "{again:?}");
        Ok(())
    })?;
    expect_as_before(&before)
}

fn routing_follows_the_plan() -> Outcome {
    router();
    block_on(async {
        let routing = routing(100);
        let first = plan("--iface lan0 -4").await;
        routing.apply(&first.rules, &first.routes).await.expect("applied");
        sh(
            "ip link add wan1 type bridge; ip link set wan1 up; ip addr add 198.51.100.1/24 dev wan1; ip link del wan0",
        );
        let second = plan("--iface lan0 -4").await;
        let changes = routing.apply(&second.rules, &second.routes).await.expect("applied");
        ensure!(changes == Changes { added: 1, removed: 1 }, "{changes:?}");
        let rules = sh("ip rule");
        ensure!(rules.contains("iif wan1") && !rules.contains("iif wan0"), "{rules}");
        routing.apply(&[], &first.routes).await.expect("applied");
        ensure!(!sh("ip rule").contains("lookup 100"), "rules stayed");
        Ok(())
    })
}

fn what_another_broke_is_put_back() -> Outcome {
    router();
    block_on(async {
        let plan = plan("--iface lan0").await;
        let routing = routing(100);
        routing.apply(&plan.rules, &plan.routes).await.expect("applied");
        // The second has no effect but on the list; it is ours by its protocol.
        sh("ip rule del iif lan0 lookup 100; ip -6 route flush table 100; \
            ip rule add priority 5 iif gone0 fwmark 1/1 lookup 100 protocol 116");
        let changes = routing.apply(&plan.rules, &plan.routes).await.expect("applied");
        ensure!(changes == Changes { added: 2, removed: 1 }, "{changes:?}");
        Ok(())
    })
}

fn large_tables_work() -> Outcome {
    router();
    let before = picture();
    block_on(async {
        let plan =
            plan("--iface lan0 --table 1000000 --tproxy-mark 0x80000000/0xf0000000 --own-mark 0x40").await;
        let routing = routing(1_000_000);
        routing.apply(&plan.rules, &plan.routes).await.expect("applied");
        let again = routing.apply(&plan.rules, &plan.routes).await.expect("applied");
        ensure!(again == Changes::default(), "{again:?}");
        ensure!(sh("ip rule").contains("fwmark 0x80000000/0xf0000000 iif lan0 lookup 1000000"), "no rule");
        routing.remove().await.expect("undone");
        Ok(())
    })?;
    expect_as_before(&before)
}

fn conflicts_are_found() -> Outcome {
    router();
    let find = |table, mark| {
        block_on(async {
            let handle = netlink::connect().expect("netlink");
            routing::conflict::find(&handle, table, mark).await.expect("listed")
        })
    };
    let mark = Mark { value: 1, mask: 1 };
    let check = |set_up: &str, words: &[&str]| {
        sh(set_up);
        let conflict = find(100, mark);
        sh(&set_up.replace(" add ", " del "));
        match conflict {
            None if words.is_empty() => Ok(()),
            Some(text) if !words.is_empty() && words.iter().all(|word| text.contains(word)) => Ok(()),
            other => Err(format!("{set_up}: {other:?}, expected {words:?}")),
        }
    };
    check(
        "ip route add 203.0.113.0/24 dev wan0 table 100",
        &["table 100", "'203.0.113.0/24 dev wan0'", "--table"],
    )?;
    check("ip -6 route add local default dev lo table 100", &["'local default dev lo'", "ip -6 route del"])?;
    check(
        "ip rule add priority 7 fwmark 1/1 lookup 200",
        &["'7: from all fwmark 0x1/0x1 lookup 200'", "--tproxy-mark"],
    )?;
    check("ip rule add priority 7 fwmark 3 lookup 200", &["'7: from all fwmark 0x3 lookup 200'"])?;
    check(
        "ip -6 rule add priority 7 from 2001:db8::/32 lookup 100",
        &["from 2001:db8::/32 lookup 100", "ip -6 rule del pref 7"],
    )?;
    check("ip rule add priority 7 fwmark 1/1 lookup 200 protocol 116", &["killed", "cleanup"])?;
    // Not in the way: other bits, another value, an inverted rule, one of ours.
    check("ip rule add priority 7 fwmark 0x80000/0xff0000 lookup 200", &[])?;
    check("ip rule add priority 7 fwmark 0x2/0x3 lookup 200", &[])?;
    check("ip rule add priority 7 not fwmark 0xca6d lookup 51820", &[])?;
    check("ip rule add priority 7 iif lan0 fwmark 1/1 lookup 100 protocol 116", &[])?;
    check("ip route add local default dev lo table 100 protocol 116", &[])?;
    Ok(())
}

fn instances_do_not_disturb_each_other() -> Outcome {
    router();
    block_on(async {
        let first = plan("--iface lan0").await;
        let second = plan("--iface lan0 --table 101 --tproxy-mark 0x4/0x4").await;
        routing(100).apply(&first.rules, &first.routes).await.expect("applied");
        let alone = picture();
        routing(101).apply(&second.rules, &second.routes).await.expect("applied");
        let changes = routing(100).apply(&first.rules, &first.routes).await.expect("applied");
        ensure!(changes == Changes::default(), "{changes:?}");
        routing(101).remove().await.expect("undone");
        expect_as_before(&alone)?;
        Ok(())
    })
}

fn a_killed_run_is_undone() -> Outcome {
    router();
    let before = picture();
    let base = tempfile::tempdir().expect("directory");
    block_on(async {
        let config = config("--iface lan0 --own-traffic --pin /sys/fs/bpf/plumbing-killed");
        let handle = netlink::connect().expect("netlink");
        let plan = Plan::new(&config, &host(100).await).expect("plan");
        let mut killed = Instance::acquire_in(base.path(), &config).expect("instance");
        killed.claim_routing(100, config.steering.mark).expect("claim");
        for setting in &plan.sysctls {
            killed.set_sysctl(setting.name, setting.value).expect("set");
        }
        routing(100).apply(&plan.rules, &plan.routes).await.expect("applied");
        ensure!(picture() != before, "nothing was done");
        // What a kill does: the lock is let go, the files stay.
        drop(killed);

        let next = Instance::acquire_in(base.path(), &config).expect("instance");
        let leftover = next.leftover().expect("leftover");
        let done = undo::everything(leftover, &handle).await.into_result().expect("undone");
        ensure!(done.len() == 2, "{done:?}");
        next.finish().expect("finish");
        Ok(())
    })?;
    expect_as_before(&before)?;
    ensure!(std::fs::read_dir(base.path()).map_or(0, Iterator::count) == 0, "files stayed");
    Ok(())
}

fn changed_settings_of_others_stay() -> Outcome {
    let base = tempfile::tempdir().expect("directory");
    let config = config("--own-traffic --pin /sys/fs/bpf/plumbing-sysctl");
    let name = tproxy_user::sysctl::ACCEPT_LOCAL;
    let mut instance = Instance::acquire_in(base.path(), &config).expect("instance");
    // It had the value already: nothing to restore.
    sh("sysctl -q -w net.ipv4.conf.lo.accept_local=1");
    instance.set_sysctl(name, "1").expect("set");
    ensure!(instance.state().journal.sysctls.is_empty(), "recorded a change that was none");
    sh("sysctl -q -w net.ipv4.conf.lo.accept_local=0");
    instance.set_sysctl(name, "1").expect("set");
    // The user changed it meanwhile.
    sh("sysctl -q -w net.ipv4.conf.lo.accept_local=2 || true");
    let now = tproxy_user::sysctl::read(name).expect("read");
    let done = block_on(async {
        let handle = netlink::connect().expect("netlink");
        undo::everything(instance.state(), &handle).await.into_result().expect("undone")
    });
    ensure!(done.is_empty() == (now != "1"), "{done:?}");
    Ok(())
}

fn clsact_is_undone() -> Outcome {
    router();
    let before = picture();
    block_on(async {
        let handle = netlink::connect().expect("netlink");
        let index = host(100).await.interfaces.iter().find(|i| i.name == "lan0").expect("lan0").index;
        ensure!(clsact::qdisc(&handle, index).await.expect("listed") == Qdisc::Absent, "there already");
        clsact::del_clsact(&handle, index).await.expect("absent is done");
        sh("tc qdisc add dev lan0 ingress");
        ensure!(clsact::qdisc(&handle, index).await.expect("listed") == Qdisc::Ingress, "not seen");
        sh("tc qdisc del dev lan0 ingress; tc qdisc add dev lan0 clsact");
        ensure!(clsact::has_clsact(&handle, index).await.expect("listed"), "not seen");
        sh("tc filter add dev lan0 ingress pref 29808 protocol all bpf da bytecode '1,6 0 0 4294967295'; \
            tc filter add dev lan0 egress pref 5 protocol all bpf da bytecode '1,6 0 0 4294967295'");
        let filters = clsact::filters(&handle, index).await.expect("listed");
        let kinds: Vec<_> = filters.iter().map(|f| (f.egress, f.priority, f.handle, &*f.kind)).collect();
        ensure!(kinds == [(false, 29808, 1, "bpf"), (true, 5, 1, "bpf")], "{filters:?}");
        for filter in &filters {
            clsact::del_filter(&handle, index, filter).await.expect("deleted");
            clsact::del_filter(&handle, index, filter).await.expect("absent is done");
        }
        ensure!(clsact::filters(&handle, index).await.expect("listed").is_empty(), "filters stayed");
        clsact::del_clsact(&handle, index).await.expect("deleted");
        Ok(())
    })?;
    expect_as_before(&before)
}

fn clsact_with_filters_of_others_stays() -> Outcome {
    router();
    let base = tempfile::tempdir().expect("directory");
    let config = config("--iface lan0 --pin /sys/fs/bpf/plumbing-clsact");
    let mut instance = Instance::acquire_in(base.path(), &config).expect("instance");
    sh(
        "tc qdisc add dev lan0 clsact; tc qdisc add dev wan0 clsact; tc filter add dev lan0 egress protocol all bpf da bytecode '1,6 0 0 4294967295'",
    );
    let done = block_on(async {
        for interface in &host(100).await.interfaces {
            let made = QdiscMade { ifindex: interface.index, ifname: interface.name.clone() };
            instance.record(|journal| journal.qdiscs.push(made)).expect("recorded");
        }
        let gone = QdiscMade { ifindex: 999, ifname: "gone0".to_owned() };
        instance.record(|journal| journal.qdiscs.push(gone)).expect("recorded");
        let handle = netlink::connect().expect("netlink");
        undo::everything(instance.state(), &handle).await.into_result().expect("undone")
    });
    ensure!(done == ["removed the clsact qdisc of wan0"], "{done:?}");
    ensure!(sh("tc qdisc show dev lan0").contains("clsact"), "the qdisc of another went");
    Ok(())
}

fn hosts_are_seen_as_they_are() -> Outcome {
    router();
    sh("ip link add br0 type bridge; ip tuntap add port0 mode tap; ip link set port0 master br0; \
        ip link set br0 up; ip link set port0 up; ip addr add 10.2.0.1/24 dev br0; \
        ip tuntap add tun0 mode tun; sysctl -q -w net.ipv6.conf.tun0.disable_ipv6=1; ip link set tun0 up; \
        ip link add bare0 type bridge; sysctl -q -w net.ipv6.conf.bare0.disable_ipv6=1; ip link set bare0 up; \
        ip route add 198.51.100.0/24 dev tun0 table 7");
    block_on(async {
        let host = host(100).await;
        let named = |name| host.interfaces.iter().find(|i| i.name == name).expect(name);
        ensure!(
            named("lo").loopback && named("lo").index == interfaces::LOOPBACK_INDEX,
            "lo: {:?}",
            named("lo")
        );
        ensure!(named("br0").kind == "bridge" && host.ipv6, "br0: {:?}", named("br0"));
        ensure!(host.bridge_of(named("port0")) == Some(named("br0")), "port0: {:?}", named("port0"));
        ensure!(named("tun0").routed && !named("bare0").routed, "tun0: {:?}", named("tun0"));
        let local: Vec<_> = host.local.iter().map(ToString::to_string).collect();
        for net in
            ["127.0.0.0/8", "10.1.0.1/32", "10.1.0.255/32", "192.0.2.1/32", "::1/128", "2001:db8::1/128"]
        {
            ensure!(local.iter().any(|l| l == net), "{net} not in {local:?}");
        }
        ensure!(!local.iter().any(|l| l == "0.0.0.0/0" || l == "198.51.100.0/24"), "{local:?}");

        let plan = plan("--iface br0").await;
        let roles: Vec<_> = plan.interfaces.iter().map(|i| (&*i.name, i.role)).collect();
        let expected =
            [("lan0", Role::Uplink), ("wan0", Role::Uplink), ("br0", Role::Capture), ("tun0", Role::Uplink)];
        ensure!(roles == expected, "{roles:?}");
        Ok(())
    })
}

fn hosts_without_ipv6() -> Outcome {
    router();
    sh("sysctl -q -w net.ipv6.conf.all.disable_ipv6=1");
    block_on(async {
        let plan = plan("--iface lan0").await;
        ensure!(!plan.ipv6 && plan.rules.iter().all(|rule| !rule.v6), "{plan}");
        routing(100).apply(&plan.rules, &plan.routes).await.expect("applied");
        routing(100).remove().await.expect("undone");
        Ok(())
    })
}

fn changes_are_noticed() -> Outcome {
    router();
    block_on(async {
        let mut watch = netlink::Watch::new().expect("watch");
        let soon = Duration::from_secs(5);
        // IPv6 takes a while to settle.
        let settled = async {
            while tokio::time::timeout(Duration::from_millis(400), watch.changed()).await.is_ok() {}
        };
        ensure!(tokio::time::timeout(2 * soon, settled).await.is_ok(), "changes out of nothing");
        for change in [
            "ip addr add 10.9.0.1/24 dev lan0",
            "ip link add new0 type bridge",
            "ip route add 203.0.113.0/24 dev wan0",
            "ip -6 rule add priority 9 lookup main",
            "tc qdisc add dev lan0 clsact",
        ] {
            sh(change);
            // Dropped half-way, it tells the next time.
            ensure!(
                tokio::time::timeout(Duration::from_millis(20), watch.changed()).await.is_err(),
                "told too early"
            );
            ensure!(tokio::time::timeout(soon, watch.changed()).await.is_ok(), "missed: {change}");
        }
        Ok(())
    })
}

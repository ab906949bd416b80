//! Interfaces that go, come back, are renamed or change their master (H5).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::patience;
use xtask::lab::proxy::FlowRecord;
use xtask::lab::{Family, Lab, Namespace, Proxy};

use crate::common::{
    Scenarios, expect_service, expect_tcp_service, expect_udp_service_within, needs_proxy, service,
    start_proxy,
};
use crate::snapshot::Snapshot;

pub(crate) const SCENARIOS: Scenarios = &[
    ("H5_named_interface_comes_back", |lab, family| comes_back(lab, family, "--iface lan", LAN)),
    ("H5_uplink_comes_back", |lab, family| comes_back(lab, family, "--iface lan", WAN)),
    ("H5_own_traffic_and_interfaces_come_back", |lab, family| {
        comes_back(lab, family, "--iface lan --own-traffic", LAN)?;
        comes_back(lab, family, "--iface lan --own-traffic", WAN)
    }),
    ("H5_glob_takes_a_new_interface", new_interface),
    ("H5_interfaces_that_stay_for_a_moment", |lab, family| short_lived(lab, family, "")),
    ("H5_renamed_interface", renamed),
    ("H5_interface_goes_down_and_up", down_and_up),
    ("H5_bridge_port_comes_and_goes", bridge_port),
    ("H5_captured_interface_joins_a_bridge", joins_bridge),
    ("clsact_H5_named_interface_comes_back", |lab, family| {
        comes_back(lab, family, "--iface lan --attach clsact", LAN)
    }),
    ("clsact_H5_interfaces_that_stay_for_a_moment", |lab, family| {
        short_lived(lab, family, "--attach clsact")
    }),
    ("clsact_H5_renamed_interface", |lab, family| renamed_with(lab, family, "--attach clsact")),
    ("clsact_H5_renamed_while_not_captured", renamed_while_not_captured),
];

/// How long traffic may take to go through the proxy again.
const SOON: Duration = Duration::from_secs(2);

/// A cable from the router to another namespace.
struct Cable {
    device: &'static str,
    /// Addresses on both ends, in `ip` commands: of the router, and of the other.
    router: &'static str,
    other: &'static str,
    end: fn(&Lab) -> &Namespace,
}

const LAN: &Cable = &Cable {
    device: "lan",
    router: "addr add 192.0.2.1/24 dev lan\n\
             addr add 2001:db8:1::1/64 dev lan nodad\n",
    other: "addr add 192.0.2.2/24 dev eth0\n\
            addr add 2001:db8:1::2/64 dev eth0 nodad\n\
            route add default via 192.0.2.1\n\
            route add ::/0 via 2001:db8:1::1\n",
    end: |lab| &lab.client,
};

const WAN: &Cable = &Cable {
    device: "wan",
    router: "addr add 198.51.100.1/24 dev wan\n\
             addr add 2001:db8:2::1/64 dev wan nodad\n\
             route add 198.18.0.0/15 via 198.51.100.2\n\
             route add 2001:db8:f000::/36 via 2001:db8:2::2\n",
    other: "addr add 198.51.100.2/24 dev eth0\n\
            addr add 2001:db8:2::2/64 dev eth0 nodad\n\
            route add default via 198.51.100.1\n\
            route add ::/0 via 2001:db8:2::1\n",
    end: |lab| &lab.server,
};

impl Cable {
    fn cut(&self, lab: &Lab) -> Result<()> {
        lab.router.ip_batch(&format!("link del {}\n", self.device))
    }

    fn plug(&self, lab: &Lab) -> Result<()> {
        let end = (self.end)(lab);
        let device = self.device;
        lab.router.ip_batch(&format!(
            "link add {device} type veth peer name eth0 netns {}\nlink set {device} up\n{}",
            end.name(),
            self.router.split("route").next().unwrap_or_default()
        ))?;
        end.ip_batch(&format!("link set eth0 up\n{}", self.other))?;
        let routes: Vec<_> = self.router.lines().filter(|line| line.starts_with("route")).collect();
        lab.router.ip_batch(&(routes.join("\n") + "\n"))
    }
}

/// The index of one of the router's interfaces.
fn index(lab: &Lab, name: &str) -> Result<u32> {
    lab.router.enter(|| nix::net::if_::if_nametoindex(name))?.with_context(|| format!("no interface {name}"))
}

/// Waits until traffic goes through the proxy, soon.
pub(crate) fn expect_capture(lab: &Lab, family: Family, proxy: &Proxy) -> Result<()> {
    let counts =
        || Ok::<_, anyhow::Error>((proxy.counter("steered_tcp_new")?, proxy.counter("steered_udp")?));
    let mut latest = Ok(());
    let captured = wait_for("traffic to go through the proxy", SOON, || {
        let before = counts()?;
        // A device that is given a clsact qdisc sends nothing for a moment
        // (`qdisc_graft`): a datagram that falls into it is lost, so not waited for long.
        latest = expect_tcp_service(lab, family)
            .and_then(|()| expect_udp_service_within(lab, family, patience(SOON / 4)));
        let now = counts()?;
        Ok(latest.is_ok() && now.0 > before.0 && now.1 > before.1)
    });
    captured.with_context(|| format!("the latest attempt: {latest:?}"))?;
    // And back: with another address than the client's, the server would not see it come home.
    ensure!(
        proxy.status()?["interfaces"].as_array().is_some_and(|interfaces| !interfaces.is_empty()),
        "status names no interface"
    );
    Ok(())
}

/// Makes sure that nothing is left of interfaces that are gone.
fn expect_no_remains(lab: &Lab, proxy: &Proxy) -> Result<()> {
    let remains = || -> Result<Vec<String>> {
        let mut remains = Vec::new();
        let exists =
            |index: u32| lab.router.enter(|| nix::net::if_::if_indextoname(index)).is_ok_and(|n| n.is_ok());
        for entry in fs::read_dir(lab.pin().join("links"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let index = name.split('_').next().and_then(|index| index.parse().ok());
            if index.is_some_and(|index| !exists(index)) {
                remains.push(format!("the pin {name}"));
            }
        }
        for version in ["-4", "-6"] {
            let rules = lab.router.sh(&format!("ip {version} rule show"))?.stdout;
            remains.extend(rules.lines().filter(|rule| rule.contains("[detached]")).map(str::to_owned));
        }
        let state = fs::read_to_string(format!("/run/tproxy/{}/state.json", lab.name()))?;
        let state: serde_json::Value = serde_json::from_str(&state)?;
        for part in ["filters", "qdiscs"] {
            for made in state["journal"][part].as_array().into_iter().flatten() {
                let index = made["ifindex"].as_u64().and_then(|index| u32::try_from(index).ok());
                if index.is_none_or(|index| !exists(index)) {
                    remains.push(format!("in the journal: {made}"));
                }
            }
        }
        for interface in proxy.status()?["interfaces"].as_array().into_iter().flatten() {
            let index = interface["index"].as_u64().and_then(|index| u32::try_from(index).ok());
            if index.is_none_or(|index| !exists(index)) {
                remains.push(format!("in `status`: {interface}"));
            }
        }
        Ok(remains)
    };
    let mut latest = Vec::new();
    let clean = wait_for("the remains of interfaces to go", SOON, || {
        latest = remains()?;
        Ok(latest.is_empty())
    });
    clean.with_context(|| format!("{latest:#?}"))
}

fn comes_back(lab: &Lab, family: Family, flags: &str, cable: &Cable) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let proxy = start_proxy(lab, flags)?;
    expect_capture(lab, family, &proxy)?;
    for round in 1..=2 {
        let old = index(lab, cable.device)?;
        cable.cut(lab)?;
        expect_no_remains(lab, &proxy).with_context(|| format!("{} is gone, round {round}", cable.device))?;
        cable.plug(lab)?;
        ensure!(
            index(lab, cable.device)? != old,
            "the test proves nothing: {} has its old index",
            cable.device
        );
        expect_capture(lab, family, &proxy)
            .with_context(|| format!("{} is back, round {round}", cable.device))?;
        expect_no_remains(lab, &proxy)?;
    }
    expect_no_repair(&proxy)?;
    proxy.terminate(Duration::from_secs(10))?;
    // Addresses and routes are not quite those of before.
    Snapshot::take(lab)?.expect_same_of_the_proxy(&before)
}

/// What goes with an interface was not removed by another program.
fn expect_no_repair(proxy: &Proxy) -> Result<()> {
    for counter in ["programs_put_back", "rules_put_back", "settings_put_back"] {
        let count = proxy.counter(counter)?;
        ensure!(count == 0, "{counter} is {count}, and nobody removed anything:\n{}", proxy.daemon.log());
    }
    ensure!(!proxy.daemon.log().contains("cannot"), "the log has complaints:\n{}", proxy.daemon.log());
    Ok(())
}

fn new_interface(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    LAN.cut(lab)?;
    // No interface of that name yet.
    let proxy = start_proxy(lab, "--iface la[m-n]*")?;
    LAN.plug(lab)?;
    expect_capture(lab, family, &proxy)?;
    LAN.cut(lab)?;
    expect_no_remains(lab, &proxy)?;
    LAN.plug(lab)?;
    expect_capture(lab, family, &proxy)?;
    expect_no_repair(&proxy)
}

/// Interfaces, as containers bring them, that go while they are looked at or attached to.
fn short_lived(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    const COUNT: usize = 40;
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let proxy = start_proxy(lab, &format!("--iface lan --iface brief* {flags}"))?;
    for round in 0..COUNT {
        // From none to a quarter of a second: the programs are attached within.
        let stay = Duration::from_millis(10) * u32::try_from(round % 25)?;
        lab.router.ip_batch("link add brief0 type veth peer name brief1\nlink set brief0 up\n")?;
        std::thread::sleep(stay);
        lab.router.ip_batch("link del brief0\n")?;
    }
    expect_capture(lab, family, &proxy)?;
    expect_no_remains(lab, &proxy)?;
    expect_no_repair(&proxy)?;
    proxy.terminate(Duration::from_secs(10))?;
    Snapshot::take(lab)?.expect_same_of_the_proxy(&before)
}

fn renamed(lab: &Lab, family: Family) -> Result<()> {
    renamed_with(lab, family, "")
}

fn renamed_with(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let before = Snapshot::take(lab)?;
    let proxy = start_proxy(lab, &format!("--iface la[m-n]* {flags}"))?;
    expect_capture(lab, family, &proxy)?;
    // Since Linux 6.0 an interface can be renamed while it is up.
    let rename = |from: &str, to: &str| -> Result<()> {
        if lab.router.cmd("ip").args(["link", "set", from, "name", to]).run()?.code() == 0 {
            return Ok(());
        }
        lab.router
            .ip_batch(&format!("link set {from} down\nlink set {from} name {to}\nlink set {to} up\n"))?;
        configure_again(lab, LAN, to)
    };
    rename("lan", "lanx")?;
    expect_capture(lab, family, &proxy).context("renamed")?;
    expect_no_remains(lab, &proxy)?;
    rename("lanx", "other0")?;
    wait_for("the capture to end on an interface that the glob no longer matches", SOON, || {
        let before = proxy.counter("steered_tcp_new")?;
        expect_service(lab, family)?;
        Ok(proxy.counter("steered_tcp_new")? == before)
    })?;
    rename("other0", "lan")?;
    expect_capture(lab, family, &proxy).context("renamed back")?;
    expect_no_remains(lab, &proxy)?;
    expect_no_repair(&proxy)?;
    proxy.terminate(Duration::from_secs(10))?;
    Snapshot::take(lab)?.expect_same_of_the_proxy(&before)
}

/// The qdisc of an interface that is captured no more is taken off in the end, whatever it is
/// called by then.
fn renamed_while_not_captured(lab: &Lab, _family: Family) -> Result<()> {
    let proxy = start_proxy(lab, "--iface la[m-n]* --attach clsact")?;
    // What is down faces no servers either.
    lab.router.ip_batch("link set lan down\nlink set lan name other0\n")?;
    wait_for("the capture of lan to end", patience(SOON), || {
        Ok(proxy.daemon.log().contains("lan: detached"))
    })?;
    lab.router.ip_batch("link set other0 name other1\n")?;
    let state = format!("/run/tproxy/{}/state.json", lab.name());
    wait_for("the journal to call it by its name", patience(SOON), || {
        Ok(fs::read_to_string(&state)?.contains("\"ifname\": \"other1\""))
    })?;
    proxy.terminate(Duration::from_secs(10))?;
    let left = lab.router.sh("tc qdisc show dev other1")?.stdout;
    ensure!(!left.contains("clsact"), "left: {left}");
    Ok(())
}

fn down_and_up(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    for cable in [LAN, WAN] {
        lab.router.sh(&format!("ip link set {} down", cable.device))?;
        std::thread::sleep(Duration::from_millis(500));
        lab.router.sh(&format!("ip link set {} up", cable.device))?;
        configure_again(lab, cable, cable.device)?;
        expect_capture(lab, family, &proxy).with_context(|| format!("{} is up again", cable.device))?;
    }
    expect_no_repair(&proxy)
}

/// Gives a device of the router, which has been down, what that has taken: the addresses
/// of IPv6 and all routes.
fn configure_again(lab: &Lab, cable: &Cable, device: &str) -> Result<()> {
    let (net4, net6) = if cable.device == "lan" {
        ("192.0.2.0/24", "2001:db8:1::/64")
    } else {
        ("198.51.100.0/24", "2001:db8:2::/64")
    };
    let (addresses, routes): (Vec<_>, Vec<_>) =
        cable.router.lines().partition(|line| line.starts_with("addr"));
    let addresses = addresses.into_iter().map(|line| line.replace(cable.device, device));
    let onlink = [net4, net6].map(|net| format!("route add {net} dev {device}"));
    for line in addresses.chain(onlink).chain(routes.into_iter().map(str::to_owned)) {
        let version = if line.contains("2001:") { "-6" } else { "-4" };
        lab.router.sh(&format!("ip {version} {}", line.replace(" add ", " replace ")))?;
    }
    Ok(())
}

/// Makes `br0` of the cable's end `lan`, with the addresses that lan had. The link-local one stays:
/// without it neighbours are not asked for on behalf of foreign addresses (`ndisc_send_ns`).
fn bridge(lab: &Lab) -> Result<()> {
    lab.router.ip_batch(
        "link add br0 type bridge forward_delay 0\n\
         addr flush dev lan scope global\n\
         link set lan master br0\n\
         link set br0 up\n",
    )?;
    lab.router.ip_batch(&LAN.router.replace("lan", "br0"))
}

fn bridge_port(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    bridge(lab)?;
    let proxy = start_proxy(lab, "--iface br0")?;
    expect_capture(lab, family, &proxy)?;
    for _ in 0..2 {
        lab.router.sh("ip link set lan nomaster")?;
        std::thread::sleep(Duration::from_millis(300));
        lab.router.sh("ip link set lan master br0")?;
        expect_capture(lab, family, &proxy).context("the port is back in the bridge")?;
    }
    // A port that is new, too.
    LAN.cut(lab)?;
    std::thread::sleep(Duration::from_millis(300));
    lab.router.ip_batch(&format!(
        "link add lan type veth peer name eth0 netns {}\nlink set lan up\nlink set lan master br0\n",
        lab.client.name()
    ))?;
    lab.client.ip_batch(&format!("link set eth0 up\n{}", LAN.other))?;
    expect_capture(lab, family, &proxy).context("another port")?;
    expect_no_remains(lab, &proxy)?;
    expect_no_repair(&proxy)
}

/// A bridge takes over the captured interface: that is said, and what the glob
/// names beside it is captured; when the interface is released all is as before.
fn joins_bridge(lab: &Lab, family: Family) -> Result<()> {
    needs_proxy()?;
    let _service = service(lab, family)?;
    let proxy = start_proxy(lab, "--iface lan --iface br*")?;
    expect_capture(lab, family, &proxy)?;
    bridge(lab)?;
    wait_for("the log to tell of the bridge", SOON, || {
        Ok(proxy.daemon.log().contains("it is a port of the bridge br0"))
    })?;
    let on_bridge = |flow: &FlowRecord| flow.iface.as_deref() == Some("br0") && flow.action == "proxy";
    // Until it is let go the port captures still, before the bridge has the packets.
    wait_for("flows to be captured on the bridge", SOON, || {
        expect_capture(lab, family, &proxy)?;
        Ok(proxy.flows()?.iter().any(on_bridge))
    })?;
    let rules = lab.router.sh(&format!("ip {} rule show", family.flag()))?.stdout;
    ensure!(!rules.contains("iif lan "), "a rule for a bridge port is left:\n{rules}");
    lab.router.ip_batch("link del br0\n")?;
    lab.router.ip_batch(LAN.router)?;
    expect_capture(lab, family, &proxy).context("released")?;
    expect_no_remains(lab, &proxy)
}

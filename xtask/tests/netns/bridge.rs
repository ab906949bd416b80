//! Capture on a bridge with containers behind it, also where the bridge hands
//! its packets to the IP packet filter (H3).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::peer;
use xtask::lab::{Family, Lab};

use crate::common::{Scenarios, at, service, start};
use crate::links::{Form, Side, relink};
use crate::matching::{Way, expect, reflectors};

pub(crate) const SCENARIOS: Scenarios = &[
    ("H3_bridge_with_containers", |lab, family| containers(lab, family, "0")),
    ("H3_bridge_nf_call_iptables_1", |lab, family| containers(lab, family, "1")),
];

/// The address of the guest once it is behind the bridge, beside the client.
const fn neighbour(family: Family) -> IpAddr {
    family.pick(
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 3)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 3)),
    )
}

/// Rules as container engines write them. Hooks with connection tracking are
/// what makes `bridge-nf-call-iptables` matter.
const RULES: &str = "\
table inet containers {
    chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        ct state invalid counter drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname \"br-lan\" accept
    }
}
";

fn lay_bridge(lab: &Lab, nf_call: &str) -> Result<()> {
    lab.router
        .ip_batch("link add br-lan type bridge\nlink set lan master br-lan\nlink set lan2 master br-lan\n")?;
    relink(lab, Side::Lan, "eth0", "br-lan", Form::Subnet)?;
    for command in ["ip -4 route flush dev eth0", "ip -6 route flush dev eth0", "ip addr flush dev eth0"] {
        lab.guest.sh(command)?;
    }
    let (four, six) = (Family::V4, Family::V6);
    lab.guest.ip_batch(&format!(
        "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\nroute add default via {}\nroute add ::/0 via {}\n",
        neighbour(four),
        neighbour(six),
        four.router(),
        six.router()
    ))?;
    lab.router.cmd("nft").args(["-f", "-"]).stdin(RULES).check()?;
    lab.router.set_sysctls(&[
        ("net/bridge/bridge-nf-call-iptables", nf_call),
        ("net/bridge/bridge-nf-call-ip6tables", nf_call),
    ])
}

fn containers(lab: &Lab, family: Family, nf_call: &str) -> Result<()> {
    lay_bridge(lab, nf_call)?;
    let _service = service(lab, family)?;
    let port = 7100;
    let outside = at(family.anywhere(5), port);
    let inside = at(neighbour(family), port);
    let _servers = (reflectors(&lab.server, &[outside])?, reflectors(&lab.guest, &[inside])?);
    let running = start(lab, "--iface br-lan")?;
    crate::common::expect_service(lab, family)?;
    for (container, address) in [(&lab.client, family.client()), (&lab.guest, neighbour(family))] {
        if running.proxy().is_some() {
            expect(container, address, outside, Way::Proxied)?;
        }
        // More than a packet, both ways, and in fragments.
        let socket = peer::udp(container, at(address, 0))?;
        let (_, from) = peer::exchange(&socket, outside, &peer::pattern(4000))
            .with_context(|| format!("4,000 bytes over UDP from {address}"))?;
        ensure!(from == outside, "the reply came from {from}");
    }
    // From port to port of the bridge there is no router, and no proxy either.
    expect(&lab.client, family.client(), inside, Way::Forwarded).context("between two containers")?;
    let mut stream = peer::connect(&lab.client, None, at(family.anywhere(7), 7777), Duration::from_secs(5))?;
    for line in 0..20 {
        let (echo, _) = peer::ask(&mut stream, &line.to_string())?;
        ensure!(echo == line.to_string(), "the echo of {line} was {echo}");
    }
    running.expect_tcp(3)
}

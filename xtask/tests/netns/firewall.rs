//! The packet filter of a usual home router, of ufw and of firewalld stays in
//! force for what is passed; captured traffic needs the one line of the README (H11).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab, Namespace};

use crate::common::{SERVICE_PORT, Scenarios, at, expect_service, service, start_proxy};

pub(crate) const SCENARIOS: Scenarios = &[
    ("H11_nft_home_router", |lab, family| in_force(lab, family, &HOME)),
    ("H11_iptables_home_router", |lab, family| in_force(lab, family, &IPTABLES)),
    ("H11_ufw", |lab, family| in_force(lab, family, &UFW)),
    ("H11_firewalld", |lab, family| in_force(lab, family, &FIREWALLD)),
];

/// A rule set, and how to let captured traffic in: the line of the README with
/// the names of its table and chain.
struct Filter {
    load: fn(&Lab) -> Result<()>,
    accept: &'static [&'static str],
}

const IPTABLES_ACCEPT: &[&str] = &[
    "iptables -I INPUT -m mark --mark 0x1/0x1 -j ACCEPT",
    "ip6tables -I INPUT -m mark --mark 0x1/0x1 -j ACCEPT",
];

const HOME: Filter = Filter {
    load: |lab| nft(lab, include_str!("firewall/home.nft")),
    accept: &["nft insert rule inet filter input meta mark & 0x1 == 0x1 accept"],
};
const FIREWALLD: Filter = Filter {
    load: |lab| nft(lab, include_str!("firewall/firewalld.nft")),
    accept: &["nft insert rule inet firewalld filter_INPUT meta mark & 0x1 == 0x1 accept"],
};
const IPTABLES: Filter = Filter {
    load: |lab| {
        iptables(lab, "iptables-restore", include_str!("firewall/home.v4"))?;
        iptables(lab, "ip6tables-restore", include_str!("firewall/home.v6"))
    },
    accept: IPTABLES_ACCEPT,
};
const UFW: Filter = Filter {
    load: |lab| {
        iptables(lab, "iptables-restore", include_str!("firewall/ufw.v4"))?;
        iptables(lab, "ip6tables-restore", include_str!("firewall/ufw.v6"))
    },
    accept: IPTABLES_ACCEPT,
};

fn nft(lab: &Lab, rules: &str) -> Result<()> {
    lab.router.cmd("nft").args(["-f", "-"]).stdin(rules).check().map(drop)
}

fn iptables(lab: &Lab, restore: &str, rules: &str) -> Result<()> {
    lab.router.cmd(restore).stdin(rules).check().map(drop)
}

/// What the forward rules of every set refuse: this port outside.
const REFUSED: u16 = 7778;
/// A service of the router that only the LAN may use.
const ROUTER_PORT: u16 = 22;

fn connects(from: &Namespace, to: SocketAddr) -> bool {
    peer::connect(from, None, to, Duration::from_millis(700)).is_ok()
}

/// What the filter says of traffic that no proxy takes, to `passed` and its like.
fn expect_in_force(lab: &Lab, family: Family, passed: SocketAddr) -> Result<()> {
    ensure!(connects(&lab.client, passed), "the filter lets {passed} through, but it is not reached");
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (_, from) = peer::exchange(&socket, passed, b"hello")?;
    ensure!(from == passed, "{passed} was asked and {from} answered");
    let refused = at(passed.ip(), REFUSED);
    ensure!(!connects(&lab.client, refused), "the filter refuses {refused}, but it is reached");
    let inside = at(family.client(), SERVICE_PORT);
    ensure!(!connects(&lab.server, inside), "the filter refuses {inside} from outside, but it is reached");
    let router = at(family.router(), ROUTER_PORT);
    ensure!(connects(&lab.client, router), "the LAN may use port {ROUTER_PORT} of the router, but cannot");
    let router = at(family.uplink(), ROUTER_PORT);
    ensure!(!connects(&lab.server, router), "port {ROUTER_PORT} of the router is reached from outside");
    Ok(())
}

fn in_force(lab: &Lab, family: Family, filter: &Filter) -> Result<()> {
    let _service = service(lab, family)?;
    let passed = at(family.anywhere(0x0207), SERVICE_PORT);
    let _passed = UdpServer::echo(&lab.server, passed)?;
    let _refused = TcpServer::echo(&lab.server, at(family.unspecified(), REFUSED))?;
    let _router = TcpServer::echo(&lab.router, at(family.unspecified(), ROUTER_PORT))?;
    let _inside = TcpServer::echo(&lab.client, at(family.unspecified(), SERVICE_PORT))?;
    (filter.load)(lab)?;
    expect_service(lab, family).context("with the filter and no proxy")?;
    expect_in_force(lab, family, passed).context("with the filter and no proxy")?;

    let not_captured = format!("--iface lan --not-to {}", family.anywhere_net(2));
    let proxy = start_proxy(lab, &not_captured)?;
    let captured = at(family.anywhere(7), SERVICE_PORT);
    ensure!(
        !connects(&lab.client, captured),
        "captured traffic passes an input chain that does not accept it"
    );
    expect_in_force(lab, family, passed).context("with a proxy, before the README's line")?;
    for command in filter.accept {
        lab.router.sh(command)?;
    }
    expect_service(lab, family).context("with the README's line")?;
    let late = proxy.counter("steered_tcp_new")?;
    ensure!(late > 0, "the traffic went past the proxy");
    expect_in_force(lab, family, passed).context("with a proxy and the README's line")
}

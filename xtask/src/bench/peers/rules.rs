//! How iptables hands traffic to a program.

use anyhow::Result;
use xtask::lab::Lab;

use super::PORT;

/// TCP, as Documentation/networking/tproxy.rst of the kernel tells.
pub(super) fn tproxy_tcp(lab: &Lab) -> Result<()> {
    routes(lab)?;
    apply(lab, &["-t mangle -A PREROUTING -p tcp -m socket --transparent -j DIVERT"])?;
    apply(
        lab,
        &[&format!("-t mangle -A PREROUTING -i lan -p tcp -j TPROXY --on-port {PORT} --tproxy-mark 0x1/0x1")],
    )
}

/// TCP and UDP.
pub(super) fn tproxy(lab: &Lab) -> Result<()> {
    tproxy_tcp(lab)?;
    tproxy_udp(lab, PORT)
}

/// UDP, handed to a port; 0: that which it is for.
pub(super) fn tproxy_udp(lab: &Lab, port: u16) -> Result<()> {
    apply(
        lab,
        &[
            // Answers to what was sent as a client. Not on `lan`: a socket that answers a client from
            // a server's address would get what that sends next, and nobody reads there.
            "-t mangle -A PREROUTING -i wan -p udp -m socket --transparent -j DIVERT",
            &format!(
                "-t mangle -A PREROUTING -i lan -p udp -j TPROXY --on-port {port} --tproxy-mark 0x1/0x1"
            ),
        ],
    )
}

/// TCP, by address translation.
pub(super) fn redirect(lab: &Lab) -> Result<()> {
    apply(lab, &[&format!("-t nat -A PREROUTING -i lan -p tcp -j REDIRECT --to-ports {PORT}")])?;
    forget_ended_connections(lab)
}

/// Connection tracking, which any rule that asks for a state turns on, with counters:
/// the table that `conntrack -L` lists.
pub(super) fn count_flows(lab: &Lab) -> Result<()> {
    apply(lab, &["-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT"])?;
    lab.router.set_sysctls(&[("net/netfilter/nf_conntrack_acct", "1")])?;
    forget_ended_connections(lab)
}

/// They leave connection tracking's table at once: full, it would drop new ones.
fn forget_ended_connections(lab: &Lab) -> Result<()> {
    lab.router.set_sysctls(&[
        ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_close", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_last_ack", "1"),
    ])
}

/// What is marked is for this host.
pub(super) fn routes(lab: &Lab) -> Result<()> {
    apply(
        lab,
        &["-t mangle -N DIVERT", "-t mangle -A DIVERT -j MARK --set-mark 1", "-t mangle -A DIVERT -j ACCEPT"],
    )?;
    routing(lab)
}

/// The routing rule, and its route.
pub(super) fn routing(lab: &Lab) -> Result<()> {
    lab.router.sh("ip rule add fwmark 1 lookup 100")?;
    lab.router.sh("ip route add local 0.0.0.0/0 dev lo table 100").map(drop)
}

fn apply(lab: &Lab, rules: &[&str]) -> Result<()> {
    rules.iter().try_for_each(|rule| lab.router.sh(&format!("iptables {rule}")).map(drop))
}

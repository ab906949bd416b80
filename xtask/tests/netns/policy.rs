//! Rules: what becomes of flows, as client and server see it.

mod divert;
mod fate;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use xtask::lab::daemon::wait_for;
use xtask::lab::pace::{self, patience};
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::{Family, Lab, Namespace, server, url};

use crate::common::{Scenarios, at, needs_proxy};
use crate::matching::{reflectors, unused};
use crate::packet;
pub(crate) use fate::{
    Client, ConfigFile,
    Fate::{self, Dropped, Passed, Proxied, Rejected},
    all_reflectors, nets, reflectors_in, replace, start_with_rules, target, tcp_fate, within,
};
use fate::{PORT, expect};

pub(crate) const SCENARIOS: Scenarios = &[
    ("policy_first_match_decides", |lab, family| first_match(lab, family, "")),
    ("policy_of_own_traffic", own_traffic),
    ("policy_of_fragments", fragments),
    ("policy_with_faithful_handshakes", faithful),
    ("dns_hijack", divert::dns_hijack),
    ("clsact_policy_first_match_decides", |lab, family| first_match(lab, family, "--attach clsact")),
];

/// For both families at once.
pub(crate) const ONCE: Scenarios = &[
    ("captive_portal", divert::captive_portal),
    ("policy_by_files_of_networks", files),
    ("policy_by_interface", interfaces),
    ("policy_by_client_protocol_and_port", other_conditions),
];

/// `curl` of a URL that is refused.
fn expect_curl_refused(namespace: &Namespace, url: &str) -> Result<()> {
    let output = namespace
        .cmd("curl")
        .args(["--silent", "--max-time", &pace::seconds(5), url])
        .run()?
        .expect_code(7)?;
    ensure!(
        output.elapsed < patience(Duration::from_secs(1)),
        "the refusal came late, {}",
        output.describe()
    );
    Ok(())
}

fn first_match(lab: &Lab, family: Family, flags: &str) -> Result<()> {
    // The second rule is a part of what the fourth says.
    let rules = format!(
        "[[rule]]\nto = {}\naction = 'pass'\n\
         [[rule]]\nto = {:?}\naction = 'reject'\n\
         [[rule]]\nto = {}\naction = 'drop'\n\
         [[rule]]\nto = {}\naction = 'proxy'\n\
         [[rule]]\nto = {}\naction = 'drop'\n",
        nets(1),
        Family::ALL.map(|family| within(family, 2, 1).to_string()),
        nets(3),
        nets(2),
        nets(2),
    );
    let _servers = reflectors_in(lab, family, &[1, 2, 3, 4])?;
    let other = at(within(family, 2, 2), PORT);
    let _other = reflectors(&lab.server, &[other])?;
    let (proxy, _config) = start_with_rules(lab, flags, &rules)?;
    let client = Client::of(lab, family);
    client.expect_listed(&proxy, target(family, 1), Passed, Some(1))?;
    for counter in ["steered_tcp_new", "steered_established", "steered_udp", "lookup_assigned"] {
        ensure!(proxy.counter(counter)? == 0, "what is passed was steered: {counter}");
    }
    client.expect_listed(&proxy, target(family, 2), Rejected, Some(2))?;
    expect_curl_refused(&lab.client, &url(target(family, 2).ip(), PORT, "/"))?;
    ensure!(proxy.counter("policy_reset")? == 2, "two connections were refused");
    ensure!(proxy.counter("policy_dropped")? == 0, "nothing was dropped yet");
    client.expect_listed(&proxy, target(family, 3), Dropped, Some(3))?;
    ensure!(proxy.counter("policy_dropped")? >= 2, "a SYN and a datagram were dropped");
    client.expect_listed(&proxy, other, Proxied, Some(4))?;
    client.expect_listed(&proxy, target(family, 4), Proxied, None)
}

fn own_traffic(lab: &Lab, family: Family) -> Result<()> {
    let rules = format!(
        "[[rule]]\nto = {}\naction = 'pass'\n\
         [[rule]]\nto = {}\naction = 'reject'\n\
         [[rule]]\nto = {}\naction = 'drop'\n\
         [[rule]]\nto = {}\naction = 'divert'\ntarget = '127.0.0.1:8080'\n\
         [[rule]]\nto = {}\niface = 'lan'\naction = 'drop'\n",
        nets(1),
        nets(2),
        nets(3),
        nets(4),
        nets(5),
    );
    let _servers = reflectors_in(lab, family, &[1, 2, 3, 5])?;
    let _here = server::web(lab, &lab.router, &[8080])?;
    let _here_too = UdpServer::echo(&lab.router, at(Family::V4.loopback(), 8080))?;
    let (proxy, _config) = start_with_rules(lab, "--own-traffic", &rules)?;
    let router = Client { namespace: &lab.router, address: family.uplink() };
    router.expect_listed(&proxy, target(family, 1), Passed, Some(1))?;
    ensure!(proxy.counter("own_redirected")? == 0, "what is passed was turned back");
    router.expect_tcp(target(family, 2), Rejected)?;
    router.expect_listed(&proxy, target(family, 2), Rejected, Some(2))?;
    expect_curl_refused(&lab.router, &url(target(family, 2).ip(), PORT, "/"))?;
    router.expect_listed(&proxy, target(family, 3), Dropped, Some(3))?;
    expect_page(&lab.router, &url(target(family, 4).ip(), 80, "/"), "127.0.0.1 8080")?;
    let asked = at(within(family, 4, 1), 80);
    let socket = peer::udp(&lab.router, unused(family.uplink()))?;
    let (echo, from) = peer::exchange(&socket, asked, b"who is there?")?;
    ensure!(echo == b"who is there?" && from == asked, "{asked} was asked; {from} answered {echo:?}");
    // It arrives on no interface.
    router.expect_listed(&proxy, target(family, 5), Proxied, None)?;
    Client::of(lab, family).expect(target(family, 5), Dropped)
}

/// `curl` of a page of [`server::web`], which ends with the server's own address and port.
fn expect_page(namespace: &Namespace, url: &str, server: &str) -> Result<()> {
    expect_page_from(namespace, None, url, server)
}

fn expect_page_from(namespace: &Namespace, from: Option<IpAddr>, url: &str, server: &str) -> Result<()> {
    let mut command =
        namespace.cmd("curl").args(["--silent", "--show-error", "--max-time", &pace::seconds(5), url]);
    if let Some(from) = from {
        command = command.arg("--interface").arg(from.to_string());
    }
    let output = command.check()?;
    ensure!(
        output.stdout.trim_end().ends_with(server),
        "expected the page of {server}, {}",
        output.describe()
    );
    if let Some(from) = from {
        ensure!(output.stdout.starts_with(&from.to_string()), "not as {from}, {}", output.describe());
    }
    Ok(())
}

const LONG: usize = 4000;

/// Datagrams longer than a packet, their fragments in order and in reverse order.
fn fragments(lab: &Lab, family: Family) -> Result<()> {
    let rules = format!(
        "[[rule]]\nto = {}\naction = 'pass'\n\
         [[rule]]\nto = {}\naction = 'reject'\n\
         [[rule]]\nto = {}\naction = 'drop'\n\
         [[rule]]\nto = {}\naction = 'divert'\ntarget = '127.0.0.1:7001'\n",
        nets(1),
        nets(2),
        nets(3),
        nets(4),
    );
    let _here = UdpServer::echo(&lab.router, at(Family::V4.loopback(), 7001))?;
    let _echoes = [1, 3, 5]
        .map(|net| UdpServer::echo(&lab.server, target(family, net)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let (proxy, _config) = start_with_rules(lab, "", &rules)?;
    for (net, expected, proxied) in [
        (1, Passed, false),
        (2, Rejected, false),
        (3, Dropped, false),
        (4, Proxied, true),
        (5, Proxied, true),
    ] {
        let to = target(family, net);
        for reverse in [false, true] {
            let what = format!("4000 bytes to {to} ({expected:?}), in reverse order: {reverse}");
            let before = proxy.counter("lookup_assigned")?;
            let answer = send_in_fragments(lab, to, expected, family, reverse).context(what.clone())?;
            ensure!(answer == expected, "{what}: {answer:?}");
            let assigned = proxy.counter("lookup_assigned")? > before;
            ensure!(assigned == (proxied || expected == Rejected), "{what}: handed to the proxy: {assigned}");
        }
    }
    Ok(())
}

/// What becomes of a long datagram to an echo: [`Proxied`] also stands for passed there.
fn send_in_fragments(
    lab: &Lab,
    to: SocketAddr,
    expected: Fate,
    family: Family,
    reverse: bool,
) -> Result<Fate> {
    let datagram = peer::pattern(LONG);
    let socket = peer::udp(&lab.client, unused(family.client()))?;
    socket.set_read_timeout(Some(expected.wait()))?;
    socket.connect(to)?;
    if reverse {
        let mut packets = packet::udp_fragments(socket.local_addr()?, to, &datagram, 1400, 7)?;
        packets.reverse();
        packet::send(&lab.client, to.ip(), &packets)?;
    } else {
        socket.send(&datagram)?;
    }
    let mut buffer = vec![0; 65_536];
    match peer::receive(&socket, &mut buffer) {
        Ok((length, _)) if buffer[..length] == datagram => {
            Ok(if expected == Passed { Passed } else { Proxied })
        }
        Ok((length, _)) => bail!("{length} bytes came back, or they differ"),
        Err(error) => Fate::of(Err(error), to),
    }
}

fn faithful(lab: &Lab, family: Family) -> Result<()> {
    let rules = format!(
        "[steer]\nhandshake = 'faithful'\n\
         [[rule]]\nto = {}\naction = 'pass'\n\
         [[rule]]\nto = {}\naction = 'reject'\n\
         [[rule]]\nto = {}\naction = 'drop'\n\
         [[rule]]\nto = {}\nto_port = 80\naction = 'divert'\ntarget = '127.0.0.1:8080'\n\
         [[rule]]\nto = {}\naction = 'divert'\ntarget = '[::1]:9'\n",
        nets(1),
        nets(2),
        nets(3),
        nets(4),
        nets(4),
    );
    let _servers = reflectors_in(lab, family, &[1, 2, 3, 5])?;
    let _here = server::web(lab, &lab.router, &[8080])?;
    let (proxy, _config) = start_with_rules(lab, "", &rules)?;
    let client = Client::of(lab, family);
    for (net, fate, rule) in
        [(1, Passed, Some(1)), (2, Rejected, Some(2)), (3, Dropped, Some(3)), (5, Proxied, None)]
    {
        client.expect_listed(&proxy, target(family, net), fate, rule)?;
    }
    ensure!(proxy.counter("syn_set_aside")? == 1, "what is not proxied was set aside");
    expect_page(&lab.client, &url(within(family, 4, 9), 80, "/"), "127.0.0.1 8080")?;
    // Nobody listens at the target.
    expect_curl_refused(&lab.client, &url(within(family, 4, 9), 81, "/"))?;
    client.expect_udp(at(within(family, 4, 9), 9), Rejected)?;
    ensure!(proxy.counter("handshake_reset")? == 1, "the target's refusal is not counted");
    Ok(())
}

/// Networks that no destination of the lab is in, a line each.
pub(crate) fn other_networks(count: u16) -> String {
    (0..count)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            if n % 2 == 0 { format!("10.{high}.{low}.0/24\n") } else { format!("2001:db8:a000:{n:x}::/64\n") }
        })
        .collect()
}

fn files(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1, 2, 3])?;
    let of_net = |n: u8| Family::ALL.map(|family| family.anywhere_net(n) + "\n").concat();
    let passed = format!("# which are passed\n{}\n{}  # here\n", other_networks(5000), of_net(1).trim_end());
    fs::write(lab.dir().join("passed.txt"), passed)?;
    fs::write(lab.dir().join("refused.txt"), format!("{}{}", other_networks(3000), of_net(2)))?;
    let clients = Family::ALL.map(|family| format!("{}\n", family.client())).concat();
    fs::write(lab.dir().join("clients.txt"), clients)?;
    let hole = Family::ALL.map(|family| within(family, 2, 9).to_string());
    let rules = format!(
        "[[rule]]\nto_file = 'passed.txt'\naction = 'pass'\n\
         [[rule]]\nto_file = ['passed.txt', 'refused.txt']\nfrom_file = 'clients.txt'\nnot_to = {hole:?}\naction = 'reject'\n"
    );
    let (proxy, _config) = start_with_rules(lab, "", &rules)?;
    for family in Family::ALL {
        let spared = at(within(family, 2, 9), PORT);
        let _spared = reflectors(&lab.server, &[spared])?;
        let client = Client::of(lab, family);
        client.expect_listed(&proxy, target(family, 1), Passed, Some(1))?;
        client.expect_listed(&proxy, target(family, 2), Rejected, Some(2))?;
        client.expect_listed(&proxy, spared, Proxied, None)?;
        client.expect_listed(&proxy, target(family, 3), Proxied, None)?;
    }
    Ok(())
}

/// Plugs the second client in again, on an interface of this name.
pub(crate) fn plug_guest(lab: &Lab, device: &str) -> Result<()> {
    lab.router.ip_batch(&format!(
        "link add {device} type veth peer name eth0 netns {}\n\
         addr add 203.0.113.1/24 dev {device}\n\
         addr add 2001:db8:3::1/64 dev {device} nodad\n\
         link set {device} up\n",
        lab.guest.name()
    ))?;
    lab.guest.ip_batch(
        "addr add 203.0.113.2/24 dev eth0\n\
         addr add 2001:db8:3::2/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via 203.0.113.1\n\
         route add ::/0 via 2001:db8:3::1\n",
    )
}

/// How long a new interface may take to be captured.
const SOON: Duration = Duration::from_secs(2);

/// One that is there, and one that comes later.
fn interfaces(lab: &Lab, _: Family) -> Result<()> {
    needs_proxy()?;
    let _servers = all_reflectors(lab, &[1])?;
    let config = ConfigFile::new(
        lab,
        "[[rule]]\niface = 'lan'\nprotocol = 'udp'\naction = 'reject'\n\
         [[rule]]\niface = ['lan2', 'late*']\naction = 'reject'\n",
    )?;
    let proxy = config.launch(lab, "--iface l*").start()?;
    for family in Family::ALL {
        Client::guest(lab, family).expect_listed(&proxy, target(family, 1), Rejected, Some(2))?;
        Client::of(lab, family).expect_tcp(target(family, 1), Proxied)?;
        Client::of(lab, family).expect_udp(target(family, 1), Rejected)?;
    }
    for device in ["late0", "lan2"] {
        let old = if device == "late0" { "lan2" } else { "late0" };
        lab.router.ip_batch(&format!("link del {old}\n"))?;
        plug_guest(lab, device)?;
        for family in Family::ALL {
            let guest = Client::guest(lab, family);
            let mut latest = None;
            wait_for("the rule to hold on the new interface", SOON, || {
                let fate = tcp_fate(
                    &lab.guest,
                    unused(guest.address),
                    target(family, 1),
                    Duration::from_millis(500),
                );
                latest = Some(fate);
                Ok(matches!(latest, Some(Ok((Rejected, _)))))
            })
            .with_context(|| format!("{device}: the latest attempt: {latest:?}"))?;
            guest.expect_listed(&proxy, target(family, 1), Rejected, Some(2))?;
        }
    }
    Ok(())
}

fn other_conditions(lab: &Lab, _: Family) -> Result<()> {
    let _servers = all_reflectors(lab, &[1])?;
    let rules = "[[rule]]\nprotocol = 'tcp'\nfrom_port = '2000-2999'\naction = 'pass'\n\
                 [[rule]]\nprotocol = 'udp'\nto_port = [7, '7000-7100']\naction = 'pass'\n\
                 [[rule]]\nnot_from = ['192.0.2.2', '2001:db8:1::2']\naction = 'drop'\n";
    let (_proxy, _config) = start_with_rules(lab, "--iface lan2", rules)?;
    for family in Family::ALL {
        let (client, guest) = (Client::of(lab, family), Client::guest(lab, family));
        let to = target(family, 1);
        client.expect_udp(to, Passed)?;
        guest.expect_udp(to, Passed)?;
        client.expect_tcp(to, Proxied)?;
        guest.expect_tcp(to, Dropped)?;
        for (port, expected) in [(1999, Proxied), (2000, Passed), (2999, Passed), (3000, Proxied)] {
            let from = at(client.address, port);
            let found = tcp_fate(&lab.client, from, to, expected.wait())?;
            expect(&format!("a connection from {from}"), found, expected)?;
        }
    }
    Ok(())
}

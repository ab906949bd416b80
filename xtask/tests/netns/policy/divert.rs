//! Flows that are diverted: DNS of others answered here, a page for who is not known.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use xtask::lab::pace;
use xtask::lab::peer::{self, UdpServer};
use xtask::lab::sockets::Protocol;
use xtask::lab::{Family, Lab, server, url};

use super::fate::{Client, Fate::Rejected, start_with_rules};
use super::{expect_page, expect_page_from};
use crate::common::at;
use crate::matching::unused;

/// The question for [`server::NAME`], RFC 1035.
fn question(id: u16, family: Family) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in server::NAME.split('.') {
        query.push(u8::try_from(label.len()).unwrap_or(0));
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, family.pick(1, 28), 0, 1]);
    query
}

pub(super) fn dns_hijack(lab: &Lab, family: Family) -> Result<()> {
    let rules = "[[rule]]\nprotocol = 'udp'\nto_port = 53\naction = 'divert'\ntarget = '127.0.0.1:5353'\n\
                 [[rule]]\nprotocol = 'tcp'\nto_port = 53\naction = 'divert'\ntarget = '[::1]:5353'\n";
    let (outside, inside) = (
        [Family::V4.anywhere(80), Family::V6.anywhere(80)],
        [Family::V4.anywhere(81), Family::V6.anywhere(81)],
    );
    let _outside = server::dns(lab, &lab.server, outside)?;
    let inside_log = server::local_dns(lab, &lab.router, 5353, inside)?;
    let (proxy, _config) = start_with_rules(lab, "", rules)?;
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        for resolver in [family.anywhere(0x0808), family.server()] {
            let answer = server::dig(&lab.client, resolver, family, protocol)?;
            ensure!(inside.contains(&answer), "{resolver} answered {answer} over {}", protocol.name());
        }
    }
    // Nobody asked outside, and the target was asked by this host itself.
    let asked = inside_log.log();
    ensure!(asked.contains("127.0.0.1") && !asked.contains(&family.client().to_string()), "{asked}");

    // One port asks two resolvers at once, and then an address that is not hijacked.
    let resolvers = [at(family.anywhere(0x0808), 53), at(family.anywhere(0x0809), 53)];
    let other = at(family.anywhere(0x0808), 54);
    let _reflector = UdpServer::reflector(&lab.server, other)?;
    let socket = peer::udp(&lab.client, unused(family.client()))?;
    for round in 0..5 {
        for (resolver, number) in resolvers.iter().zip(0_u16..) {
            socket.send_to(&question(10 * round + number, family), resolver)?;
        }
        let mut answered = Vec::new();
        for _ in resolvers {
            let mut answer = [0; 512];
            let (length, from) = peer::receive(&socket, &mut answer).context("no answer")?;
            ensure!(length > 12 && answer[7] == 1, "no answer in {:?}", &answer[..length]);
            answered.push((from, u16::from_be_bytes([answer[0], answer[1]])));
        }
        answered.sort_unstable();
        let expected: Vec<_> = resolvers.iter().copied().zip(10 * round..).collect();
        ensure!(answered == expected, "round {round} was answered by {answered:?}, expected {expected:?}");
    }
    let (seen, from) = peer::exchange(&socket, other, b"who am I?")?;
    ensure!(
        from == other
            && String::from_utf8_lossy(&seen)
                .starts_with(at(family.client(), 0).to_string().trim_end_matches('0')),
        "{other} was asked; {from} sees {}",
        String::from_utf8_lossy(&seen)
    );
    let flow = proxy.flow("udp", &socket.local_addr()?.to_string(), &resolvers[0].to_string())?;
    ensure!(flow.action == "divert" && flow.rule == 1 && flow.packets_down == 5, "{flow:#?}");
    Ok(())
}

/// Another address of the client, which the portal knows.
const fn known(family: Family) -> &'static str {
    family.pick("192.0.2.77", "2001:db8:1::77")
}

pub(super) fn captive_portal(lab: &Lab, _: Family) -> Result<()> {
    let rules = "[[rule]]\nfrom = ['192.0.2.77', '2001:db8:1::77']\naction = 'proxy'\n\
                 [[rule]]\nprotocol = 'tcp'\nto_port = 80\naction = 'divert'\ntarget = '127.0.0.1:8080'\n\
                 [[rule]]\naction = 'reject'\n";
    lab.client.ip_batch("addr add 192.0.2.77/24 dev eth0\naddr add 2001:db8:1::77/64 dev eth0 nodad\n")?;
    let _outside = server::web(lab, &lab.server, &[80, 443])?;
    let _portal = server::web(lab, &lab.router, &[8080])?;
    let (proxy, config) = start_with_rules(lab, "", rules)?;
    for family in Family::ALL {
        let to = family.anywhere(1);
        let stranger = family.client().to_string();
        let as_stranger = |port| {
            lab.client
                .cmd("curl")
                .args(["--silent", "--max-time", &pace::seconds(5), "--interface"])
                .arg(&stranger)
                .arg(url(to, port, "/"))
        };
        let page = as_stranger(80).check()?;
        ensure!(page.stdout.trim_end().ends_with("127.0.0.1 8080"), "not the portal, {}", page.describe());
        as_stranger(443).run()?.expect_code(7)?;
        Client::of(lab, family).expect_udp(at(to, 123), Rejected)?;
        let guest: IpAddr = known(family).parse()?;
        for port in [80, 443] {
            expect_page_from(&lab.client, Some(guest), &url(to, port, "/"), &format!("{to} {port}"))?;
        }
        // The portal itself and this host's own services are reached as ever.
        expect_page(&lab.client, &url(family.router(), 8080, "/"), &format!("{} 8080", family.router()))?;
    }
    // One that has paid.
    let paid = Family::ALL.map(|family| family.client().to_string());
    config.write(&format!("[[rule]]\nfrom = {paid:?}\naction = 'pass'\n{rules}"))?;
    proxy.cmd("reload")?.check()?;
    for family in Family::ALL {
        let (from, to) = (family.client(), family.anywhere(1));
        expect_page_from(&lab.client, Some(from), &url(to, 443, "/"), &format!("{to} 443"))?;
    }
    Ok(())
}

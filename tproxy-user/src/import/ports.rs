//! Where rules lead: to the proxy, or to another service.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::rule::Action;

use super::condition::{Conditions, Dimension};
use super::flatten::{Flat, Lost, Outcome};
use super::settle::Decided;

/// Services whose port a REDIRECT names when it is not about a proxy: DNS, NTP, mDNS.
const SERVICES: [u16; 3] = [53, 123, 5353];

/// Ports that rules lead to: which are the proxy's, which those of other services.
#[derive(Debug, Default)]
pub(crate) struct Ports {
    /// Of TPROXY, which is always about a proxy.
    tproxy: BTreeSet<u16>,
    /// Of REDIRECT, where it is not about another service.
    redirect: BTreeSet<u16>,
}

impl Ports {
    /// All of these rules.
    #[must_use]
    pub(crate) fn of<'a>(flats: impl Iterator<Item = &'a Flat>) -> Self {
        let mut ports = Self::default();
        for flat in flats {
            match flat.outcome {
                Outcome::Proxy(port) => ports.tproxy.extend(port),
                Outcome::Redirect(port) => {
                    let asked = single_port(&flat.conditions);
                    let port = port.or(asked);
                    let service = [port, asked].into_iter().flatten().any(|port| SERVICES.contains(&port));
                    ports.redirect.extend(port.filter(|_| !service));
                }
                _ => {}
            }
        }
        ports
    }

    /// The port of the proxy, where it is told.
    #[must_use]
    pub(crate) fn proxy(&self) -> Option<u16> {
        self.tproxy.first().or_else(|| self.redirect.first().filter(|_| self.redirect.len() == 1)).copied()
    }

    /// What a reader should know of them.
    #[must_use]
    pub(crate) fn note(&self) -> Option<String> {
        let mut all = self.tproxy.clone();
        if self.redirect.len() == 1 {
            all.extend(&self.redirect);
        }
        (all.len() > 1).then(|| format!("ports {} are taken for those of one proxy", list(&all)))
    }

    /// The rules of the configuration for one of the chains: none where it is lost.
    pub(crate) fn decide(&self, flat: &Flat, lost: &mut Lost) -> Vec<Decided> {
        let mut fail = |why: String| {
            if let Some(source) = flat.sources.first() {
                lost.entry(*source).or_insert(why);
            }
            Vec::new()
        };
        let decided = |conditions: Conditions, action: Action| Decided {
            conditions,
            action,
            sources: flat.sources.iter().copied().collect(),
        };
        let divert = |ip: IpAddr, port: u16| {
            let conditions = flat.conditions.and(&Conditions::family(ip.is_ipv6()))?;
            Some(decided(conditions, Action::Divert(SocketAddr::new(ip, port).into())))
        };
        let port_of =
            |port: Option<u16>| port.or_else(|| single_port(&flat.conditions)).filter(|port| *port != 0);
        let no_port = "it keeps the port, of which there are several; a divert has one target";
        let action = match flat.outcome {
            Outcome::Pass => Action::Pass,
            Outcome::Drop => Action::Drop,
            Outcome::Reject => Action::Reject,
            Outcome::Proxy(_) => Action::Proxy(None),
            Outcome::Redirect(port) => match port_of(port) {
                None => return fail(no_port.to_owned()),
                Some(port) if self.tproxy.contains(&port) => Action::Proxy(None),
                Some(port) if self.redirect.contains(&port) && self.redirect.len() == 1 => {
                    Action::Proxy(None)
                }
                Some(port) if self.redirect.contains(&port) => {
                    return fail(format!(
                        "there is REDIRECT to ports {}: which of them is the proxy's cannot be told",
                        list(&self.redirect)
                    ));
                }
                Some(port) => {
                    let local = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                    return local.into_iter().filter_map(|ip| divert(ip, port)).collect();
                }
            },
            Outcome::Dnat(ip, port) => match port_of(port) {
                None => return fail(no_port.to_owned()),
                Some(port) => return divert(ip, port).into_iter().collect(),
            },
        };
        vec![decided(flat.conditions.clone(), action)]
    }
}

fn list(ports: &BTreeSet<u16>) -> String {
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}

/// The destination port, where conditions leave one.
fn single_port(conditions: &Conditions) -> Option<u16> {
    match conditions.get(Dimension::ToPort)?.as_slice() {
        [(first, last)] if first == last => u16::try_from(*first).ok(),
        _ => None,
    }
}

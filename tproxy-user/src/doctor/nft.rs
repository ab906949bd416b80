//! What the rules of `nft -j list ruleset` do to a packet, as far as that can be
//! told beforehand: a match that depends on more than is known of the packet may
//! hold or not.

mod matching;
mod walk;

use ipnet::IpNet;

use crate::config::Mark;
pub use crate::nft::Ruleset;
use crate::nft::{Base, Chain};

pub use walk::RULES;
use walk::Walk;

/// A packet, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<'a> {
    /// IPv6 (else IPv4).
    pub v6: bool,
    /// `tcp` or `udp`.
    pub protocol: &'a str,
    /// Interface it comes in on; empty: it is this host's.
    pub iif: &'a str,
    /// Interface it leaves by; empty: it is delivered here.
    pub oif: &'a str,
    /// Its mark.
    pub mark: u32,
    /// What connection tracking calls it, such as `new`.
    pub state: &'a str,
    /// Networks that its source address may be in; empty: not known.
    pub sources: &'a [IpNet],
}

/// What a rule does to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Drops or rejects it.
    Drop,
    /// Changes its mark so that it is no longer the same in the bits that count.
    MarkLost,
    /// Changes where it goes (`dnat`, `redirect`, `tproxy`, `fwd`).
    Rewrite,
    /// Changes its source (`masquerade`, `snat`).
    SourceNat,
    /// What the target of iptables-nft does that nft before 1.0.6 does not name.
    Untold,
    /// What comes after the first [`RULES`] rules.
    Unfinished,
}

/// How sure that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certainty {
    /// Every such packet.
    Certain,
    /// All but those that something which cannot be read may let pass.
    Opaque,
    /// Some.
    Possible,
}

/// A base chain that does something to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What.
    pub effect: Effect,
    /// How sure.
    pub certainty: Certainty,
    /// The base chain in which that is.
    pub chain: Chain,
}

impl Chain {
    /// The command that accepts what has a mark, before all other rules, in the
    /// words of the tool that made the chain.
    #[must_use]
    pub fn accept(&self, mark: Mark) -> String {
        let Self { family, table, name } = self;
        let built_in = ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"].contains(&&**name);
        match &**family {
            "ip" | "ip6" if built_in => {
                let tool = if family == "ip6" { "ip6tables" } else { "iptables" };
                format!("{tool} -t {table} -I {name} -m mark --mark {mark} -j ACCEPT")
            }
            _ => {
                let Mark { value, mask } = mark;
                format!(
                    "nft insert rule {family} {table} {name} meta mark and {mask:#x} == {value:#x} accept"
                )
            }
        }
    }
}

impl Base {
    fn sees(&self, packet: &Packet<'_>) -> bool {
        let family = match &*self.chain.family {
            "ip" => !packet.v6,
            "ip6" => packet.v6,
            "inet" | "netdev" => true,
            _ => false,
        };
        let at = if packet.iif.is_empty() { packet.oif } else { packet.iif };
        let is_at = |device: &String| match device.strip_suffix('*') {
            Some(prefix) => at.starts_with(prefix),
            None => device == at,
        };
        family && (self.devices.is_empty() || self.devices.iter().any(is_at))
    }
}

impl Ruleset {
    /// What the chains of a hook do to a packet.
    #[must_use]
    pub fn follow(&self, hook: &str, packet: &Packet<'_>) -> Vec<Found> {
        let bases = self.bases.iter().filter(|base| base.hook == hook && base.sees(packet));
        bases
            .flat_map(|base| {
                // It may be of another device.
                let opaque = base.is_of_device() && base.devices.is_empty();
                Walk::new(self, packet, &base.chain, opaque).through(base.drops)
            })
            .collect()
    }
}

//! Whether a match of a rule holds for a packet.

use serde_json::Value;

use super::Packet;
use crate::nft::{network, number};

/// Whether something holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    Yes,
    Maybe,
    No,
}

impl Packet<'_> {
    /// Whether a `match` expression holds.
    pub(super) fn matches(&self, content: &Value) -> Truth {
        let (left, right) = (&content["left"], &content["right"]);
        let equal = self.equal(left, right);
        match (content["op"].as_str(), equal) {
            (Some("==" | "in"), equal) => equal,
            (Some("!="), Truth::Yes) => Truth::No,
            (Some("!="), Truth::No) => Truth::Yes,
            _ => Truth::Maybe,
        }
    }

    fn equal(&self, left: &Value, right: &Value) -> Truth {
        if let Some(mark) = self.mark_of(left) {
            return number(right).map_or(Truth::Maybe, |wanted| truth(mark == wanted));
        }
        let payload = &left["payload"];
        let transport = payload["protocol"].as_str();
        if let Some("tcp" | "udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "udplite") = transport
            && transport != Some(self.protocol)
        {
            return Truth::No;
        }
        if let Some(version @ ("ip" | "ip6")) = transport
            && (version == "ip6") != self.v6
        {
            return Truth::No;
        }
        let known =
            match (left["meta"]["key"].as_str(), left["ct"]["key"].as_str(), payload["field"].as_str()) {
                (Some("iifname" | "iif"), ..) => self.iif,
                (Some("oifname" | "oif"), ..) => self.oif,
                (Some("l4proto"), ..) | (_, _, Some("protocol" | "nexthdr")) => self.protocol,
                (Some("nfproto"), ..) => {
                    if self.v6 {
                        "ipv6"
                    } else {
                        "ipv4"
                    }
                }
                (Some("protocol"), ..) => {
                    if self.v6 {
                        "ip6"
                    } else {
                        "ip"
                    }
                }
                (_, Some("state"), _) => self.state,
                (_, _, Some("saddr")) => return self.source(right),
                _ => return Truth::Maybe,
            };
        any(right, |element| match element.as_str() {
            // A set that has a name.
            Some(name) if name.starts_with('@') => Truth::Maybe,
            Some(pattern) => truth(match pattern.strip_suffix('*') {
                Some(prefix) => !known.is_empty() && known.starts_with(prefix),
                None => pattern == known,
            }),
            None => Truth::Maybe,
        })
    }

    /// The bits of the mark that an expression takes.
    fn mark_of(&self, left: &Value) -> Option<u32> {
        if left["meta"]["key"] == "mark" {
            return Some(self.mark);
        }
        let and = left["&"].as_array()?;
        (and.first()?["meta"]["key"] == "mark")
            .then(|| number(and.get(1)?))
            .flatten()
            .map(|mask| self.mark & mask)
    }

    fn source(&self, right: &Value) -> Truth {
        if self.sources.is_empty() {
            return Truth::Maybe;
        }
        any(right, |element| {
            let Some(net) = network(element) else { return Truth::Maybe };
            let of_family = self.sources.iter().filter(|own| own.addr().is_ipv6() == self.v6);
            let inside = of_family.clone().all(|own| net.contains(own));
            let touched = of_family.clone().any(|own| net.contains(own) || own.contains(&net));
            match (of_family.count() > 0, inside, touched) {
                (true, true, _) => Truth::Yes,
                (true, _, false) => Truth::No,
                _ => Truth::Maybe,
            }
        })
    }

    /// Whether the bits of the mark stay when this is written to it.
    pub(super) fn keeps_mark(&self, value: &Value) -> bool {
        let mark = self.mark;
        if let Some(new) = number(value) {
            return new & mark == mark;
        }
        let of = |operation: &str| {
            let operands = value[operation].as_array()?;
            (operands.first()?["meta"]["key"] == "mark").then(|| number(operands.get(1)?)).flatten()
        };
        value["meta"]["key"] == "mark"
            || of("|").is_some()
            || of("&").is_some_and(|kept| kept & mark == mark)
            || of("^").is_some_and(|turned| turned & mark == 0)
    }
}

fn truth(yes: bool) -> Truth {
    if yes { Truth::Yes } else { Truth::No }
}

/// The best of all elements of a set or list, or of a single value.
fn any(right: &Value, one: impl Fn(&Value) -> Truth) -> Truth {
    let elements = right["set"].as_array().or_else(|| right.as_array());
    let Some(elements) = elements else { return one(right) };
    let truths: Vec<_> = elements.iter().map(one).collect();
    [Truth::Yes, Truth::Maybe].into_iter().find(|truth| truths.contains(truth)).unwrap_or(Truth::No)
}

//! What `nft -j list ruleset` printed: chains, rules and sets, not yet judged.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// A chain, by the words that nft wants. Sets and maps are named in the same way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Chain {
    /// `ip`, `ip6`, `inet`, …
    pub family: String,
    /// The table that it is in.
    pub table: String,
    /// Its own name.
    pub name: String,
}

impl Chain {
    /// For people.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("chain {} of table {} {}", self.name, self.family, self.table)
    }

    fn of(value: &Value, name: &str) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Self { family: text("family"), table: text("table"), name: text(name) }
    }
}

/// A chain that packets come to by themselves.
#[derive(Clone, Debug)]
pub struct Base {
    /// Which.
    pub chain: Chain,
    /// Where on the way of packets, such as `prerouting`.
    pub hook: String,
    /// Of chains at one hook the lower comes first.
    pub priority: i64,
    /// Its policy is to drop.
    pub drops: bool,
    /// Of an `ingress` or `egress` chain; empty: nft (such as 1.0.6) does not tell.
    pub devices: Vec<String>,
}

impl Base {
    /// Whether it sees the packets of devices.
    #[must_use]
    pub fn is_of_device(&self) -> bool {
        matches!(&*self.hook, "ingress" | "egress")
    }
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its number, as `nft -a list ruleset` shows it.
    pub handle: u64,
    /// Matches and statements, in their order.
    pub expressions: Vec<Value>,
}

/// All rules of a network namespace.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Base chains, in no order.
    pub bases: Vec<Base>,
    /// Rules of each chain, in their order.
    pub rules: HashMap<Chain, Vec<Rule>>,
    /// Elements of sets and maps.
    pub sets: HashMap<Chain, Vec<Value>>,
}

impl Ruleset {
    /// Reads what `nft -j list ruleset` printed.
    #[must_use]
    pub fn parse(json: &Value) -> Self {
        let mut ruleset = Self::default();
        for item in json["nftables"].as_array().into_iter().flatten() {
            let (chain, rule) = (&item["chain"], &item["rule"]);
            if let Some(hook) = chain["hook"].as_str() {
                ruleset.bases.push(Base {
                    chain: Chain::of(chain, "name"),
                    hook: hook.to_owned(),
                    priority: chain["prio"].as_i64().unwrap_or_default(),
                    drops: chain["policy"] == "drop",
                    devices: devices(&chain["dev"]),
                });
            }
            if let Some(expressions) = rule["expr"].as_array() {
                let handle = rule["handle"].as_u64().unwrap_or_default();
                let rule_of = ruleset.rules.entry(Chain::of(rule, "chain")).or_default();
                rule_of.push(Rule { handle, expressions: expressions.clone() });
            }
            for set in [&item["set"], &item["map"]] {
                if let Some(elements) = set["elem"].as_array() {
                    ruleset.sets.insert(Chain::of(set, "name"), elements.clone());
                }
            }
        }
        ruleset
    }
}

/// A network or an address of a match or set.
#[must_use]
pub fn network(element: &Value) -> Option<IpNet> {
    let prefix = &element["prefix"];
    let length = prefix["len"].as_u64().and_then(|length| u8::try_from(length).ok());
    match (element.as_str(), prefix["addr"].as_str(), length) {
        (Some(address), ..) => address.parse::<IpAddr>().ok().map(IpNet::from),
        (_, Some(address), Some(length)) => IpNet::new(address.parse().ok()?, length).ok(),
        _ => None,
    }
}

/// A number of 32 bits.
#[must_use]
pub fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

/// One name, or a list of them.
fn devices(dev: &Value) -> Vec<String> {
    let names = dev.as_array().map_or(std::slice::from_ref(dev), Vec::as_slice);
    names.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

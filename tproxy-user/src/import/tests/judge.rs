//! What becomes of a packet by a configuration: a naive reading of its text.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;
use toml::{Table, Value};

use super::super::value;
use crate::config::file;

/// A packet, such as `eth0 tcp 192.0.2.1:1000 > 192.0.2.2:80`, or, of the host's own,
/// `own uid=5 udp …`; with `gid=…` (a name, too), `mac=…`, `dscp=…` and `mark=…` where they matter.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    /// The interface; `None`: the host sends it.
    pub(super) interface: Option<String>,
    pub(super) uid: u32,
    /// The group of the sending socket, where it is known.
    pub(super) gid: Option<String>,
    pub(super) mac: String,
    pub(super) dscp: u32,
    pub(super) mark: u32,
    pub(super) protocol: String,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
}

impl Packet {
    pub(super) fn parse(text: &str) -> Self {
        let (values, words): (Vec<_>, Vec<_>) =
            text.split_whitespace().filter(|word| *word != ">").partition(|word| word.contains('='));
        let value = |key: &str| values.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let number = |key: &str| value(key).map_or(0, |value| value.parse().expect("a number"));
        let [interface, protocol, from, to] = words[..] else { panic!("{text}") };
        Self {
            interface: Some(interface.to_owned()).filter(|name| name != "own"),
            uid: number("uid"),
            gid: value("gid").map(str::to_owned),
            mac: value("mac").unwrap_or_default().to_owned(),
            dscp: number("dscp"),
            mark: number("mark"),
            protocol: protocol.to_owned(),
            from: from.parse().expect("an address"),
            to: to.parse().expect("an address"),
        }
    }
}

/// A configuration.
pub(super) struct Judge {
    text: String,
    config: Table,
}

impl Judge {
    /// One that tproxy accepts.
    pub(super) fn new(text: &str) -> Self {
        if let Err(error) = file::parse(text.as_bytes(), Path::new("imported.toml")) {
            panic!("{error}\n{text}");
        }
        let config = text.parse().unwrap_or_else(|error| panic!("{error}\n{text}"));
        Self { text: text.to_owned(), config }
    }

    pub(super) fn expect(&self, cases: &[(&str, &str)]) {
        for (packet, expected) in cases {
            assert_eq!(self.judge(&Packet::parse(packet)), *expected, "{packet} by\n{}", self.text);
        }
    }

    /// A key of `[steer]`.
    pub(super) fn steer(&self, key: &str) -> Option<String> {
        self.config.get("steer")?.get(key).map(ToString::to_string)
    }

    pub(super) fn rules(&self) -> usize {
        self.config["rule"].as_array().map_or(0, Vec::len)
    }

    pub(super) fn captures(&self, own: bool) -> bool {
        let capture = &self.config["capture"];
        if own { capture["own_traffic"] == Value::Boolean(true) } else { capture.get("interfaces").is_some() }
    }

    pub(super) fn judge(&self, packet: &Packet) -> String {
        let capture = self.config["capture"].as_table().expect("a table");
        let meets = |key: &str, one: &dyn Fn(&str) -> bool| {
            capture.get(key).is_none_or(|value| list(value).iter().any(|value| one(value)))
        };
        let family = if packet.to.is_ipv4() { "ipv4" } else { "ipv6" };
        let on = self.captures(packet.interface.is_none())
            && packet
                .interface
                .as_ref()
                .is_none_or(|name| meets("interfaces", &|pattern| is_name(pattern, name)));
        if !(on
            && meets("protocols", &|name| name == packet.protocol)
            && meets("families", &|name| name == family))
        {
            return "pass".to_owned();
        }
        let rules = self.config.get("rule").and_then(Value::as_array).into_iter().flatten();
        let mut rules = rules.map(|rule| rule.as_table().expect("a table"));
        let Some(rule) = rules.find(|rule| matches(rule, packet)) else { return "proxy".to_owned() };
        let target = rule.get("target").and_then(Value::as_str).map(|target| format!(" {target}"));
        format!("{}{}", rule["action"].as_str().expect("a string"), target.unwrap_or_default())
    }
}

fn matches(rule: &Table, packet: &Packet) -> bool {
    rule.iter().all(|(key, value)| {
        let values = list(value);
        let any = |one: &dyn Fn(&str) -> bool| values.iter().any(|value| one(value));
        let inside =
            |address: IpAddr| any(&|net| net.parse::<IpNet>().expect("a network").contains(&address));
        let number = |number: u32| {
            any(&|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                // The name of a group is no number.
                let ends = first.parse::<u32>().ok().zip(last.parse().ok());
                ends.is_some_and(|(first, last)| (first..=last).contains(&number))
            })
        };
        match &**key {
            "action" | "target" => true,
            "protocol" => any(&|name| name == packet.protocol),
            "from" => inside(packet.from.ip()),
            "not_from" => !inside(packet.from.ip()),
            "to" => inside(packet.to.ip()),
            "not_to" => !inside(packet.to.ip()),
            "from_port" => number(packet.from.port().into()),
            "to_port" => number(packet.to.port().into()),
            "iface" => packet.interface.as_ref().is_some_and(|name| any(&|pattern| is_name(pattern, name))),
            "uid" => packet.interface.is_none() && number(packet.uid),
            "gid" => packet
                .gid
                .as_ref()
                .filter(|_| packet.interface.is_none())
                .is_some_and(|gid| gid.parse().map_or_else(|_| any(&|name| name == gid), number)),
            "mark" => any(&|mark| value::mark(mark).expect("a mark").expect("possible").matches(packet.mark)),
            "mac" => any(&|mac| mac == packet.mac),
            "dscp" => number(packet.dscp),
            _ => panic!("key {key}"),
        }
    })
}

fn is_name(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |beginning| name.starts_with(beginning))
}

/// One value, or a list, as text.
fn list(value: &Value) -> Vec<String> {
    let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    values.iter().map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect()
}

//! Values of the config file: words, and what is written as text or as a number.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cli::parse;
use crate::config::Mark;
use crate::policy::domains::Pattern;

/// A protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// Least severity of what is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Errors (-qq).
    Error,
    /// Warnings too (-q).
    Warn,
    /// What an operator wants to know.
    Info,
    /// What it does (-v).
    Debug,
    /// Every step (-vv).
    Trace,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogForm {
    /// For people.
    Text,
    /// An object a line.
    Json,
}

/// Users or groups of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ids {
    /// An inclusive range of ids.
    Range(u32, u32),
    /// A name, to be looked up.
    Name(String),
}

impl Ids {
    /// `of` is `user` or `group`.
    fn parse(text: &str, of: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok();
        let range = text.split_once('-').and_then(|(first, last)| Some((number(first)?, number(last)?)));
        match (number(text), range) {
            (Some(id), _) => Ok(Self::Range(id, id)),
            (_, Some((first, last))) if first <= last => Ok(Self::Range(first, last)),
            (_, Some((first, last))) => Err(format!("the range is backwards; expected {last}-{first}")),
            (None, None) if text.is_empty() || text.contains([':', '/', '\0']) => Err(format!(
                "expected a {of} id such as 1000, a range such as 1000-1999, or the name of a {of}"
            )),
            (None, None) => Ok(Self::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(first, last) => f.write_str(&range(first, last)),
            Self::Name(name) => f.write_str(name),
        }
    }
}

fn range<N: PartialEq + fmt::Display>(first: &N, last: &N) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

fn time(time: &Duration) -> String {
    humantime::format_duration(*time).to_string().replace(' ', "")
}

/// A path below `/sys/fs/cgroup`, or the name of a systemd unit.
fn cgroup(text: &str) -> Result<String, String> {
    if text.trim_matches('/').is_empty() || text.contains('\0') || text.split('/').any(|part| part == "..") {
        return Err("expected a systemd unit such as sshd.service, or a path below /sys/fs/cgroup".to_owned());
    }
    Ok(text.to_owned())
}

/// A type each for what a parser accepts: text, or a number as it is.
macro_rules! values {
    ($($(#[doc = $doc:literal])+ $name:ident($of:ty) = $parse:expr, $print:expr;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name(pub $of);

        impl From<$name> for $of {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl From<$of> for $name {
            fn from(value: $of) -> Self {
                Self(value)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Parsed($parse)).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let print: fn(&$of) -> String = $print;
                let text = print(&self.0);
                match text.parse::<u32>() {
                    Ok(number) if number.to_string() == text => serializer.serialize_u32(number),
                    _ => serializer.serialize_str(&text),
                }
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "description": concat!($($doc),+).trim(), "type": ["string", "integer"] })
            }
        }
    )+};
}

values! {
    /// The name of an interface, or a glob such as "wg*".
    Interface(String) = parse::interface, String::clone;
    /// A port, or a range such as "1000-2000".
    Ports((u16, u16)) = parse::ports, |(first, last)| range(first, last);
    /// A network such as `"192.0.2.0/24"` or `"2001:db8::/32"`, or an address.
    Network(IpNet) = parse::cidr, IpNet::to_string;
    /// An IP address.
    Address(IpAddr) = parse::ip, IpAddr::to_string;
    /// A port.
    Port(u16) = parse::port, u16::to_string;
    /// VALUE[/MASK], decimal or 0x hex; without MASK all bits count.
    SteerMark(Mark) = parse::mark, Mark::to_string;
    /// A number of 32 bits, decimal or 0x hex.
    OwnMark(u32) = parse::number, |mark| format!("{mark:#x}");
    /// The number of a routing table of its own.
    Table(u32) = parse::table, u32::to_string;
    /// A number from 1 to 32765.
    Priority(u32) = parse::priority, u32::to_string;
    /// An absolute path.
    Directory(PathBuf) = parse::pin, |path| path.to_string_lossy().into_owned();
    /// A number with its unit, such as "300s", "5m" or "1h30m".
    Time(Duration) = parse::duration, time;
    /// A number with its unit, such as "300s", "5m" or "1h30m"; zero, too.
    TimeOrZero(Duration) = parse::duration_or_zero, time;
    /// A number, at least 1.
    Count(u32) = parse::count, u32::to_string;
    /// A number.
    CountOrZero(u32) = parse::count_or_zero, u32::to_string;
    /// A number from 1024 to 16777216.
    FlowEntries(u32) = parse::flow_entries, u32::to_string;
    /// A number from 1 to 64.
    Workers(u32) = parse::workers, u32::to_string;
    /// VALUE[/MASK], decimal or 0x hex; without MASK all bits count. The value may be 0.
    AnyMark(Mark) = parse::any_mark, Mark::to_string;
    /// A link-layer address such as "02:00:5e:00:53:01".
    Mac([u8; 6]) = parse::mac, |mac| mac.map(|byte| format!("{byte:02x}")).join(":");
    /// A number from 0 to 63, or a name: cs0 to cs7, af11 to af43, ef, va, le or be.
    Dscp(u8) = parse::dscp, u8::to_string;
    /// A user id, a range such as "1000-1999", or the name of a user.
    Uid(Ids) = |text| Ids::parse(text, "user"), Ids::to_string;
    /// A group id, a range such as "1000-1999", or the name of a group.
    Gid(Ids) = |text| Ids::parse(text, "group"), Ids::to_string;
    /// A systemd unit such as "sshd.service", or a path below /sys/fs/cgroup.
    Cgroup(String) = cgroup, String::clone;
    /// A name such as "example.org", or "*.example.org" for all names below it.
    Domain(Pattern) = Pattern::parse, Pattern::to_string;
    /// An address and a port, such as `"127.0.0.53:53"` or `"[::1]:53"`.
    Target(SocketAddr) = parse::target, SocketAddr::to_string;
}

/// What a parser makes of a text. Its error names the text, as clap does for flags.
struct Parsed<T>(fn(&str) -> Result<T, String>);

impl<T> Visitor<'_> for Parsed<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a number")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        self.0(text).map_err(|why| E::custom(format_args!("'{text}': {why}")))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

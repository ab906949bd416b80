//! A packet in words, such as `tcp 192.168.1.5:1234 > 1.1.1.1:443 iface br-lan`, and what
//! else rules may ask for: `domain`, `mac`, `dscp`, `mark`, and of what this host sends `uid`,
//! `gid`, `cgroup`.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use tproxy_common::abi::{TCP, UDP};

use crate::cli::parse;

use super::domains::Pattern;

/// What `check --packet` asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// TCP or UDP.
    pub protocol: u8,
    /// Who sends it.
    pub source: SocketAddr,
    /// Where to, of the same family.
    pub destination: SocketAddr,
    /// Where it comes from; `None`: not said.
    pub origin: Option<Origin>,
    /// Its link-layer source address.
    pub mac: Option<[u8; 6]>,
    /// Its codepoint.
    pub dscp: u8,
    /// Its mark.
    pub mark: u32,
    /// Who owns the socket that sends it.
    pub uid: Option<u32>,
    /// The group of the process that made that socket.
    pub gid: Option<u32>,
    /// The control group of that socket, below `/sys/fs/cgroup`.
    pub cgroup: Option<String>,
    /// The name that the flow is for; `None`: none is found.
    pub domain: Option<String>,
}

/// Where a packet comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It arrives on this interface.
    Interface(String),
    /// This host sends it.
    Own,
}

const EXPECTED: &str =
    "expected such as 'tcp 192.168.1.5:1234 > 1.1.1.1:443 iface br-lan', or 'own' instead of 'iface NAME'";

impl FromStr for Question {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace();
        let protocol = match words.next() {
            Some("tcp") => TCP,
            Some("udp") => UDP,
            Some(other) => return Err(format!("'{other}' is neither tcp nor udp; {EXPECTED}")),
            None => return Err(EXPECTED.to_owned()),
        };
        let source = endpoint(words.next())?;
        if words.next() != Some(">") {
            return Err(format!("after the source there is no '>'; {EXPECTED}"));
        }
        let destination = endpoint(words.next())?;
        if source.is_ipv4() != destination.is_ipv4() {
            return Err("source and destination are of different families".to_owned());
        }
        let mut question = Self {
            protocol,
            source,
            destination,
            origin: None,
            mac: None,
            dscp: 0,
            mark: 0,
            uid: None,
            gid: None,
            cgroup: None,
            domain: None,
        };
        while let Some(key) = words.next() {
            if key == "own" {
                question.origin = Some(Origin::Own);
                continue;
            }
            let value = words.next();
            let named = |error: String| format!("{key} '{}': {error}", value.unwrap_or_default());
            let value = value.ok_or_else(|| format!("'{key}' has no value; {EXPECTED}"))?;
            match key {
                "iface" => {
                    let name = parse::interface(value).map_err(named)?;
                    question.origin = Some(Origin::Interface(name));
                }
                "mac" => question.mac = Some(parse::mac(value).map_err(named)?),
                "dscp" => question.dscp = parse::dscp(value).map_err(named)?,
                "mark" => question.mark = parse::number(value).map_err(named)?,
                "uid" => question.uid = Some(parse::number(value).map_err(named)?),
                "gid" => question.gid = Some(parse::number(value).map_err(named)?),
                "cgroup" => question.cgroup = Some(value.trim_matches('/').to_owned()),
                "domain" => {
                    let name = Pattern::parse(value).map_err(named)?.to_string();
                    if name.starts_with('*') {
                        return Err(format!("domain '{value}': a flow is for one name, such as example.org"));
                    }
                    question.domain = Some(name);
                }
                _ => return Err(format!("'{key}' says nothing here; {EXPECTED}")),
            }
        }
        Ok(question)
    }
}

fn endpoint(word: Option<&str>) -> Result<SocketAddr, String> {
    let word = word.ok_or(EXPECTED)?;
    word.parse().map_err(|_| {
        format!("'{word}' is no address with a port, such as 192.0.2.1:443 or [2001:db8::1]:443")
    })
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.protocol == TCP { "tcp" } else { "udp" };
        write!(f, "{protocol} {} > {}", self.source, self.destination)?;
        match &self.origin {
            None => Ok(()),
            Some(Origin::Own) => f.write_str(" own"),
            Some(Origin::Interface(name)) => write!(f, " iface {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_and_written_alike() {
        for text in [
            "tcp 192.168.1.5:1234 > 1.1.1.1:443 iface br-lan",
            "udp [2001:db8::1]:5 > [2001:db8::2]:53 own",
            "tcp 192.168.1.5:1234 > 1.1.1.1:443",
        ] {
            assert_eq!(text.parse::<Question>().map(|question| question.to_string()), Ok(text.to_owned()));
        }
        let all =
            "udp 1.1.1.1:1 > 1.1.1.1:1 own mac 02:00:00:00:00:01 dscp ef mark 0x10 uid 7 gid 8 cgroup /a/b";
        let question: Question = all.parse().expect("a packet");
        assert_eq!((question.mac, question.dscp, question.mark), (Some([2, 0, 0, 0, 0, 1]), 46, 16));
        assert_eq!((question.uid, question.gid, question.cgroup.as_deref()), (Some(7), Some(8), Some("a/b")));
    }

    #[test]
    fn what_is_no_packet_is_told() {
        for (text, part) in [
            ("", "expected such as"),
            ("icmp 1.1.1.1:1 > 1.1.1.1:1", "'icmp' is neither tcp nor udp"),
            ("tcp 1.1.1.1 > 1.1.1.1:1", "'1.1.1.1' is no address with a port"),
            ("tcp 1.1.1.1:1 1.1.1.1:1", "no '>'"),
            ("tcp 1.1.1.1:1 > [::1]:1", "different families"),
            ("tcp 1.1.1.1:1 > 1.1.1.1:1 from lan", "'from' says nothing"),
            ("tcp 1.1.1.1:1 > 1.1.1.1:1 iface", "'iface' has no value"),
            ("tcp 1.1.1.1:1 > 1.1.1.1:1 iface a/b", "iface 'a/b': expected the name"),
            ("tcp 1.1.1.1:1 > 1.1.1.1:1 dscp 64", "dscp '64': "),
            ("tcp 1.1.1.1:1 > 1.1.1.1:1 domain *.a", "a flow is for one name"),
        ] {
            let error = text.parse::<Question>().expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

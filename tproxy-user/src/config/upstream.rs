//! Ways to reach destinations.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

/// A way to reach destinations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Upstream {
    /// Straight.
    #[default]
    Direct,
    /// Through a proxy server.
    Proxy(Arc<Proxy>),
    /// By one of several others.
    Group(Arc<Group>),
}

/// Upstreams of which one is chosen for each flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What rules, logs and `status` call it.
    pub name: Arc<str>,
    /// At least one; none is a group.
    pub members: Vec<Upstream>,
    /// Which of those that work.
    pub policy: Policy,
}

/// How a member is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The first that works.
    #[default]
    Failover,
    /// Each in turn.
    RoundRobin,
    /// The one that was connected to the fastest.
    LeastLatency,
    /// The same for all flows of a client's address.
    SourceHash,
}

/// How it is found out whether a proxy server works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// From one check to the next.
    pub interval: Duration,
    /// The longest that one takes.
    pub timeout: Duration,
    /// After so many failures in a row it does not work.
    pub fall: u32,
    /// After so many successes in a row it works again.
    pub rise: u32,
    /// What is tried.
    pub by: CheckBy,
}

/// What a check tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckBy {
    /// A connection to the server.
    Connect,
    /// What is said there before a request: method and password of SOCKS5; of HTTP, `OPTIONS *`.
    Handshake,
    /// A connection through the server to this address.
    Request(SocketAddr),
}

impl Default for Check {
    fn default() -> Self {
        let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(3));
        Self { interval, timeout, fall: 3, rise: 2, by: CheckBy::Handshake }
    }
}

/// A proxy server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// What rules, logs and `status` call it.
    pub name: Arc<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it is.
    pub host: Host,
    /// The port that it listens on.
    pub port: u16,
    /// What it knows this client by.
    pub credentials: Option<Credentials>,
    /// What becomes of UDP flows, where it cannot carry them.
    pub udp: Udp,
    /// How it is found out whether it works; `None`: by the flows that go through it.
    pub check: Option<Check>,
}

/// What a proxy server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// SOCKS5 (RFC 1928): TCP, and UDP where the server has it.
    Socks5,
    /// HTTP CONNECT (RFC 9110, section 9.3.6): TCP alone.
    Http,
}

/// An address, or a name that has some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// An address.
    Address(IpAddr),
    /// A name, to be looked up.
    Name(Arc<str>),
}

/// User and password (RFC 1929, RFC 7617).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user, 1 to 255 bytes.
    pub username: Arc<str>,
    /// The password, at most 255 bytes.
    pub password: Secret,
}

/// What becomes of UDP flows that a proxy server cannot carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Udp {
    /// Their clients are told that nobody listens (ICMP port unreachable).
    #[default]
    Reject,
    /// The kernel forwards them.
    Pass,
    /// They are relayed to their destinations.
    Direct,
}

/// What a server is told of the client by the PROXY protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SendProxy {
    /// Nothing.
    #[default]
    Off,
    /// In a line of text, at the beginning of TCP connections.
    V1,
    /// In binary form, at the beginning of TCP connections and before each datagram.
    V2,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

/// What names an upstream: it itself, or one that is defined elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// One that the text says all about.
    Here(Upstream),
    /// The name of another.
    Name(String),
}

impl Upstream {
    /// What rules, logs and `status` call it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::Proxy(proxy) => &proxy.name,
            Self::Group(group) => &group.name,
        }
    }

    /// Whether its server is given by a name.
    #[must_use]
    pub fn has_name(&self) -> bool {
        match self {
            Self::Direct => false,
            Self::Proxy(proxy) => matches!(proxy.host, Host::Name(_)),
            Self::Group(group) => group.members.iter().any(Self::has_name),
        }
    }

    /// Whether the kernel is to forward UDP flows, because it cannot carry them.
    #[must_use]
    pub fn passes_udp(&self) -> bool {
        match self {
            Self::Direct => false,
            Self::Proxy(proxy) => !proxy.may_carry_udp() && proxy.udp == Udp::Pass,
            Self::Group(group) => group.members.iter().all(Self::passes_udp),
        }
    }
}

impl Proxy {
    /// Reads `SCHEME://[USER:PASSWORD@]HOST[:PORT]`. Without these the URL is its name.
    ///
    /// # Errors
    /// What was expected. The text is not repeated, for it may have a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected socks5://HOST[:PORT] or http://HOST:PORT";
        let url = Url::parse(text).map_err(|error| format!("{error}; {EXPECTED}"))?;
        let protocol = match url.scheme() {
            "socks5" | "socks5h" => Protocol::Socks5,
            "http" => Protocol::Http,
            other => return Err(format!("'{other}' is no protocol of an upstream; {EXPECTED}")),
        };
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(format!("there is something behind the host; {EXPECTED}"));
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or(EXPECTED)?;
        let port = match (url.port(), protocol) {
            (Some(0), _) => return Err("port 0 is no port to connect to".to_owned()),
            (Some(port), _) => port,
            // The port that IANA has registered for SOCKS.
            (None, Protocol::Socks5) => 1080,
            // That of web servers is rarely a proxy's, and the parser does not tell whether it was written.
            (None, Protocol::Http) if text.trim_end_matches('/').ends_with(":80") => 80,
            (None, Protocol::Http) => {
                return Err("name the port, such as http://HOST:3128".to_owned());
            }
        };
        let credentials = match (url.username(), url.password()) {
            ("", None) => None,
            (username, password) => {
                Some(Credentials::new(&decoded(username)?, &decoded(password.unwrap_or_default())?)?)
            }
        };
        let name = "".into();
        let proxy = Self {
            name,
            protocol,
            host: Host::parse(host)?,
            port,
            credentials,
            udp: Udp::default(),
            check: None,
        };
        Ok(Self { name: proxy.url().into(), ..proxy })
    }

    /// Whether it carries UDP flows, as far as that is known without asking it.
    #[must_use]
    pub fn may_carry_udp(&self) -> bool {
        self.protocol == Protocol::Socks5
    }

    /// Without user and password.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}:{}", self.protocol, self.host, self.port)
    }
}

/// Percent-decoding (RFC 3986, section 2.1).
fn decoded(text: &str) -> Result<String, String> {
    let text = percent_encoding::percent_decode_str(text).decode_utf8();
    text.map(Into::into).map_err(|_| "user and password are to be UTF-8 text".to_owned())
}

impl Host {
    fn parse(text: &str) -> Result<Self, String> {
        let address = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = address.parse() {
            return Ok(Self::Address(address));
        }
        match idna::domain_to_ascii_strict(text) {
            Ok(name) if name.len() <= 253 => Ok(Self::Name(name.into())),
            _ => Err(format!("'{text}' is neither an address nor a name of a host")),
        }
    }
}

impl Credentials {
    /// As the protocols have them.
    ///
    /// # Errors
    /// What is too long or has a character that cannot be sent.
    pub fn new(username: &str, password: &str) -> Result<Self, String> {
        if username.is_empty() || username.len() > 255 {
            return Err("the user of an upstream has 1 to 255 bytes".to_owned());
        }
        if password.len() > 255 {
            return Err("the password of an upstream has at most 255 bytes".to_owned());
        }
        if username.contains(char::is_control) || password.contains(char::is_control) {
            return Err("user and password of an upstream have no control characters".to_owned());
        }
        Ok(Self { username: username.into(), password: Secret(password.into()) })
    }
}

impl Secret {
    /// The text, for who needs it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Reference {
    /// Reads `direct`, the URL of a proxy server, or a name.
    ///
    /// # Errors
    /// What was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "direct" {
            return Ok(Self::Here(Upstream::Direct));
        }
        if !text.contains("://") {
            return name(text).map(Self::Name);
        }
        Proxy::parse(text).map(|proxy| Self::Here(Upstream::Proxy(proxy.into())))
    }
}

/// The name of an upstream.
///
/// # Errors
/// What was expected.
pub fn name(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if text.is_empty() || text.len() > 64 || !text.bytes().all(fits) {
        return Err(
            "expected direct, a URL such as socks5://10.0.0.2:1080, or the name of an [[upstream]]: up to 64 letters, digits, '-', '_' and '.'"
                .to_owned(),
        );
    }
    Ok(text.to_owned())
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failover => "failover",
            Self::RoundRobin => "round-robin",
            Self::LeastLatency => "least-latency",
            Self::SourceHash => "source-hash",
        })
    }
}

impl fmt::Display for SendProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Socks5 => "socks5",
            Self::Http => "http",
        })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Proxy {
    /// Its name and where it is, without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url();
        if url == *self.name { f.write_str(&url) } else { write!(f, "{} ({url})", self.name) }
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str(self.name()),
            Self::Proxy(proxy) => proxy.fmt(f),
            Self::Group(group) => {
                let members: Vec<_> = group.members.iter().map(Self::name).collect();
                write!(f, "{} ({} of {})", group.name, group.policy, members.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(text: &str) -> Proxy {
        Proxy::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn urls_are_read_and_shown_without_secrets() {
        for (text, shown) in [
            ("socks5://10.0.0.2", "socks5://10.0.0.2:1080"),
            ("socks5://[2001:db8::2]:9050", "socks5://[2001:db8::2]:9050"),
            ("socks5h://exit.example.org:1", "socks5://exit.example.org:1"),
            ("http://proxy.example.org:80/", "http://proxy.example.org:80"),
            ("http://u:p%40@10.0.0.2:3128", "http://10.0.0.2:3128"),
        ] {
            assert_eq!(proxy(text).to_string(), shown);
        }
        let credentials = proxy("socks5://al%69ce:s%3Aecret@h").credentials.expect("some");
        assert_eq!((&*credentials.username, credentials.password.reveal()), ("alice", "s:ecret"));
        assert!(!format!("{credentials:?}").contains("s:ecret"));
    }

    #[test]
    fn what_is_no_url_of_an_upstream_is_refused() {
        for (text, expected) in [
            ("ftp://h:1", "'ftp' is no protocol"),
            ("socks5://", "expected socks5://HOST"),
            ("socks5://h:0", "port 0"),
            ("socks5://h:70000", "invalid port"),
            ("socks5://h:1/x", "behind the host"),
            ("socks5://a_b%20:1", "neither an address nor a name"),
            ("http://h", "name the port"),
            ("socks5://:secret@h", "1 to 255 bytes"),
            ("socks5://u:a%0ab@h", "control characters"),
        ] {
            let error = Proxy::parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_reference_is_direct_a_url_or_a_name() {
        assert_eq!(Reference::parse("direct"), Ok(Reference::Here(Upstream::Direct)));
        assert_eq!(Reference::parse("exit-1"), Ok(Reference::Name("exit-1".to_owned())));
        let Ok(Reference::Here(upstream)) = Reference::parse("socks5://u:p@10.0.0.2") else { panic!() };
        assert_eq!(upstream.to_string(), "socks5://10.0.0.2:1080");
        assert!(Reference::parse("exit 1").is_err());
    }
}

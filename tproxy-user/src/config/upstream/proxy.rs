//! A proxy server, and its URL.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use super::{Check, Credentials, Tls};

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
    /// It is spoken to inside TLS; `None`: as it is.
    pub tls: Option<Tls>,
    /// What it knows this client by.
    pub credentials: Option<Credentials>,
    /// What becomes of UDP flows, where it cannot carry them.
    pub udp: Udp,
    /// The server through which it is reached; `None`: straight.
    pub via: Option<Arc<Self>>,
    /// The whole SOCKS5 handshake is said at once.
    pub pipelined: bool,
    /// It is asked for destinations by their names, where the client's first bytes tell them.
    pub names: bool,
    /// How it is found out whether it works; `None`: by the flows that go through it.
    pub check: Option<Check>,
    /// What was read for it: password, certificates.
    pub files: Vec<PathBuf>,
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

/// What becomes of UDP flows that a proxy server cannot carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Udp {
    /// Their clients are told that nobody listens (ICMP port unreachable).
    #[default]
    Reject,
    /// The kernel forwards them.
    Pass,
    /// They are relayed to their destinations.
    Direct,
}

impl Proxy {
    /// Reads `SCHEME://[USER:PASSWORD@]HOST[:PORT]`. Without these the URL is its name.
    ///
    /// # Errors
    /// What was expected. The text is not repeated, for it may have a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected socks5://HOST[:PORT], http://HOST:PORT or https://HOST:PORT";
        let url = Url::parse(text).map_err(|error| format!("{error}; {EXPECTED}"))?;
        let protocol = match url.scheme() {
            "socks5" | "socks5h" => Protocol::Socks5,
            "http" | "https" => Protocol::Http,
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
            (None, Protocol::Http) => {
                let written = text.trim_end_matches('/');
                let usual = url.port_or_known_default().filter(|port| written.ends_with(&format!(":{port}")));
                usual.ok_or_else(|| format!("name the port, such as {}://HOST:3128", url.scheme()))?
            }
        };
        let credentials = match (url.username(), url.password()) {
            ("", None) => None,
            (username, password) => {
                Some(Credentials::new(&decoded(username)?, &decoded(password.unwrap_or_default())?)?)
            }
        };
        let (name, host) = ("".into(), Host::parse(host)?);
        let tls = if url.scheme() == "https" { Some(Tls::of(&host)?) } else { None };
        let proxy = Self {
            name,
            protocol,
            host,
            port,
            tls,
            credentials,
            udp: Udp::default(),
            via: None,
            pipelined: false,
            names: false,
            check: None,
            files: Vec::new(),
        };
        Ok(Self { name: proxy.url().into(), ..proxy })
    }

    /// Whether it carries UDP flows, as far as that is known without asking it.
    #[must_use]
    pub fn may_carry_udp(&self) -> bool {
        // Where it takes them is no place that can be sent to through another.
        self.protocol == Protocol::Socks5 && self.via.is_none()
    }

    /// Without user and password.
    #[must_use]
    pub fn url(&self) -> String {
        let secure = if self.tls.is_some() { "s" } else { "" };
        format!("{}{secure}://{}:{}", self.protocol, self.host, self.port)
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
        match &self.via {
            None if url == *self.name => f.write_str(&url),
            None => write!(f, "{} ({url})", self.name),
            Some(via) => write!(f, "{} ({url} via {})", self.name, via.name),
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
            ("https://proxy.example.org:443", "https://proxy.example.org:443"),
            ("https://[2001:db8::2]:8443/", "https://[2001:db8::2]:8443"),
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
            ("https://h", "name the port, such as https://HOST"),
            ("https://h:80x", "invalid port"),
            ("socks5://:secret@h", "1 to 255 bytes"),
            ("socks5://u:a%0ab@h", "control characters"),
        ] {
            let error = Proxy::parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}

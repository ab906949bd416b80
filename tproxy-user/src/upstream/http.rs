//! HTTP CONNECT (RFC 9110, section 9.3.6) over HTTP/1.1: request and response.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::destination::Destination;
use crate::config::upstream::Credentials;

/// The longest head of a response that is waited for, in bytes.
pub const LONGEST: usize = 16 * 1024;

/// The most header lines of one.
const MOST_HEADERS: usize = 64;

/// The longest part of a status line that is repeated in a log.
const LONGEST_REASON: usize = 80;

/// Why a server does not connect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It answers with another status than 2xx.
    #[error("it answers: {status} {reason}")]
    Status {
        /// The status code.
        status: u16,
        /// What it says to people.
        reason: String,
    },
    /// It takes nobody without a password (407, 401).
    #[error("it wants a user and a password, and none is configured")]
    WantsCredentials,
    /// It does not take this one (407, 401).
    #[error("it refuses this user and password")]
    Credentials,
    /// What it says is no response.
    #[error("it does not speak HTTP/1: {0}")]
    Malformed(httparse::Error),
    /// The head of its response does not end.
    #[error("the head of its response is longer than {LONGEST} bytes")]
    Endless,
}

/// The request for a connection.
#[must_use]
pub fn request(to: Destination<'_>, credentials: Option<&Credentials>) -> Vec<u8> {
    let authorization = authorization(credentials);
    format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{authorization}\r\n").into_bytes()
}

/// A request that asks a server, by its URL, for nothing but an answer (RFC 9110, section 9.3.7).
#[must_use]
pub fn options(url: &str, credentials: Option<&Credentials>) -> Vec<u8> {
    let (authorization, host) =
        (authorization(credentials), url.split_once("://").map_or(url, |(_, host)| host));
    format!(
        "OPTIONS * HTTP/1.1\r\nHost: {host}\r\nMax-Forwards: 0\r\n{authorization}Connection: close\r\n\r\n"
    )
    .into_bytes()
}

fn authorization(credentials: Option<&Credentials>) -> String {
    credentials.map_or_else(String::new, |credentials| {
        let both = format!("{}:{}", credentials.username, credentials.password.reveal());
        format!("Proxy-Authorization: Basic {}\r\n", STANDARD.encode(both))
    })
}

/// As [`response`], to a request that asks for nothing: any status will do, but one that is about
/// user and password.
///
/// # Errors
/// As there.
pub fn answer(bytes: &[u8], with_credentials: bool) -> Result<Option<usize>, Violation> {
    match response(bytes, with_credentials) {
        Err(Violation::Status { .. }) => Ok(Some(0)),
        other => other,
    }
}

/// Looks at the first bytes of a response: how long the head is of one that says yes; `None`:
/// it is not whole yet.
///
/// # Errors
/// [`Violation`]: it says no, or nothing that can be understood.
pub fn response(bytes: &[u8], with_credentials: bool) -> Result<Option<usize>, Violation> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes).map_err(Violation::Malformed)? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial if bytes.len() >= LONGEST => return Err(Violation::Endless),
        httparse::Status::Partial => return Ok(None),
    };
    match response.code {
        Some(200..=299) => Ok(Some(length)),
        // Some answer 401 to a wrong password, as servers do that are no proxies (tinyproxy 1.11).
        Some(401 | 407) if with_credentials => Err(Violation::Credentials),
        Some(401 | 407) => Err(Violation::WantsCredentials),
        status => {
            let reason = response.reason.unwrap_or_default();
            // Obsolete text may have any byte from 0x80 on, which `httparse` leaves out.
            let reason = reason.chars().filter(|c| !c.is_control()).take(LONGEST_REASON).collect();
            Err(Violation::Status { status: status.unwrap_or_default(), reason })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_name_the_destination_twice() {
        let to = Destination::Address("[2001:db8::1]:443".parse().expect("an address"));
        let credentials = Credentials::new("Aladdin", "open sesame").expect("fits");
        assert_eq!(
            request(to, None),
            b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\r\n"
        );
        let named = request(Destination::Name("www.example.org", 443), None);
        assert_eq!(named, b"CONNECT www.example.org:443 HTTP/1.1\r\nHost: www.example.org:443\r\n\r\n");
        // The example of RFC 7617, section 2.
        let with = String::from_utf8(request(to, Some(&credentials))).expect("text");
        assert!(
            with.contains("\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n"),
            "{with}"
        );
    }

    #[test]
    fn a_response_ends_where_the_tunnel_begins() {
        let head = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 squid\r\n\r\n";
        let all = [&head[..], b"SSH-2.0"].concat();
        for length in 0..head.len() {
            assert_eq!(response(&all[..length], false), Ok(None));
        }
        assert_eq!(response(&all, false), Ok(Some(head.len())));
    }

    #[test]
    fn refusals_are_told() {
        for (head, credentials, expected) in [
            ("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", false, "wants a user"),
            ("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", true, "refuses this user"),
            ("HTTP/1.0 401 Unauthorized\r\n\r\n", true, "refuses this user"),
            ("HTTP/1.0 503 Service Unavailable\r\nX: y\r\n\r\n", false, "503 Service Unavailable"),
            ("SSH-2.0-OpenSSH\r\n\r\n", false, "does not speak HTTP/1"),
            ("\x05\x00", false, "does not speak HTTP/1"),
        ] {
            let error = response(head.as_bytes(), credentials).expect_err(head).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let endless = [b"HTTP/1.1 200 OK\r\nX: ", &[b'y'; LONGEST][..]].concat();
        assert_eq!(response(&endless, false), Err(Violation::Endless));
    }
}

//! The name that a connection is for, from the first bytes that its client sends, and what [`dns`]
//! answers say. Pure: bytes in, a name out.
//!
//! What is visible is taken: with Encrypted Client Hello (RFC 9849) that is the name of the server
//! which faces the client, and nobody can tell that from an extension that is sent as a grease.

#[cfg(any(test, fuzzing))]
pub mod check;
pub mod dns;
mod http;
pub mod quic;
mod tls;

use crate::policy::hostname::normal;

/// Bytes that are looked at; a name that comes later is none.
pub const MOST: usize = 16 << 10;

/// What the first bytes tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// The name, as names are compared.
    Name(String),
    /// There is none to be seen, and there will be none.
    Nothing,
    /// More bytes may tell.
    More,
}

impl Sniffed {
    /// What is no name, whoever says so, is none.
    fn of(name: Option<&str>) -> Self {
        name.and_then(normal).map_or(Self::Nothing, Self::Name)
    }
}

/// Looks at all that has come so far of what a client sends over TCP.
#[must_use]
pub fn stream(bytes: &[u8]) -> Sniffed {
    let sniffed = match bytes {
        [] => Sniffed::More,
        [tls::HANDSHAKE, ..] => tls::stream(bytes),
        _ => http::request(bytes),
    };
    if sniffed == Sniffed::More && bytes.len() >= MOST { Sniffed::Nothing } else { sniffed }
}

#[cfg(test)]
mod tests;

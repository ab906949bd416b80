//! What a proxy server is asked for.

use std::fmt;
use std::net::SocketAddr;

/// The destination of a connection, as a server is told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination<'a> {
    /// Its address.
    Address(SocketAddr),
    /// A name of 1 to 255 bytes, which the server looks up, and a port.
    Name(&'a str, u16),
}

impl<'a> Destination<'a> {
    /// By the name, where one is known.
    #[must_use]
    pub fn of(address: SocketAddr, name: Option<&'a str>) -> Self {
        match name.filter(|name| (1..=255).contains(&name.len())) {
            Some(name) => Self::Name(name, address.port()),
            None => Self::Address(address),
        }
    }
}

impl fmt::Display for Destination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

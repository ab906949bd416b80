//! What a server answers that does not do what it was asked for.

use std::fmt;

/// A reply (RFC 1928, section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply(pub u8);

impl Reply {
    /// The network cannot be reached.
    pub const NETWORK_UNREACHABLE: Self = Self(3);
    /// The host cannot be reached.
    pub const HOST_UNREACHABLE: Self = Self(4);
    /// The destination refused the connection.
    pub const CONNECTION_REFUSED: Self = Self(5);
    /// The destination did not answer in time.
    pub const TTL_EXPIRED: Self = Self(6);
    /// The server does not do that at all, such as to carry datagrams.
    pub const COMMAND_NOT_SUPPORTED: Self = Self(7);
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "general failure",
            2 => "not allowed by its rules",
            3 => "network unreachable",
            4 => "host unreachable",
            5 => "connection refused",
            6 => "TTL expired",
            7 => "command not supported",
            8 => "address type not supported",
            other => return write!(f, "reply {other}"),
        })
    }
}

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The server does not do what it was asked for.
    #[error("it answers: {0}")]
    Refused(Reply),
    /// It takes nobody without a password.
    #[error("it wants a user and a password, and none is configured")]
    WantsCredentials,
    /// It does not take passwords.
    #[error("it does not take a user and a password")]
    WantsNone,
    /// It does not take this one.
    #[error("it refuses this user and password")]
    Credentials,
    /// It chose a method that was not offered.
    #[error("it wants authentication method {0}, which was not offered")]
    Method(u8),
    /// It speaks HTTP.
    #[error("it speaks HTTP, not SOCKS5")]
    Http,
    /// It speaks something else.
    #[error("it does not speak SOCKS5: a message begins with {0:#04x}")]
    Version(u8),
    /// It tells an address in a way that nobody knows.
    #[error("it answers with an address of kind {0}")]
    AddressKind(u8),
    /// It says less than it must.
    #[error("a message is too short")]
    Length,
}

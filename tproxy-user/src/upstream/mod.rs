//! Ways to reach the destination: [`direct`]ly, or through a proxy server.

pub mod announce;
pub mod check;
pub mod checks;
pub mod destination;
pub mod direct;
pub mod health;
pub mod http;
pub mod outbound;
pub mod pool;
pub mod socks5;
mod tunnel;

use std::io;

use crate::limits;
use crate::sockopt::SocketError;

/// Why a connection to upstream could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The destination refused it.
    Refused,
    /// Network or host cannot be reached.
    Unreachable,
    /// No answer in time.
    TimedOut,
    /// No source address and port could be had.
    NoSource,
    /// Descriptors or memory are used up.
    Exhausted,
    /// The proxy server cannot be reached, or does not do its part.
    Proxy,
    /// Anything else.
    Other,
}

impl Reason {
    /// The word in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed-out",
            Self::NoSource => "no-source",
            Self::Exhausted => "exhausted",
            Self::Proxy => "proxy-failed",
            Self::Other => "failed",
        }
    }

    fn of(error: &io::Error) -> Self {
        if limits::is_exhaustion(error) {
            return Self::Exhausted;
        }
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ECONNRESET) => Self::Refused,
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN) => {
                Self::Unreachable
            }
            Some(libc::ETIMEDOUT) => Self::TimedOut,
            Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => Self::NoSource,
            _ => Self::Other,
        }
    }

    /// Why a SOCKS5 server does not reach the destination.
    fn of_reply(reply: socks5::Reply) -> Self {
        match reply {
            socks5::Reply::NETWORK_UNREACHABLE | socks5::Reply::HOST_UNREACHABLE => Self::Unreachable,
            socks5::Reply::CONNECTION_REFUSED => Self::Refused,
            socks5::Reply::TTL_EXPIRED => Self::TimedOut,
            _ => Self::Proxy,
        }
    }

    /// Why an HTTP server does not, by its status (RFC 9110, section 15.6).
    const fn of_status(status: u16) -> Self {
        match status {
            502 | 503 => Self::Unreachable,
            504 => Self::TimedOut,
            _ => Self::Proxy,
        }
    }
}

/// A connection to upstream, or a socket for one, that could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct ConnectError {
    /// Why, as it is counted.
    pub reason: Reason,
    /// Why, as the kernel or the proxy server said it.
    pub source: Cause,
}

/// Who said what.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The kernel.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A SOCKS5 server.
    #[error(transparent)]
    Socks5(#[from] socks5::Violation),
    /// An HTTP server.
    #[error(transparent)]
    Http(#[from] http::Violation),
    /// Either side of TLS.
    #[error("{}", told(.0))]
    Tls(rustls::Error),
    /// This host, which trusts nobody.
    #[error("{0}")]
    Trust(String),
    /// The kernel, of a connection that there was.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A server hung up.
    #[error("it closes the connection instead of an answer")]
    Closed,
    /// A server took too long.
    #[error("it does not answer in time")]
    Silent,
    /// Its name has no address.
    #[error("cannot look up {name}: {source}")]
    Lookup {
        /// The name.
        name: std::sync::Arc<str>,
        /// What the resolver answered.
        source: io::Error,
    },
}

/// What is wrong with TLS, and what helps.
fn told(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => {
            "its certificate is signed by nobody who is trusted: name who signed it with ca_file".to_owned()
        }
        rustls::Error::InvalidMessage(_) => format!("it does not speak TLS: {error}"),
        _ => format!("TLS: {error}"),
    }
}

impl Cause {
    /// Whether the server does not do what it was asked for, whoever asks.
    fn is_unsupported(&self) -> bool {
        let reply = socks5::Reply::COMMAND_NOT_SUPPORTED;
        matches!(self, Self::Socks5(socks5::Violation::Refused(refused)) if *refused == reply)
    }
}

impl ConnectError {
    /// What is used up, where that is the reason.
    #[must_use]
    pub fn exhaustion(&self) -> Option<&io::Error> {
        match &self.source {
            Cause::Socket(error) if self.reason == Reason::Exhausted => Some(&error.source),
            _ => None,
        }
    }

    /// The error of `connect(2)`, or the one that a server's answer comes closest to.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match (&self.source, self.reason) {
            (Cause::Socket(error), _) => error.errno(),
            (Cause::Socks5(socks5::Violation::Refused(socks5::Reply::NETWORK_UNREACHABLE)), _) => {
                Some(libc::ENETUNREACH)
            }
            (_, Reason::Unreachable) => Some(libc::EHOSTUNREACH),
            _ => None,
        }
    }

    /// It is the proxy server's, whatever `connect(2)` said of the way to it.
    fn of_proxy(source: Cause) -> Self {
        Self { reason: Reason::Proxy, source }
    }
}

impl From<SocketError> for ConnectError {
    fn from(source: SocketError) -> Self {
        Self { reason: Reason::of(&source.source), source: source.into() }
    }
}

impl From<socks5::Violation> for ConnectError {
    fn from(violation: socks5::Violation) -> Self {
        let reason = match violation {
            socks5::Violation::Refused(reply) => Reason::of_reply(reply),
            _ => Reason::Proxy,
        };
        Self { reason, source: violation.into() }
    }
}

impl From<http::Violation> for ConnectError {
    fn from(violation: http::Violation) -> Self {
        let reason = match violation {
            http::Violation::Status { status, .. } => Reason::of_status(status),
            _ => Reason::Proxy,
        };
        Self { reason, source: violation.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_by_reason() {
        let reason = |errno| Reason::of(&io::Error::from_raw_os_error(errno));
        assert_eq!(reason(libc::ECONNREFUSED), Reason::Refused);
        assert_eq!(reason(libc::EHOSTUNREACH), Reason::Unreachable);
        assert_eq!(reason(libc::EADDRNOTAVAIL), Reason::NoSource);
        assert_eq!(reason(libc::EMFILE), Reason::Exhausted);
        assert_eq!(reason(libc::EPERM), Reason::Other);
    }

    #[test]
    fn what_a_server_says_of_the_destination_is_the_destinations() {
        let reply = |reply| ConnectError::from(socks5::Violation::Refused(socks5::Reply(reply)));
        assert_eq!((reply(3).reason, reply(3).errno()), (Reason::Unreachable, Some(libc::ENETUNREACH)));
        assert_eq!((reply(4).reason, reply(4).errno()), (Reason::Unreachable, Some(libc::EHOSTUNREACH)));
        assert_eq!((reply(5).reason, reply(5).errno()), (Reason::Refused, None));
        assert_eq!(reply(2).reason, Reason::Proxy);
        assert_eq!(ConnectError::from(socks5::Violation::Http).reason, Reason::Proxy);
        let status = |status| http::Violation::Status { status, reason: String::new() };
        assert_eq!(ConnectError::from(status(504)).reason, Reason::TimedOut);
        assert_eq!(ConnectError::from(status(403)).reason, Reason::Proxy);
    }
}

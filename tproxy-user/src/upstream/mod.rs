//! Ways to reach the destination. So far one: [`direct`].

pub mod direct;

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
}

/// A connection to upstream, or a socket for one, that could not be had.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct ConnectError {
    /// Why, as it is counted.
    pub reason: Reason,
    /// Why, as the kernel said it.
    pub source: SocketError,
}

impl From<SocketError> for ConnectError {
    fn from(source: SocketError) -> Self {
        Self { reason: Reason::of(&source.source), source }
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
}

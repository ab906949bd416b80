//! The ways a command can fail, with the exit codes that scripts rely on.

use std::fmt::Display;

/// An error that decides the exit code. Wrapped in `anyhow`, it may carry
/// context; [`Failure::exit_code`] of the first one in the chain counts.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Wrong flags or configuration (exit 2).
    #[error("{0}")]
    Usage(String),
    /// No proxy is running (exit 3).
    #[error("{0}")]
    NotRunning(String),
    /// A privilege or kernel feature is missing (exit 4).
    #[error("{0}")]
    Unsupported(String),
    /// Something is taken by another (exit 5).
    #[error("{0}")]
    Conflict(String),
}

impl Failure {
    /// A [`Failure::Usage`] from anything printable.
    pub fn usage(message: impl Display) -> Self {
        Self::Usage(message.to_string())
    }

    /// A [`Failure::Conflict`] from anything printable.
    pub fn conflict(message: impl Display) -> Self {
        Self::Conflict(message.to_string())
    }

    /// A [`Failure::Unsupported`] from anything printable.
    pub fn unsupported(message: impl Display) -> Self {
        Self::Unsupported(message.to_string())
    }

    /// The exit code of the contract.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::NotRunning(_) => 3,
            Self::Unsupported(_) => 4,
            Self::Conflict(_) => 5,
        }
    }
}

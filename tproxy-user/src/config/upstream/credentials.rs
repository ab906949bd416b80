//! What a proxy server knows its client by.

use std::fmt;
use std::sync::Arc;

/// User and password (RFC 1929, RFC 7617).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user, 1 to 255 bytes.
    pub username: Arc<str>,
    /// The password, at most 255 bytes.
    pub password: Secret,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

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

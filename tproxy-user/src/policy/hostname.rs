//! How names of hosts are compared. Needs nothing else of this program: the fuzz targets compile it
//! with what reads names from the network.

/// The longest name, in bytes (RFC 1035, section 2.3.4).
const LONGEST: usize = 253;

/// A name as it is compared: in lower case, without a dot at its end. `None`: it is no
/// name, whoever says so.
#[must_use]
pub fn normal(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    (name.len() <= LONGEST && name.split('.').all(label)).then(|| name.to_ascii_lowercase())
}

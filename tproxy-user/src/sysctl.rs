//! Kernel settings under `/proc/sys`, of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::PathBuf;

/// Packets with a source address of this host may arrive on `lo`: the way that
/// the host's own captured traffic takes.
pub const ACCEPT_LOCAL: &str = "net.ipv4.conf.lo.accept_local";

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("sysctl {name}: cannot {verb} {}", path.display())]
pub struct Error {
    name: String,
    verb: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name.replace('.', "/"))
}

/// The value of a setting, named as by `sysctl`, without its final newline.
///
/// # Errors
/// Where there is no such setting, or it is not readable.
pub fn read(name: &str) -> Result<String, Error> {
    let path = path(name);
    match fs::read_to_string(&path) {
        Ok(value) => Ok(value.trim_end().to_owned()),
        Err(source) => Err(Error { name: name.to_owned(), verb: "read", path, source }),
    }
}

/// Whether the stack looks for the socket of an arriving TCP packet before its route, which
/// the socket then gives (both families; networking/ip-sysctl.rst).
#[must_use]
pub fn early_demux() -> bool {
    ["net.ipv4.ip_early_demux", "net.ipv4.tcp_early_demux"]
        .iter()
        .all(|name| read(name).is_ok_and(|value| value == "1"))
}

/// Writes a setting.
///
/// # Errors
/// Where there is no such setting, without `CAP_NET_ADMIN`, or where `/proc/sys` is read-only.
pub fn write(name: &str, value: &str) -> Result<(), Error> {
    let path = path(name);
    fs::write(&path, value).map_err(|source| Error { name: name.to_owned(), verb: "write", path, source })
}

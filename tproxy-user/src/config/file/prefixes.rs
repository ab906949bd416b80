//! Files of networks, one a line.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

use crate::cli::parse;
use crate::config::rule::PrefixFile;
use crate::failure::Failure;
use crate::policy::ranges::Ranges;

/// Networks that one file may have.
pub(super) const MOST: usize = 1_000_000;

/// Bytes that one file may have: room for [`MOST`] networks of any length and as much of comments.
const MOST_BYTES: u64 = 128 << 20;

/// Files that were read, each once however many rules name it.
#[derive(Default)]
pub(super) struct Files(HashMap<PathBuf, PrefixFile>);

/// Why a file cannot be had.
pub(super) enum Error {
    /// It cannot be read.
    Io(io::Error),
    /// What it has is wrong.
    Content(Failure),
}

impl Files {
    /// The networks of a file.
    pub(super) fn read(&mut self, path: PathBuf) -> Result<PrefixFile, Error> {
        match self.0.entry(path) {
            Entry::Occupied(file) => Ok(file.get().clone()),
            Entry::Vacant(place) => {
                let content = content(place.key()).map_err(Error::Io)?;
                let file = parse(&content, place.key()).map_err(Error::Content)?;
                Ok(place.insert(file).clone())
            }
        }
    }
}

fn content(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("it has more than {} MiB", MOST_BYTES >> 20)));
    }
    Ok(content)
}

/// The networks of a file that has this content.
pub(super) fn parse(content: &[u8], path: &Path) -> Result<PrefixFile, Failure> {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for (line, number) in content.split(|byte| *byte == b'\n').zip(1_usize..) {
        let network = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
        if network.is_empty() {
            continue;
        }
        let wrong = |what: &str, why: &str| {
            let text = what.escape_debug();
            Failure::usage(format_args!("{}:{number}: '{text}': {why}", path.display()))
        };
        let text = str::from_utf8(network)
            .map_err(|_| wrong(&String::from_utf8_lossy(network), "expected a network in UTF-8 text"))?;
        match parse::cidr(text).map_err(|why| wrong(text, &why))? {
            IpNet::V4(net) => v4.push((net.network().to_bits().into(), net.broadcast().to_bits().into())),
            IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits())),
        }
        if v4.len() + v6.len() > MOST {
            return Err(wrong(text, &format!("expected at most {MOST} networks in a file")));
        }
    }
    let count = v4.len() + v6.len();
    if count == 0 {
        return Err(Failure::usage(format_args!(
            "{}: no network in it, so that nothing would match; expected one a line",
            path.display()
        )));
    }
    let ranges = |nets| Arc::new(Ranges::new(nets));
    Ok(PrefixFile { path: path.to_owned(), count, v4: ranges(v4), v6: ranges(v6) })
}

//! Files with one thing a line. What comes after a `#` is a comment, and a line without
//! anything does not count.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::error::one_line;
use crate::failure::Failure;

/// Bytes that one file may have: room for a million networks of any length and as much of comments.
const MOST_BYTES: u64 = 128 << 20;

/// Why a file cannot be had.
pub(super) enum Error {
    /// It cannot be read.
    Io(io::Error),
    /// What it has is wrong.
    Content(Failure),
}

/// What stands in the lines of a file.
pub(super) struct Kind {
    /// One of them.
    pub(super) one: &'static str,
    /// Several.
    pub(super) many: &'static str,
    /// As many as there may be.
    pub(super) most: usize,
}

/// All of a regular file that is not too long.
pub(super) fn content(path: &Path) -> Result<Vec<u8>, Error> {
    let content = || {
        // To open a named pipe waits for who writes to it.
        if !path.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut content = Vec::new();
        File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MOST_BYTES {
            return Err(io::Error::other(format!("it has more than {} MiB", MOST_BYTES >> 20)));
        }
        Ok(content)
    };
    content().map_err(Error::Io)
}

/// The first 12 digits of the SHA-256 of a file's content.
pub(super) fn digest(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

/// Hands each line to `take`, whose error says what was expected. How many there are.
pub(super) fn each(
    content: &[u8],
    path: &Path,
    kind: &Kind,
    mut take: impl FnMut(&str) -> Result<(), String>,
) -> Result<usize, Failure> {
    let Kind { one, many, most } = kind;
    let mut count = 0;
    for (line, number) in content.split(|byte| *byte == b'\n').zip(1_usize..) {
        let line = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: &str, why: &str| {
            Failure::Usage(one_line(&format!("{}:{number}: '{what}': {why}", path.display())))
        };
        let text = str::from_utf8(line)
            .map_err(|_| wrong(&String::from_utf8_lossy(line), &format!("expected a {one} in UTF-8 text")))?;
        take(text).map_err(|why| wrong(text, &why))?;
        count += 1;
        if count > *most {
            return Err(wrong(text, &format!("expected at most {most} {many} in a file")));
        }
    }
    if count == 0 {
        return Err(Failure::usage(format_args!(
            "{}: no {one} in it, so that nothing would match; expected one a line",
            path.display()
        )));
    }
    Ok(count)
}

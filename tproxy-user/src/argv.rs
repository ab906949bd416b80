//! The words of the command line. A password in one of them is hidden from those who list
//! processes (`ps`): everyone on this host can read `/proc/PID/cmdline`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use procfs::process::Process;

/// The words, as they were given. The first call hides passwords.
#[must_use]
pub fn words() -> &'static [OsString] {
    static WORDS: OnceLock<Vec<OsString>> = OnceLock::new();
    WORDS.get_or_init(|| {
        let words: Vec<_> = std::env::args_os().collect();
        if let Err(error) = hide() {
            // Logging has not begun, and asks for these words.
            let line =
                format!("tproxy-user: cannot hide a password on the command line from others: {error}\n");
            // Nobody may be there to read it.
            drop(io::stderr().write_all(line.as_bytes()));
        }
        words
    })
}

/// Writes over passwords where the kernel keeps the command line: in this process's memory.
fn hide() -> io::Result<()> {
    let line = std::fs::read("/proc/self/cmdline")?;
    let passwords = passwords(&line);
    if passwords.is_empty() {
        return Ok(());
    }
    let this = Process::myself().and_then(|process| process.stat()).map_err(io::Error::other)?;
    let Some(begin @ 1..) = this.arg_start else {
        return Err(io::Error::other("the kernel does not tell where it is"));
    };
    let memory = File::options().write(true).open("/proc/self/mem")?;
    for password in passwords {
        memory.write_all_at(&vec![b'*'; password.len()], begin + password.start as u64)?;
    }
    Ok(())
}

/// Where passwords of URLs (`//USER:PASSWORD@`) stand in words that end with a zero byte each.
fn passwords(line: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    for word in line.split_inclusive(|byte| *byte == 0) {
        let authority = word.windows(2).position(|pair| pair == b"//").map(|at| at + 2);
        if let Some(authority) = authority {
            let rest = &word[authority..];
            // A password with a slash is no URL, and refused; it is one nonetheless.
            let end = rest.iter().rposition(|byte| *byte == b'@');
            let colon = rest.iter().position(|byte| *byte == b':');
            if let (Some(colon), Some(end)) = (colon, end)
                && colon < end
            {
                found.push(start + authority + colon + 1..start + authority + end);
            }
        }
        start += word.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_found() {
        for (line, expected) in [
            (&b"tproxy-user\0--upstream\0socks5://u:secret@h:1\0-v\0"[..], &["secret"][..]),
            (b"a\0--upstream=http://u:s/e@c@h\0socks5://u:t@h\0", &["s/e@c", "t"]),
            (b"a\0socks5://h:1080\0socks5://u@h:1\0http://[::1]:80\0u:p@h\0", &[]),
        ] {
            let found: Vec<_> = passwords(line).into_iter().map(|range| &line[range]).collect();
            let expected: Vec<_> = expected.iter().map(|text| text.as_bytes()).collect();
            assert_eq!(found, expected);
        }
    }
}

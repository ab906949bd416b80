//! Files of names, one a line.

use std::path::Path;
use std::sync::Arc;

use super::lines::{self, Error, Kind};
use crate::config::rule::NameFile;
use crate::failure::Failure;
use crate::policy::domains::Pattern;

/// Names that one file may have.
pub(super) const MOST: usize = 100_000;

/// The names of a file.
pub(super) fn read(path: &Path) -> Result<NameFile, Error> {
    parse(&lines::content(path)?, path).map_err(Error::Content)
}

fn parse(content: &[u8], path: &Path) -> Result<NameFile, Failure> {
    let kind = Kind { one: "name", many: "names", most: MOST };
    let mut patterns = Vec::new();
    lines::each(content, path, &kind, |text| {
        patterns.push(Pattern::parse(text)?);
        Ok(())
    })?;
    Ok(NameFile { path: path.to_owned(), digest: lines::digest(content), patterns: Arc::from(patterns) })
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn read(content: &[u8]) -> Result<usize, String> {
        parse(content, Path::new("n.txt")).map(|file| file.patterns.len()).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    }

    #[test]
    fn mistakes_name_the_line() {
        assert_eq!(read(b"# ads\nExample.org\r\n\n *.example.com. # all\nb\xc3\xbccher.example"), Ok(3));
        for (content, expected) in [
            (
                &b"a.example\n\na b\n"[..],
                "n.txt:3: 'a b': expected a name such as example.org, or *.example.org for all names below it",
            ),
            (b"\n\xff\n", "n.txt:2: '\u{fffd}': expected a name in UTF-8 text"),
            (b"# nothing\n", "n.txt: no name in it, so that nothing would match; expected one a line"),
        ] {
            assert_eq!(read(content), Err(expected.to_owned()));
        }
    }

    #[test]
    fn a_hundred_thousand_names_and_no_more() {
        let mut text = String::new();
        for number in 0..MOST {
            writeln!(text, "*.n{number}.example").expect("a string takes it");
        }
        assert_eq!(read(text.as_bytes()), Ok(MOST));
        text.push_str("one.example\n");
        assert_eq!(
            read(text.as_bytes()),
            Err("n.txt:100001: 'one.example': expected at most 100000 names in a file".to_owned())
        );
    }
}

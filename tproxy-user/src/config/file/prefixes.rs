//! Files of networks, one a line.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

use super::lines::{self, Error, Kind};
use crate::cli::parse;
use crate::config::rule::PrefixFile;
use crate::failure::Failure;
use crate::policy::ranges::Ranges;

/// Networks that one file may have.
pub(super) const MOST: usize = 1_000_000;

/// Files that were read, each once however many rules name it.
#[derive(Default)]
pub(super) struct Files(HashMap<PathBuf, PrefixFile>);

impl Files {
    /// The networks of a file.
    pub(super) fn read(&mut self, path: PathBuf) -> Result<PrefixFile, Error> {
        match self.0.entry(path) {
            Entry::Occupied(file) => Ok(file.get().clone()),
            Entry::Vacant(place) => {
                let content = lines::content(place.key())?;
                let file = parse(&content, place.key()).map_err(Error::Content)?;
                Ok(place.insert(file).clone())
            }
        }
    }
}

/// The networks of a file that has this content.
pub(super) fn parse(content: &[u8], path: &Path) -> Result<PrefixFile, Failure> {
    let kind = Kind { one: "network", many: "networks", most: MOST };
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    let count = lines::each(content, path, &kind, |text| {
        match parse::cidr(text)? {
            IpNet::V4(net) => v4.push((net.network().to_bits().into(), net.broadcast().to_bits().into())),
            IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits())),
        }
        Ok(())
    })?;
    let ranges = |nets| Arc::new(Ranges::new(nets));
    let digest = lines::digest(content);
    Ok(PrefixFile { path: path.to_owned(), digest, count, v4: ranges(v4), v6: ranges(v6) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write as _;

    fn read(content: &[u8]) -> Result<PrefixFile, String> {
        parse(content, Path::new("n.txt")).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    }

    #[test]
    fn networks_of_both_families_are_merged() {
        let file = read(b"# private\n10.0.0.0/8\r\n\n 10.1.0.0/16 # within\n11.0.0.0/8\n2001:db8::/32\n::1")
            .expect("valid");
        assert_eq!(file.count, 5);
        assert_eq!(read(b"::1\n").expect("valid").digest, "24e1a860f226");
        assert_eq!(file.v4.as_slice(), [(0x0a00_0000, 0x0bff_ffff)]);
        assert_eq!(file.v6.as_slice().len(), 2);
        assert!(file.v6.contains(1) && !file.v6.contains(2));
    }

    #[test]
    fn mistakes_name_the_line() {
        for (content, expected) in [
            (
                &b"10.0.0.0/8\n\n10.0.0.1/8"[..],
                "n.txt:3: '10.0.0.1/8': it has bits after the prefix; expected 10.0.0.0/8 or 10.0.0.1/32",
            ),
            (
                b"10.0.0.0/8 10.1.0.0/16\n",
                "n.txt:1: '10.0.0.0/8 10.1.0.0/16': expected a network such as 192.0.2.0/24 or 2001:db8::/32, or an address",
            ),
            (b"\n\xff\n", "n.txt:2: '\u{fffd}': expected a network in UTF-8 text"),
            (b"# nothing\n\n", "n.txt: no network in it, so that nothing would match; expected one a line"),
        ] {
            assert_eq!(read(content), Err(expected.to_owned()));
        }
    }

    #[test]
    fn a_million_networks_and_no_more() {
        let mut text = String::new();
        for number in 0..u32::try_from(MOST).expect("fits") {
            let address = std::net::Ipv4Addr::from_bits(0x0a00_0000 + 2 * number);
            writeln!(text, "{address}/32").expect("a string takes it");
        }
        let file = read(text.as_bytes()).expect("as many as may be");
        assert_eq!((file.count, file.v4.as_slice().len()), (MOST, MOST));
        text.push_str("::1\n");
        assert_eq!(
            read(text.as_bytes()),
            Err("n.txt:1000001: '::1': expected at most 1000000 networks in a file".to_owned())
        );
    }

    #[test]
    fn a_file_is_read_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("n.txt");
        std::fs::write(&path, "10.0.0.0/8").expect("written");
        let mut files = Files::default();
        let mut read = |path: &Path| files.read(path.to_owned());
        let (Ok(first), Ok(second)) = (read(&path), read(&path)) else { panic!("not read") };
        assert!(Arc::ptr_eq(&first.v4, &second.v4));
        assert!(matches!(read(directory.path()), Err(Error::Io(_))));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(content in "[0-9a-f:./# \n\u{80}]{0,60}", bytes: Vec<u8>) {
            for content in [content.as_bytes(), &bytes] {
                if let Err(error) = read(content) {
                    prop_assert!(!error.contains(char::is_control), "{}", error);
                }
            }
        }
    }
}

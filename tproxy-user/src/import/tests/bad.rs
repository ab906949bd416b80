//! Input that is no ruleset, or one that is hard to read.

use proptest::prelude::*;

use super::super::{Error, import};
use super::{table, whole};

#[test]
fn what_is_no_ruleset_is_told_where() {
    for (text, expected) in [
        ("", "there is nothing in it"),
        ("table ip t {\n}", "give it -j"),
        ("{\"nftables\": [", "line 1 column 14"),
        ("{\"x\": 1}", "nftables"),
        (
            "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp --dport http -j ACCEPT\nCOMMIT\n",
            "line 3: http",
        ),
        ("*mangle\n-A PREROUTING -j ACCEPT\nCOMMIT\n", "line 2: chain PREROUTING"),
        ("*mangle\n:PREROUTING ACCEPT [0:0]\n", "line 2: table mangle is not ended"),
        ("*mangle\n:A - [0:0]\n-A A \"x\nCOMMIT\n", "line 3: a quotation"),
        ("*mangle\n:A - [0:0]\n-A A -s ::1 -s 1.1.1.1\nCOMMIT\n", "line 3: 1.1.1.1"),
        ("*filter\nCOMMIT\n", "there is no TPROXY"),
    ] {
        let error = import(text).expect_err(text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn chains_in_a_circle_and_many_rules_end() {
    let circle = table(
        "mangle",
        &["-A PREROUTING -j A", "-A A -j B", "-A B -p tcp -j TPROXY --on-port 1", "-A B -j A"],
    );
    assert!(matches!(import(&circle), Err(Error::TooComplex)));
    let mut rules: Vec<_> =
        (0..5000).map(|n| format!("-A PREROUTING -d 11.{}.{}.0/24 -j RETURN", n / 256, n % 256)).collect();
    rules.push("-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1".to_owned());
    let judge = whole(&table("mangle", &rules.iter().map(|rule| &**rule).collect::<Vec<_>>()));
    judge.expect(&[("a tcp 10.0.0.1:1 > 11.7.7.7:1", "pass"), ("a tcp 10.0.0.1:1 > 11.99.7.7:1", "proxy")]);
}

proptest! {
    #[test]
    fn no_input_makes_it_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        words in prop::collection::vec(prop::sample::select(WORDS), 0..40),
    ) {
        for text in [String::from_utf8_lossy(&bytes).into_owned(), words.join(" "), words.join("\n")] {
            let _ = import(&text);
            let _ = import(&format!("*mangle\n:PREROUTING ACCEPT\n:A - [0:0]\n-A PREROUTING {text}\nCOMMIT"));
        }
    }

    #[test]
    fn no_json_makes_it_panic(cuts in prop::collection::vec(any::<prop::sample::Index>(), 1..4), with in "[0-9a-z\"{}\\[\\],:]{0,5}") {
        let mut text = include_str!("../../../tests/import/bypass.nft.txt").to_owned();
        for cut in cuts {
            let at = cut.index(text.len());
            text.replace_range(at..(at + 3).min(text.len()), &with);
        }
        let _ = import(&text);
    }
}

const WORDS: &[&str] = &[
    "*mangle",
    ":PREROUTING",
    "ACCEPT",
    "-A",
    "PREROUTING",
    "A",
    "-p",
    "tcp",
    "-j",
    "TPROXY",
    "--on-port",
    "1",
    "65536",
    "--tproxy-mark",
    "0x1/0x1",
    "-m",
    "mark",
    "--mark",
    "0",
    "!",
    "-d",
    "10.0.0.0/8",
    "::1",
    "--dport",
    "1:",
    ":",
    "5:1",
    "multiport",
    "--ports",
    "--uid-owner",
    "--gid-owner",
    "5-1",
    "root",
    "-i",
    "+",
    "lo",
    "-g",
    "RETURN",
    "REDIRECT",
    "DNAT",
    "--to-destination",
    "1.1.1.1:0",
    "--src-range",
    "1.1.1.1-1.1.1.0",
    "COMMIT",
    "\"",
    "\\",
    "#",
    "{",
    "[0:0]",
];

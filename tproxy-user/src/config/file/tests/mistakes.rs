//! What is refused, and in which words.

use std::path::Path;

use proptest::prelude::*;

use super::super::parse;

fn refused(text: &[u8]) -> String {
    match parse(text, Path::new("t.toml")) {
        Ok(parsed) => panic!("accepted: {parsed:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        }
    }
}

#[test]
fn mistakes_name_line_column_and_key() {
    for (text, expected) in [
        // Names that are not known.
        (
            "[capture]\n  interfces = 1",
            "t.toml:2:3: capture.interfces: unknown key; did you mean `interfaces`?",
        ),
        ("[captur]", "t.toml:1:2: captur: unknown key; did you mean `capture`?"),
        ("[log]\nqux = 1", "t.toml:2:1: log.qux: unknown key; expected level, format, access"),
        ("[log]\n\"a`b\\n\" = 1", "t.toml:2:1: log.a`b\\n: unknown key; expected level, format, access"),
        ("[[upstrm]]\nname = 'exit'", "t.toml:1:3: upstrm: unknown key; did you mean `upstream`?"),
        (
            "[qux]",
            "t.toml:1:2: qux: unknown key; expected watch, capture, steer, source, log, timeouts, limits, upstream, group, rule",
        ),
        ("[[upstream]]\nname = 'exit'", "t.toml:1:1: upstream[0]: the key `url` is missing"),
        (
            "[[upstream]]\nname = 'exit'\nurl = 'socks5://:secret@h'",
            "t.toml:3:7: upstream[0].url: the user of an upstream has 1 to 255 bytes",
        ),
        (
            "[[upstream]]\nname = 'exit'\nurl = 'socks5://h'\n[[rule]]\nupstream = 'exti'\naction = 'proxy'",
            "t.toml:5:12: rule[0].upstream: 'exti': no [[upstream]] or [[group]] has this name; did you mean `exit`?",
        ),
        (
            "[capture]\nfail = 'opne'",
            "t.toml:2:8: capture.fail: 'opne': expected open, closed; did you mean `open`?",
        ),
        ("capture.protocols = ['tcp', 'bgp']", "t.toml:1:29: capture.protocols[1]: 'bgp': expected tcp, udp"),
        // Values that their parsers refuse, in the words of the flags.
        (
            "[capture]\nto = ['10.0.0.0/8',\n 'é', '10.0.0.1/8']",
            "t.toml:3:2: capture.to[1]: 'é': expected a network such as 192.0.2.0/24 or 2001:db8::/32, or an address",
        ),
        (
            "[capture]\nto = ['::/0', 'fd00::/8', '10.0.0.1/8']",
            "t.toml:2:27: capture.to[2]: '10.0.0.1/8': it has bits after the prefix; expected 10.0.0.0/8 or 10.0.0.1/32",
        ),
        (
            "[capture]\nports = 70000",
            "t.toml:2:9: capture.ports: '70000': expected ports from 1 to 65535, such as 53,80,1000-2000",
        ),
        ("[limits]\nworkers = -1", "t.toml:2:11: limits.workers: '-1': expected a number from 1 to 64"),
        (
            "[timeouts]\nudp = 5",
            "t.toml:2:7: timeouts.udp: '5': expected a number with its unit, such as 500ms, 300s, 5m or 1h30m",
        ),
        // Values of another type.
        (
            "[capture]\nto = true",
            "t.toml:2:6: capture.to: invalid type: boolean `true`, expected a value or a list of values",
        ),
        (
            "[capture]\nto = [1.5]",
            "t.toml:2:7: capture.to[0]: invalid type: floating point `1.5`, expected a string or a number",
        ),
        (
            "[capture]\nown_traffic = 'yes'",
            "t.toml:2:15: capture.own_traffic: invalid type: string \"yes\", expected a boolean",
        ),
        ("[capture]\nfail = 5", "t.toml:2:8: capture.fail: expected a string"),
        (
            "[capture]\nfrom = []",
            "t.toml:2:8: capture.from: the list is empty: leave the key out, or name at least one",
        ),
        ("capture = 5", "t.toml:1:11: capture: invalid type: integer `5`, expected a table"),
        ("[rule]\naction = 'pass'", "t.toml:1:1: rule: invalid type: table, expected tables [[rule]]"),
        // What is no TOML.
        ("[capture", "t.toml:1:9: unclosed table, expected `]`"),
        ("\n[log]\nlevel = 'info", "t.toml:3:14: invalid literal string, expected `'`"),
        ("[log]\nlevel = 'info'\nlevel = 'info'", "t.toml:3:1: duplicate key"),
    ] {
        assert_eq!(refused(text.as_bytes()), expected);
    }
    assert_eq!(refused(b"[log]\n# \xff"), "t.toml:2:3: the file is not UTF-8 text");
}

#[test]
fn mistakes_in_rules() {
    const FIRST: &str = "[[rule]]\naction = 'pass'\n[[rule]]\n";
    for (second, expected) in [
        ("to = '::/0'", "3:1: rule[1]: the key `action` is missing"),
        ("action = 'accept'", "4:10: rule[1].action: 'accept': expected proxy, divert, pass, reject, drop"),
        (
            "action = 'divert'",
            "3:1: rule[1]: action = \"divert\" needs a target, such as target = \"127.0.0.53:53\"",
        ),
        (
            "action = 'pass'\ntarget = '127.0.0.1:1'",
            "5:10: rule[1].target: only a rule with action = \"divert\" has a target",
        ),
        (
            "action = 'drop'\nupstream = 'direct'",
            "5:12: rule[1].upstream: only a rule with action = \"proxy\" has an upstream",
        ),
        (
            "action = 'proxy'\nupstream = 'exits'",
            "5:12: rule[1].upstream: 'exits': no [[upstream]] or [[group]] has this name; expected direct",
        ),
        (
            "domain = ['a.example', '*']\naction = 'pass'",
            "4:24: rule[1].domain[1]: '*': expected a name such as example.org, or *.example.org for all names below it",
        ),
        (
            "domain = 'a.example'\ndscp = 'ef'\naction = 'pass'",
            "4:10: rule[1].domain: a rule with names cannot have `dscp`, which is not known any more once the name is: leave one of them out",
        ),
        (
            "domain_file = 'nowhere'\naction = 'pass'",
            "4:15: rule[1].domain_file: cannot read nowhere: No such file or directory (os error 2)",
        ),
        (
            "uid = ['root', 'no such user']\naction = 'pass'",
            "4:7: rule[1].uid: 'no such user': this host has no user of this name",
        ),
        (
            "gid = ['root', 'no such group']\naction = 'pass'",
            "4:7: rule[1].gid: 'no such group': this host has no group of this name",
        ),
        (
            "gid = 'a:b'\naction = 'pass'",
            "4:7: rule[1].gid: 'a:b': expected a group id such as 1000, a range such as 1000-1999, or the name of a group",
        ),
        (
            "domain = 'a.example'\ngid = 5\naction = 'pass'",
            "4:10: rule[1].domain: a rule with names cannot have `gid`, which is not known any more once the name is: leave one of them out",
        ),
        ("uid = '5-3'\naction = 'pass'", "4:7: rule[1].uid: '5-3': the range is backwards; expected 3-5"),
        (
            "from_file = 'nowhere'\naction = 'pass'",
            "4:13: rule[1].from_file: cannot read nowhere: No such file or directory (os error 2)",
        ),
        (
            "mark = '0/0'\naction = 'pass'",
            "4:8: rule[1].mark: '0/0': no bit counts, so every packet would match; expected such as 0x1/0x1",
        ),
        (
            "cgroup = '../x'\naction = 'pass'",
            "4:10: rule[1].cgroup: '../x': expected a systemd unit such as sshd.service, or a path below /sys/fs/cgroup",
        ),
        (
            "target = 'dns:53'\naction = 'divert'",
            "4:10: rule[1].target: 'dns:53': expected an address and a port, such as 127.0.0.53:53 or [::1]:53",
        ),
    ] {
        assert_eq!(refused(format!("{FIRST}{second}").as_bytes()), format!("t.toml:{expected}"));
    }
}

proptest! {
    #[test]
    fn nothing_makes_it_panic(
        text in r#"(\[{0,2}(capture|rule|x)\]{0,2}|(to|action|uid|"\n\u{85}") = |['"/0-9a-f,=\[\]{}#.:é\n ]{0,3}){0,12}"#,
        bytes: Vec<u8>,
    ) {
        for content in [text.as_bytes(), &bytes] {
            if let Err(error) = parse(content, Path::new("t.toml")) {
                prop_assert!(!error.to_string().contains(char::is_control), "{}", error);
            }
        }
    }
}

//! Tests of the config file as a whole.

use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::rule::Rule;
use super::*;
use crate::config::Mark;
use crate::config::rule::Action;

/// The sample that is installed.
const SAMPLE: &str = include_str!("../../../../xtask/assets/tproxy.toml");

fn accepted(text: &str) -> (File, Vec<resolved::Rule>) {
    let parsed = parse(text.as_bytes(), Path::new("t.toml"));
    let (file, resolved) = parsed.unwrap_or_else(|error| panic!("{error}: {text}"));
    (file, resolved.rules)
}

fn refused(text: &[u8]) -> String {
    match parse(text, Path::new("t.toml")) {
        Ok(parsed) => panic!("accepted: {parsed:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        }
    }
}

/// The files of the tutorial, but for the files of networks that they name.
#[test]
fn the_tutorial_has_configs() {
    let tutorial = include_str!("../../../../TUTORIAL.md");
    let blocks: Vec<_> =
        tutorial.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 3);
    let directory = tempfile::tempdir().expect("a directory");
    for name in ["country.txt", "known.txt"] {
        std::fs::write(directory.path().join(name), "198.51.100.0/24\n").expect("written");
    }
    std::fs::write(directory.path().join("exit.pw"), "secret\n").expect("written");
    for block in blocks {
        let parsed = parse(block.as_bytes(), &directory.path().join("tproxy.toml"));
        assert!(parsed.is_ok_and(|(_, resolved)| !resolved.rules.is_empty()), "{block}");
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

#[test]
fn rules_are_resolved() {
    let (_, rules) = accepted(
        "[[rule]]
        protocol = ['udp', 'tcp']
        from = ['10.0.0.0/8', '2001:db8::/32']
        not_from = '10.0.0.1'
        from_port = 53
        to_port = [80, '1000-2000']
        iface = ['eth0', 'wg*']
        mac = '02:00:5e:00:53:01'
        dscp = ['ef', 0]
        mark = ['0/0xff', 1]
        uid = ['root', 5, '1000-1999']
        gid = ['root', 6, '2000-2999']
        cgroup = 'no-such-unit.service'
        action = 'divert'
        target = '[::1]:53'
        [[rule]]
        action = 'reject'",
    );
    let [first, second] = &*rules else { panic!("two: {rules:?}") };
    let conditions = &first.conditions;
    assert_eq!(conditions.protocols, [17, 6]);
    assert_eq!((conditions.from.nets.len(), conditions.from.not.len()), (2, 1));
    assert_eq!(
        (&*conditions.from_ports, &*conditions.to_ports),
        (&[(53, 53)][..], &[(80, 80), (1000, 2000)][..])
    );
    assert_eq!(conditions.interfaces, ["eth0", "wg*"]);
    assert_eq!((&*conditions.macs, &*conditions.dscps), (&[[2, 0, 0x5e, 0, 0x53, 1]][..], &[46, 0][..]));
    assert_eq!(conditions.marks, [Mark { value: 0, mask: 0xff }, Mark { value: 1, mask: u32::MAX }]);
    assert_eq!(conditions.uids, [(0, 0), (5, 5), (1000, 1999)]);
    assert_eq!(conditions.gids, [(0, 0), (6, 6), (2000, 2999)]);
    assert_eq!(conditions.cgroups, ["system.slice/no-such-unit.service"]);
    assert_eq!(
        first.action,
        Action::Divert("[::1]:53".parse::<std::net::SocketAddr>().expect("an address").into())
    );
    assert_eq!(
        second,
        &resolved::Rule { conditions: resolved::Conditions::default(), action: Action::Reject }
    );
}

#[test]
fn files_of_networks_are_relative_to_the_config_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("tproxy.toml");
    let rule = "[[rule]]\nto_file = 'n.txt'\naction = 'pass'\n";
    std::fs::write(&config, rule.repeat(2)).expect("written");
    std::fs::write(directory.path().join("n.txt"), "10.0.0.0/8\n::1").expect("written");
    let Resolved { rules, .. } = read(&config).expect("valid").1;
    let [first, second] = &*rules else { panic!("two: {rules:?}") };
    let (first, second) = (&first.conditions.to.files[0], &second.conditions.to.files[0]);
    assert_eq!((first.count, first.path.file_name()), (2, Some("n.txt".as_ref())));
    assert!(std::sync::Arc::ptr_eq(&first.v4, &second.v4));
    std::fs::write(directory.path().join("n.txt"), "\nx").expect("written");
    let error = read(&config).expect_err("no network").to_string();
    assert!(error.contains("n.txt:2: 'x': expected a network"), "{error}");
    let error = read(&directory.path().join("none")).expect_err("no file").to_string();
    assert!(error.contains("/none: No such file or directory"), "{error}");
}

#[test]
fn what_is_written_is_read_again() {
    let network = |text: &str| Network(text.parse().expect("a network"));
    let file = File {
        capture: Capture {
            interfaces: List::of(["eth0".to_owned(), "wg*".to_owned()]),
            protocols: List::of([Protocol::Udp]),
            ports: List::of([(53, 53), (1000, 2000)]),
            own_traffic: Some(true),
            ..Capture::default()
        },
        timeouts: Timeouts {
            tcp_idle: Some(std::time::Duration::from_mins(124).into()),
            ..Timeouts::default()
        },
        rules: vec![
            Rule { to: List::of([network("10.0.0.0/8"), network("::1/128")]), ..Rule::default() },
            Rule {
                uid: List::of([value::Ids::Range(1, 5), value::Ids::Name("root".to_owned())]),
                gid: List::of([value::Ids::Range(7, 7)]),
                mark: List::of([Mark { value: 0, mask: 3 }]),
                mac: List::of([[2, 0, 0, 0, 0, 1]]),
                action: rule::Action::Divert,
                target: Some(value::Target("127.0.0.1:53".parse().expect("an address"))),
                ..Rule::default()
            },
        ],
        ..File::default()
    };
    let text = toml::to_string(&file).expect("printable");
    assert_eq!(
        text,
        "[capture]\ninterfaces = [\"eth0\", \"wg*\"]\nprotocols = \"udp\"\nports = [53, \"1000-2000\"]\nown_traffic = true\n\n\
         [timeouts]\ntcp_idle = \"2h4m\"\n\n\
         [[rule]]\nto = [\"10.0.0.0/8\", \"::1/128\"]\naction = \"proxy\"\n\n\
         [[rule]]\nmac = \"02:00:00:00:00:01\"\nmark = \"0x0/0x3\"\nuid = [\"1-5\", \"root\"]\ngid = 7\naction = \"divert\"\ntarget = \"127.0.0.1:53\"\n"
    );
    assert_eq!(accepted(&text).0, file);
}

#[test]
fn the_example_of_the_documents_is_valid() {
    let (file, rules) = accepted(
        "[capture]
        interfaces = ['br-lan', 'wg*']
        protocols = ['tcp', 'udp']
        own_traffic = false
        fail = 'open'
        [steer]
        tproxy_mark = '0x1/0x1'
        table = 100
        on_port = 15001
        [source]
        mode = 'client'              # client | client-port | proxy
        [[rule]]
        to = ['10.0.0.0/8', 'fd00::/8']
        action = 'pass'
        [[rule]]
        protocol = 'udp'
        to_port = [53]
        action = 'divert'
        target = '127.0.0.53:53'
        [[rule]]
        from = ['192.168.1.66']
        action = 'reject'
        [[rule]]
        action = 'proxy'",
    );
    assert_eq!(file.capture.interfaces.expect("given").as_slice().len(), 2);
    assert_eq!(rules.len(), 4);
}

/// The sample with its keys in force, those that are examples too.
fn sample() -> String {
    let key = |line: &str| line.starts_with(|first: char| first == '[' || first.is_ascii_lowercase());
    let uncommented = |line: &'static str| line.strip_prefix('#').filter(|rest| key(rest)).unwrap_or(line);
    SAMPLE.lines().map(uncommented).collect::<Vec<_>>().join("\n")
}

/// Keys such as `capture.to` of a schema's object, those of objects within it as well.
fn keys_of_schema(
    root: &serde_json::Value,
    object: &serde_json::Value,
    under: &str,
    keys: &mut BTreeSet<String>,
) {
    let target = object["$ref"].as_str().or_else(|| object["items"]["$ref"].as_str());
    let object = target.map_or(object, |target| &root["$defs"][target.trim_start_matches("#/$defs/")]);
    match object["properties"].as_object() {
        Some(properties) => {
            for (name, property) in properties {
                keys_of_schema(root, property, &format!("{under}.{name}"), keys);
            }
        }
        None => drop(keys.insert(under.trim_start_matches('.').to_owned())),
    }
}

/// Keys of a table, those of tables within it and of lists of tables as well.
fn keys_of_table(table: &toml::Table, under: &str, keys: &mut BTreeSet<String>) {
    for (name, value) in table {
        let name = format!("{under}.{name}");
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut tables = values.iter().filter_map(toml::Value::as_table).peekable();
        if tables.peek().is_none() {
            keys.insert(name.trim_start_matches('.').to_owned());
        }
        tables.for_each(|table| keys_of_table(table, &name, keys));
    }
}

#[test]
fn the_sample_has_every_key_of_the_schema_and_no_other() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("networks.txt"), "10.0.0.0/8").expect("written");
    std::fs::write(directory.path().join("names.txt"), "example.org").expect("written");
    std::fs::write(directory.path().join("exit.pw"), "secret").expect("written");
    let authority = rcgen::generate_simple_self_signed(["authority".to_owned()]).expect("a certificate");
    std::fs::write(directory.path().join("ca.pem"), authority.cert.pem()).expect("written");
    // These are not in the environment of tests.
    let sample_here = sample()
        .replace("password_env = \"WEB_PASSWORD\"", "password_file = \"exit.pw\"")
        .replace("password_credential = \"other\"", "password_file = \"exit.pw\"");
    let parsed = parse(sample_here.as_bytes(), &directory.path().join("tproxy.toml"));
    let (_, resolved) = parsed.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(resolved.rules.len(), 9);

    let mut keys_of_sample = BTreeSet::new();
    let table: toml::Table = sample().parse().expect("parsed above");
    keys_of_table(&table, "", &mut keys_of_sample);
    let schema = schema().to_value();
    let mut known = BTreeSet::new();
    keys_of_schema(&schema, &schema, "", &mut known);
    assert_eq!(keys_of_sample, known);
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

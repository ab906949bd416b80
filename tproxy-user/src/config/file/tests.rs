//! Tests of the config file as a whole.

mod mistakes;
mod sample;

use std::path::Path;

use super::rule::Rule;
use super::*;
use crate::config::Mark;
use crate::config::rule::Action;

fn accepted(text: &str) -> (File, Vec<resolved::Rule>) {
    let parsed = parse(text.as_bytes(), Path::new("t.toml"));
    let (file, resolved) = parsed.unwrap_or_else(|error| panic!("{error}: {text}"));
    (file, resolved.rules)
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

//! What is imported is judged by what becomes of packets, not by its text.

mod bad;
mod judge;
mod oracle;

use super::{Error, Imported, import};
use judge::Judge;

/// Fixtures are what the tools printed of rules that were given to the kernel.
macro_rules! fixture {
    ($name:literal) => {
        include_str!(concat!("../../tests/import/", $name, ".txt"))
    };
}

/// Imports, and expects that nothing is lost.
fn whole(text: &str) -> Judge {
    let Imported { toml, lost } = import(text).expect("imported");
    assert_eq!(lost, [""; 0], "{toml}");
    assert!(!toml.contains("not carried over"), "{toml}");
    Judge::new(&toml)
}

/// A table of rules of one kind, as iptables-save prints it.
fn table(name: &str, rules: &[&str]) -> String {
    let mut chains = vec!["PREROUTING", "OUTPUT"];
    let added = rules.iter().filter_map(|rule| rule.split_whitespace().nth(1));
    chains.extend(added);
    chains.sort_unstable();
    chains.dedup();
    let declared = chains.iter().map(|chain| match *chain {
        "PREROUTING" | "OUTPUT" => format!(":{chain} ACCEPT [0:0]\n"),
        _ => format!(":{chain} - [0:0]\n"),
    });
    format!("*{name}\n{}{}\nCOMMIT\n", declared.collect::<String>(), rules.join("\n"))
}

#[test]
fn the_rules_of_the_kernel_documentation() {
    for text in [fixture!("kernel-doc.iptables"), fixture!("kernel-doc.nft")] {
        let judge = whole(text);
        judge.expect(&[
            ("eth0 tcp 10.0.0.5:1000 > 192.0.2.1:80", "proxy"),
            ("eth0 tcp 10.0.0.5:80 > 192.0.2.1:81", "pass"),
            ("eth0 udp 10.0.0.5:1000 > 192.0.2.1:80", "pass"),
            ("own tcp 10.0.0.5:1000 > 192.0.2.1:80", "pass"),
        ]);
        assert_eq!(judge.steer("on_port"), Some("50080".to_owned()));
    }
    let judge = whole(fixture!("kernel-doc.iptables"));
    assert_eq!(judge.steer("tproxy_mark"), Some("\"0x1/0x1\"".to_owned()));
}

#[test]
fn dns_by_tproxy_of_clients_and_of_the_host() {
    for text in [fixture!("dns.iptables"), fixture!("dns.nft")] {
        let judge = whole(text);
        judge.expect(&[
            ("br-lan udp 192.168.1.5:1000 > 9.9.9.9:53", "proxy"),
            ("br-lan tcp 192.168.1.5:1000 > 9.9.9.9:53", "pass"),
            ("wan0 udp 192.0.2.5:1000 > 9.9.9.9:53", "pass"),
            ("own udp 192.0.2.5:1000 > 9.9.9.9:53", "proxy"),
            ("own uid=998 udp 192.0.2.5:1000 > 9.9.9.9:53", "pass"),
            ("own uid=999 udp 192.0.2.5:1000 > 9.9.9.9:54", "pass"),
        ]);
        assert_eq!(judge.steer("on_port"), Some("1053".to_owned()));
    }
}

#[test]
fn http_by_redirect() {
    for text in [fixture!("redirect.iptables"), fixture!("redirect.nft")] {
        let judge = whole(text);
        judge.expect(&[
            ("br-lan tcp 192.168.1.5:1000 > 8.8.8.8:80", "proxy"),
            ("br-lan tcp 192.168.1.5:1000 > 8.8.8.8:443", "pass"),
            ("wan0 tcp 192.0.2.5:1000 > 8.8.8.8:80", "pass"),
            ("own tcp 192.0.2.5:1000 > 8.8.8.8:80", "pass"),
        ]);
        assert_eq!(judge.steer("on_port"), Some("3128".to_owned()));
    }
}

#[test]
fn all_but_reserved_networks() {
    for text in [fixture!("bypass.iptables"), fixture!("bypass.nft")] {
        let judge = whole(text);
        judge.expect(&[
            ("br-lan tcp 192.168.1.5:1000 > 8.8.8.8:443", "proxy"),
            ("br-lan udp 192.168.1.5:1000 > 8.8.8.8:443", "proxy"),
            ("br-lan tcp 192.168.1.5:1000 > [2001:db8::1]:443", "pass"),
            ("own tcp 192.0.2.5:1000 > 8.8.8.8:443", "proxy"),
            ("own uid=65534 tcp 192.0.2.5:1000 > 8.8.8.8:443", "pass"),
            ("own uid=1 udp 192.0.2.5:1000 > 172.32.0.1:443", "proxy"),
        ]);
        for reserved in [
            "0.1.2.3",
            "10.1.1.1",
            "127.0.0.1",
            "169.254.1.1",
            "172.31.0.1",
            "192.168.1.1",
            "239.1.1.1",
            "255.1.1.1",
        ] {
            judge.expect(&[
                (&format!("br-lan tcp 192.168.1.5:1000 > {reserved}:22"), "pass"),
                (&format!("own udp 192.0.2.5:1000 > {reserved}:22"), "pass"),
            ]);
        }
        assert_eq!(judge.rules(), 3, "the rules of both chains are said once");
    }
}

#[test]
fn what_is_not_of_all_traffic_is_told() {
    let text = table(
        "mangle",
        &[
            "-A PREROUTING -m set --match-set cn dst -j RETURN",
            "-A PREROUTING -p tcp -m string --string x --algo bm -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
            "-A PREROUTING -p tcp -j LOG --log-prefix \"a b\"",
            "-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
        ],
    );
    let Imported { toml, lost } = import(&text).expect("imported");
    assert_eq!(lost.len(), 2, "{lost:?}");
    assert!(lost[0].starts_with("not carried over: line 4: ") && lost[0].contains("ipset cn"), "{lost:?}");
    assert!(
        lost[1].starts_with("not carried over: line 5: ") && lost[1].contains("match string"),
        "{lost:?}"
    );
    assert!(lost.iter().all(|lost| toml.contains(&format!("# {lost}"))), "{toml}");
}

#[test]
fn matches_of_both_tools() {
    let common = [
        ("lan tcp 10.0.0.5:9 > 192.0.2.9:1", "proxy"),
        ("lan tcp 10.0.0.9:9 > 192.0.2.9:1", "proxy"),
        ("lan tcp 10.0.0.10:9 > 192.0.2.9:9", "pass"),
        ("eth7 udp 10.0.0.1:100 > 192.0.2.9:3", "proxy"),
        ("eth7 udp 10.0.0.1:101 > 192.0.2.9:3", "pass"),
        ("lan udp 10.0.0.1:100 > 192.0.2.9:3", "pass"),
        ("lan mac=00:11:22:33:44:55 udp 10.0.0.1:9 > 192.0.2.9:4", "proxy"),
        ("lan mac=00:11:22:33:44:56 udp 10.0.0.1:9 > 192.0.2.9:4", "pass"),
        ("lan mac=00:11:22:33:44:55 udp 10.0.0.1:9 > 192.0.2.9:5", "pass"),
        ("lan mac=00:11:22:33:44:56 udp 10.0.0.1:9 > 192.0.2.9:5", "proxy"),
        ("lan dscp=46 udp 10.0.0.1:9 > 192.0.2.9:6", "proxy"),
        ("lan dscp=10 udp 10.0.0.1:9 > 192.0.2.9:6", "pass"),
        ("lan mark=48 udp 10.0.0.1:9 > 192.0.2.9:7", "proxy"),
        ("lan mark=32 udp 10.0.0.1:9 > 192.0.2.9:7", "pass"),
        ("lan udp 10.0.0.1:9 > 192.0.2.9:8", "proxy"),
        ("lan udp 10.0.0.1:9 > 192.0.2.9:9", "proxy"),
        ("own uid=997 udp 10.0.0.1:9 > 192.0.2.9:8", "proxy"),
        ("own uid=998 udp 10.0.0.1:9 > 192.0.2.9:8", "pass"),
        ("own uid=200 udp 10.0.0.1:9 > 192.0.2.9:9", "proxy"),
        ("own uid=201 udp 10.0.0.1:9 > 192.0.2.9:9", "pass"),
    ];
    let iptables = whole(fixture!("matches.iptables"));
    iptables.expect(&common);
    iptables.expect(&[
        ("lan tcp 10.0.0.1:9 > 192.0.2.9:15", "proxy"),
        ("lan tcp 10.0.0.1:9 > 192.0.2.9:20", "pass"),
        ("lan tcp 10.0.0.1:2 > 192.0.2.9:20", "proxy"),
    ]);
    let nft = whole(fixture!("matches.nft"));
    nft.expect(&common);
    nft.expect(&[
        ("lan tcp 10.0.0.1:9 > 192.0.2.1:10", "proxy"),
        ("lan tcp 10.0.0.1:9 > 192.0.2.1:11", "pass"),
        ("lan udp 10.0.0.1:9 > 192.0.2.1:20", "drop"),
        ("lan udp [fd00::1]:9 > [2001:db8::1]:60001", "proxy"),
        ("lan udp [fe00::1]:9 > [2001:db8::1]:60001", "pass"),
        ("lan udp 10.0.0.1:9 > 192.0.2.1:60001", "pass"),
        ("lan udp [fe00::1]:9 > [2001:db8::1]:8", "proxy"),
        ("lan dscp=46 udp [fe00::1]:9 > [2001:db8::1]:6", "pass"),
    ]);
}

#[test]
fn own_traffic_alone() {
    let judge = whole(&table(
        "nat",
        &[
            "-A OUTPUT -m owner --uid-owner 998 -j RETURN",
            "-A OUTPUT -o lo -j RETURN",
            "-A OUTPUT -p tcp -j REDIRECT --to-ports 12345",
        ],
    ));
    judge.expect(&[
        ("own uid=5 tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
        ("own uid=998 tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("eth0 tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
    ]);
}

#[test]
fn what_one_way_alone_has_is_not_of_the_other() {
    let judge = whole(&table(
        "mangle",
        &[
            "-A PREROUTING -s 10.0.0.0/8 -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
            "-A PREROUTING -m addrtype --src-type LOCAL -p udp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
            "-A OUTPUT -p udp --dport 53 -j MARK --set-xmark 0x1/0x1",
        ],
    ));
    judge.expect(&[
        ("lan tcp 10.0.0.1:9 > 192.0.2.9:53", "proxy"),
        ("lan udp 10.0.0.1:9 > 192.0.2.9:53", "pass"),
        ("own tcp 10.0.0.1:9 > 192.0.2.9:53", "pass"),
        ("own udp 10.0.0.1:9 > 192.0.2.9:53", "proxy"),
    ]);
}

#[test]
fn groups_that_send_are_exempt() {
    let judge = whole(&table(
        "nat",
        &[
            "-A OUTPUT -m owner --gid-owner 5-7 -j RETURN",
            "-A OUTPUT -m owner --gid-owner root -j RETURN",
            "-A OUTPUT -p tcp -m owner ! --gid-owner 23333 -j REDIRECT --to-ports 12345",
        ],
    ));
    judge.expect(&[
        ("own gid=23333 tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("own gid=6 tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("own gid=root tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("own gid=8 tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
        // Of a socket that is older than tproxy no group is known: it is not the one that is exempt.
        ("own tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
    ]);
}

#[test]
fn groups_of_nft_are_numbers_or_names() {
    let text = r#"{"nftables": [
        {"chain": {"family": "inet", "table": "t", "name": "c", "hook": "output", "type": "nat", "prio": -100}},
        {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 6, "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "skgid"}}, "right": {"set": [5, {"range": [7, 9]}]}}},
            {"accept": null}]}},
        {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 7, "expr": [
            {"match": {"op": "!=", "left": {"meta": {"key": "skgid"}}, "right": "root"}},
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
            {"redirect": {"port": 12345}}]}}]}"#;
    whole(text).expect(&[
        ("own gid=8 tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("own gid=root tcp 10.0.0.1:9 > 192.0.2.9:1", "pass"),
        ("own gid=6 tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
        ("own tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
    ]);
}

#[test]
fn rules_of_iptables_that_nft_does_not_tell() {
    let target = r#"{"nftables": [
        {"chain": {"family": "ip", "table": "mangle", "name": "PREROUTING", "hook": "prerouting", "prio": -150}},
        {"rule": {"family": "ip", "table": "mangle", "chain": "PREROUTING", "handle": 6, "expr": [
            {"xt": {"type": "target", "name": "TPROXY"}}]}}]}"#;
    let Err(Error::Nothing(lost)) = import(target) else { panic!("imported") };
    assert!(lost[0].starts_with("not carried over: ip mangle PREROUTING handle 6: "), "{lost:?}");
    assert!(lost[0].ends_with("import what iptables-save prints"), "{lost:?}");
}

#[test]
fn a_target_of_one_family_is_for_that_alone() {
    let text = r#"{"nftables": [
        {"chain": {"family": "inet", "table": "t", "name": "c", "hook": "prerouting", "prio": -150}},
        {"rule": {"family": "inet", "table": "t", "chain": "c", "handle": 6, "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}},
            {"tproxy": {"family": "ip", "addr": "127.0.0.1", "port": 7}}]}}]}"#;
    whole(text).expect(&[
        ("lan tcp 10.0.0.1:9 > 192.0.2.9:1", "proxy"),
        ("lan tcp [fd00::1]:9 > [2001:db8::1]:1", "pass"),
    ]);
}

#[test]
fn conditions_of_jumps_hold_in_the_chain() {
    let judge = whole(&table(
        "mangle",
        &[
            "-A PREROUTING -d 192.0.2.0/24 -i eth0 -p tcp -j P",
            "-A PREROUTING -p udp -g Q",
            "-A PREROUTING -p udp -j DROP",
            "-A P -d 192.0.2.128/25 -j RETURN",
            "-A P ! -s 10.0.0.0/8 -p tcp -m multiport --dports 80,443,8000:8080 -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
            "-A Q ! -i eth1 -p udp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
        ],
    ));
    judge.expect(&[
        ("eth0 tcp 11.0.0.1:1 > 192.0.2.1:80", "proxy"),
        ("eth0 tcp 11.0.0.1:1 > 192.0.2.1:8001", "proxy"),
        ("eth0 tcp 11.0.0.1:1 > 192.0.2.1:81", "pass"),
        ("eth0 tcp 10.0.0.1:1 > 192.0.2.1:80", "pass"),
        ("eth0 tcp 11.0.0.1:1 > 192.0.2.129:80", "pass"),
        ("eth0 tcp 11.0.0.1:1 > 192.0.3.1:80", "pass"),
        ("eth1 tcp 11.0.0.1:1 > 192.0.2.1:80", "pass"),
        // What comes back from a chain that was gone to does not come back here.
        ("eth1 udp 11.0.0.1:1 > 192.0.2.1:80", "pass"),
        ("eth0 udp 11.0.0.1:1 > 192.0.2.1:80", "proxy"),
    ]);
}

#[test]
fn redirects_to_a_service_and_dnat_are_diverts() {
    let rules = [
        "-A PREROUTING -i lan -p udp --dport 53 -j REDIRECT --to-ports 5353",
        "-A PREROUTING -i lan -p tcp --dport 53 -j DNAT --to-destination 10.0.0.1",
        "-A PREROUTING -i lan -p tcp --dport 853 -j DNAT --to-destination 10.0.0.1:8853",
        "-A PREROUTING -i lan -p tcp -j REDIRECT --to-ports 12345",
    ];
    whole(&table("nat", &rules)).expect(&[
        ("lan udp 10.0.0.2:1 > 8.8.8.8:53", "divert 127.0.0.1:5353"),
        ("lan tcp 10.0.0.2:1 > 8.8.8.8:53", "divert 10.0.0.1:53"),
        ("lan tcp 10.0.0.2:1 > 8.8.8.8:853", "divert 10.0.0.1:8853"),
        ("lan tcp 10.0.0.2:1 > 8.8.8.8:80", "proxy"),
        ("lan udp 10.0.0.2:1 > 8.8.8.8:80", "pass"),
    ]);
    let v6 = table("nat", &["-A PREROUTING -s fd00::/8 -p udp --dport 53 -j REDIRECT --to-ports 53"]);
    whole(&v6).expect(&[("lan udp [fd00::1]:1 > [2001:db8::1]:53", "divert [::1]:53")]);
    let both = [
        "-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 1",
        "-A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 2",
        "-A PREROUTING -p tcp --dport 82:83 -j DNAT --to-destination 10.0.0.1",
    ];
    let Err(Error::Nothing(lost)) = import(&table("nat", &both)) else { panic!("imported") };
    assert_eq!(lost.len(), 3, "{lost:?}");
}

#[test]
fn both_families_may_follow_each_other() {
    let of = |tool: &str, net: &str| {
        let bypass = format!("-A PREROUTING -d {net} -j RETURN");
        let rules = [&*bypass, "-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1"];
        format!("# Generated by {tool} v1.8.9\n{}", table("mangle", &rules))
    };
    whole(&(of("iptables-save", "10.0.0.0/8") + &of("ip6tables-save", "fc00::/7"))).expect(&[
        ("lan tcp 10.0.0.2:1 > 8.8.8.8:53", "proxy"),
        ("lan tcp 10.0.0.2:1 > 10.8.8.8:53", "pass"),
        ("lan tcp [fd00::1]:1 > [2001:db8::1]:53", "proxy"),
        ("lan tcp [fd00::1]:1 > [fd00::2]:53", "pass"),
        ("lan udp [fd00::1]:1 > [2001:db8::1]:53", "pass"),
    ]);
}

#[test]
fn the_mark_of_the_proxy_is_kept_where_it_can_be() {
    let rules = |mark: &str| {
        table(
            "mangle",
            &[
                "-A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x1/0x1",
                &format!("-A OUTPUT -m mark --mark {mark} -j RETURN"),
                "-A OUTPUT -p tcp -j MARK --set-xmark 0x1/0x1",
            ],
        )
    };
    assert_eq!(whole(&rules("0x10")).steer("own_mark"), Some("16".to_owned()));
    // The host's own captured packets would have the mark of the proxy's.
    assert_eq!(whole(&rules("0xff")).steer("own_mark"), None);
    assert_eq!(whole(&rules("0xff")).rules(), 1);
}

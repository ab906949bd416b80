use super::*;

fn written(name: &str, url: &str) -> Upstream {
    Upstream { name: name.to_owned(), url: url.to_owned(), ..Upstream::default() }
}

fn mistake(written: &[Upstream]) -> String {
    match Upstreams::new(written, &[], Path::new("/nowhere")) {
        Err(Mistake::Key(key, message)) => format!("{key}: {message}"),
        Err(Mistake::Elsewhere(failure)) => failure.to_string(),
        Ok(_) => panic!("{written:?}"),
    }
}

#[test]
fn an_upstream_is_found_by_its_name() {
    let known =
        Upstreams::new(&[written("exit", "socks5://10.0.0.2")], &[], Path::new("/")).ok().expect("one");
    assert_eq!(known.find("exit").expect("known").to_string(), "exit (socks5://10.0.0.2:1080)");
    assert_eq!(known.find("direct"), Ok(upstream::Upstream::Direct));
    assert_eq!(known.find("http://h:1").expect("a URL").to_string(), "http://h:1");
    assert!(known.find("exti").expect_err("unknown").contains("did you mean `exit`?"));
    assert!(known.find("other").expect_err("unknown").contains("expected exit, direct"));
}

#[test]
fn of_several_the_first_that_works_is_taken() {
    let known =
        Upstreams::new(&[written("exit", "socks5://10.0.0.2")], &[], Path::new("/")).ok().expect("one");
    let all =
        |texts: &[&str]| known.find_all(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
    assert_eq!(all(&["direct"]), Ok(upstream::Upstream::Direct));
    let Ok(upstream::Upstream::Group(group)) = all(&["exit", "http://h:1", "direct"]) else { panic!() };
    let checked = |member: &upstream::Upstream| match member {
        upstream::Upstream::Proxy(proxy) => proxy.check.is_some(),
        _ => true,
    };
    assert!(group.members.len() == 3 && group.members.iter().all(checked));
    assert!(all(&["exit", "nobody"]).is_err());
}

#[test]
fn groups_name_upstreams_and_have_them_checked() {
    let written = [written("one", "socks5://10.0.0.1"), written("two", "http://10.0.0.2:80")];
    let group = |name: &str, members: &[&str]| {
        let members = members.iter().map(|member| (*member).to_owned()).collect();
        Group { name: name.to_owned(), members, policy: Some(upstream::Policy::RoundRobin) }
    };
    let resolved = |groups: &[Group]| match Upstreams::new(&written, groups, Path::new("/")) {
        Ok(known) => Ok(known),
        Err(Mistake::Key(key, message)) => Err(format!("{key}: {message}")),
        Err(Mistake::Elsewhere(failure)) => Err(failure.to_string()),
    };
    let known = resolved(&[group("exits", &["two", "direct"])]).expect("valid");
    assert_eq!(known.find("exits").expect("known").to_string(), "exits (round-robin of two, direct)");
    let check = |name| match known.find(name).expect("known") {
        upstream::Upstream::Proxy(proxy) => proxy.check,
        other => panic!("{other}"),
    };
    assert_eq!((check("one"), check("two")), (None, Some(upstream::Check::default())));
    for (groups, expected) in [
        (vec![group("one", &["two"])], "group[0].name: 'one': there is one of this name already"),
        (vec![group("g", &[])], "group[0].members: expected names of upstreams"),
        (vec![group("g", &["thre"])], "group[0].members: 'thre': no [[upstream]]"),
        (vec![group("g", &["one"]), group("h", &["g"])], "group[1].members: 'g': no [[upstream]]"),
    ] {
        let error = resolved(&groups).expect_err(expected);
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn passwords_come_from_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("pw");
    let with = |content: &str| {
        std::fs::write(&path, content).expect("written");
        let username = Some("alice".to_owned());
        let upstream =
            Upstream { username, password_file: Some("pw".into()), ..written("exit", "socks5://10.0.0.2") };
        upstream.resolve(directory.path())
    };
    for content in ["s3cret", "s3cret\n", "s3cret\r\n"] {
        let proxy = with(content).expect("one line");
        assert_eq!(proxy.credentials.expect("some").password.reveal(), "s3cret");
    }
    for content in ["", "\n", "s3cret\nother", &"s3cret".repeat(100)] {
        let (key, message) = with(content).expect_err(content);
        assert_eq!(key, "password_file");
        assert!(!message.contains("s3cret"), "{message}");
    }
}

#[test]
fn authorities_come_from_a_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let own = rcgen::generate_simple_self_signed(["exit".to_owned()]).expect("a certificate");
    let with = |content: &str| {
        std::fs::write(directory.path().join("ca.pem"), content).expect("written");
        let upstream = Upstream { ca_file: Some("ca.pem".into()), ..written("exit", "https://10.0.0.2:443") };
        upstream.resolve(directory.path())
    };
    let tls = with(&own.cert.pem()).expect("valid").tls.expect("https");
    assert_eq!(tls.name.to_str(), "10.0.0.2");
    let expected = Tls::authorities(own.cert.pem().as_bytes()).expect("valid");
    assert_eq!(tls, tls.clone().signed_by(expected));
    for (content, expected) in [
        (String::new(), "there is none"),
        (own.signing_key.serialize_pem(), "there is none"),
        (own.cert.pem().replace("END", "BEGIN"), "expected certificates in PEM form"),
        (own.cert.pem().replace("MII", "AAA"), "a certificate cannot be used"),
        ("#".repeat((4 << 20) + 1), "at most 4 MiB"),
    ] {
        let (key, message) = with(&content).expect_err(expected);
        assert!(key == "ca_file" && message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn mistakes_are_told_with_their_key() {
    let exit = written("exit", "socks5://10.0.0.2");
    let user = Upstream { username: Some("u".to_owned()), ..exit.clone() };
    let file = Upstream { password_file: Some("pw".into()), ..exit.clone() };
    for (upstreams, expected) in [
        (vec![exit.clone(), exit.clone()], "upstream[1].name: 'exit': there is one"),
        (vec![written("direct", "socks5://h")], "upstream[0].name: 'direct': there is one"),
        (vec![written("a b", "socks5://h")], "upstream[0].name: expected up to 64 letters"),
        (vec![written("a", "gopher://h")], "upstream[0].url: 'gopher'"),
        (
            vec![Upstream { via: Some("exit".to_owned()), ..written("two", "socks5://h") }, exit.clone()],
            "upstream[0].via: 'exit': no [[upstream]]",
        ),
        (
            vec![Upstream { via: Some("direct".to_owned()), ..exit.clone() }],
            "upstream[0].via: 'direct': expected the name of an [[upstream]]",
        ),
        (
            vec![Upstream { ca_file: Some("ca".into()), ..exit.clone() }],
            "upstream[0].ca_file: it is of an https:// server alone",
        ),
        (
            vec![Upstream { ca_file: Some("ca".into()), ..written("a", "https://h:443") }],
            "upstream[0].ca_file: /nowhere/ca: No such file",
        ),
        (
            vec![Upstream { server_name: Some("-".into()), ..written("a", "https://h:443") }],
            "upstream[0].server_name: '-': expected a name or an address",
        ),
        (vec![user.clone()], "upstream[0].username: a user has a password"),
        (vec![file.clone()], "upstream[0].password_file: cannot read /nowhere/pw"),
        (
            vec![Upstream { password_env: Some("TPROXY_NONE".to_owned()), ..user.clone() }],
            "upstream[0].password_env: cannot read $TPROXY_NONE",
        ),
        (
            vec![Upstream { password_env: Some("PATH".to_owned()), ..exit.clone() }],
            "upstream[0].password_env: a password is of a user",
        ),
        (
            vec![Upstream { password_env: Some("PATH".to_owned()), ..file }],
            "upstream[0].username: it has several passwords",
        ),
    ] {
        let mistake = mistake(&upstreams);
        assert!(mistake.starts_with(expected), "{mistake}");
    }
}

//! Tests of the config file.

use std::path::Path;

use super::*;

fn wrong(text: &str) -> String {
    match parse(text.as_bytes(), Path::new("t.toml")) {
        Ok(parsed) => panic!("accepted: {parsed:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        }
    }
}

#[test]
fn explore() {
    for text in [
        "rule = [5]",
        "[capture]\niface = 'x'",
        "[capture]\ndport = 'x'",
        "[capture]\nproto = 'x'",
        "[steer]\nsteer=1",
        "[timeouts]\nudp_timeout=1",
        "[steer]\npriority = 1",
        "[log]\nlevel='warning'",
        "[log]\nlevel='verbose'",
        "[source]\nmode = 'clientport'",
        "[capture]\ninterfces = [\"eth0\"]",
        "[capture]\n  zzz = 1",
        "[captur]\nx = 1",
        "[[upstream]]\nname = 'x'",
        "[capture]\nto = [\"10.0.0.0/8\",\n \"10.0.0.1/8\"]",
        "[capture]\nto = \"10.0.0.1/8\"",
        "[capture]\nto = true",
        "[capture]\nto = [1.5]",
        "[capture]\nto = []",
        "[capture]\nports = [70000]",
        "[capture]\nports = [-1]",
        "[capture]\nports = [99999999999999999999999999]",
        "[capture]\nfail = \"opne\"",
        "[capture]\nfail = 5",
        "[capture]\nfail = {open = 1}",
        "[capture]\nown_traffic = \"yes\"",
        "[capture]\nprotocols = [\"tcp\", \"icmp\"]",
        "[capture",
        "[capture]\nto = [\"x\"",
        "a = 1\na = 2",
        "[capture]\n[capture]",
        "capture = 5",
        "rule = 5",
        "[rule]\naction='pass'",
        "[[rule]]\nto = ['::/0']",
        "[[rule]]\naction = 'pass'\n[[rule]]\naction='divert'",
        "[[rule]]\naction = 'pass'\ntarget='1.2.3.4:5'",
        "[[rule]]\naction = 'pass'\nupstream='direct'",
        "[[rule]]\naction = 'proxy'\nupstream='exits'",
        "[[rule]]\naction = 'proxy'\ngid=5",
        "[[rule]]\naction = 'proxy'\ndomain=['*.example.org']",
        "[[rule]]\naction = 'proxy'\nuid=['root', 'no-such-user']",
        "[[rule]]\naction = 'proxy'\nuid='5-3'",
        "[[rule]]\naction = 'proxy'\nto_file=['nowhere.txt']",
        "[[rule]]\naction = 'proxy'\n[[rule]]\nmac = ['x']\naction = 'pass'",
        "[limits]\nworkers = 65",
        "[limits]\nworkers = \"65\"",
        "[steer]\non_ip = 'x'",
        "[steer]\n\"a\\nb\\u001b\" = 'x'",
        "\"a`b\" = 1",
        "[timeouts]\nudp = 5",
        "x",
        "capture.to = [\"é\", \"10.0.0.1/8\"]",
    ] {
        println!("{text:?}\n    {}", wrong(text));
    }
}

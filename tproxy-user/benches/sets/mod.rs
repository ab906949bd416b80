//! Sets of rules of any size, the same in each run.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

use tproxy_common::policy::Line;
use tproxy_user::config::rule::Rule;
use tproxy_user::config::upstream::Upstream;
use tproxy_user::config::{Scope, file};
use tproxy_user::policy::compile::{RuleSet, compile};
use tproxy_user::policy::names::Names;
use tproxy_user::policy::rules::{Written, rule_set};
use tproxy_user::policy::targets::Targets;

/// Scattered numbers (`SplitMix64`, Steele et al., OOPSLA 2014).
fn scattered(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A public address.
pub(crate) fn address(number: u64) -> Ipv4Addr {
    let [a, b, c, d, ..] = scattered(number).to_be_bytes();
    Ipv4Addr::new(11 + a % 100, b, c, d)
}

/// Networks of 24 to 31 bits, each around the [`address`] of its number.
pub(crate) fn networks(count: u64) -> String {
    (0..count).fold(String::new(), |mut text, number| {
        let length = 24 + scattered(!number) % 8;
        let network = u32::from(address(number)) & (u32::MAX << (32 - length));
        writeln!(text, "{}/{length}", Ipv4Addr::from(network)).expect("memory");
        text
    })
}

/// Rules, each of one network around the [`address`] of its number, and one port.
pub(crate) fn rules(count: u64) -> String {
    (0..count).fold(String::new(), |mut text, number| {
        let network = u32::from(address(number)) & 0xffff_ff00;
        writeln!(
            text,
            "[[rule]]\nprotocol = \"tcp\"\nto = \"{}/24\"\nto_port = {}\naction = \"pass\"",
            Ipv4Addr::from(network),
            port(number)
        )
        .expect("memory");
        text
    })
}

/// The port of a rule.
pub(crate) const fn port(number: u64) -> u64 {
    1 + number % 60_000
}

/// A rule that passes what goes to the networks of the file `networks`.
pub(crate) const BY_FILE: &str = "[[rule]]\nto_file = \"networks\"\naction = \"pass\"\n";

/// Reads a config file.
pub(crate) fn read(config: &Path) -> (RuleSet, Vec<Rule>) {
    let (_, resolved) = file::read(config).expect("a config file");
    let written = Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &resolved.rules };
    let set = rule_set(written, &Names::default(), &Targets::default()).expect("no targets");
    (set, resolved.rules)
}

/// Its rules as the kernel has them.
pub(crate) fn image(config: &Path) -> Vec<Line> {
    compile(&read(config).0).expect("rules that fit")
}

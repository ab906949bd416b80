//! Rules, routes, qdiscs, settings and commands, each test in a network
//! namespace of its own. Without root they are shown as ignored.

mod harness;
mod plumbing {
    pub(crate) mod commands;
    pub(crate) mod life;
    pub(crate) mod network;
    pub(crate) mod world;
}

use clap::Parser as _;
use libtest_mimic::{Failed, Trial};
use plumbing::{commands, life, network, world};

fn main() {
    let root = nix::unistd::geteuid().is_root();
    let mut trials = Vec::new();
    for (name, test) in network::TESTS.iter().chain(commands::TESTS).chain(life::TESTS) {
        let run = move || world::in_namespace(*test).map_err(Failed::from);
        trials.push(Trial::test(*name, run).with_kind("needs root").with_ignored_flag(!root));
    }
    let (arguments, trials) = harness::CommandLine::parse().select(trials);
    libtest_mimic::run(&arguments, trials).exit();
}

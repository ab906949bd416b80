//! Forwarding at TC, by `bpf_redirect_neigh` (Linux 5.10): what the packets of established
//! connections could have at best, if programs translated them from one connection to the other.
//! Here nothing is translated: one connection goes through.

use std::thread;

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;

use crate::bpf;

/// Forwards between two devices until it is killed.
pub(crate) fn run([one, another]: [&str; 2]) -> Result<()> {
    let number = |name: &str| if_nametoindex(name).with_context(|| format!("no device {name}"));
    let (first, second) = (number(one)?, number(another)?);
    let attach = |from, to| bpf::attach_redirect(from, to).context("a program for TC");
    let _attached = (attach(first, second)?, attach(second, first)?);
    println!("{one} {another}");
    loop {
        thread::park();
    }
}

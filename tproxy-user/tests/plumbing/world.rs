//! A network namespace, and what `ip` says of it.

use std::process::Command;

use clap::Parser as _;
use nix::sched::{CloneFlags, unshare};
use tproxy_user::cli::{Cli, resolve};
use tproxy_user::config::Config;

pub(crate) type Outcome = Result<(), String>;
pub(crate) type Test = fn() -> Outcome;

/// Runs a test in a thread in a new network namespace, with `lo` up. The
/// namespace ends with the thread.
pub(crate) fn in_namespace(test: Test) -> Outcome {
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("unshare: {error}"))?;
        sh("ip link set lo up");
        test()
    };
    match std::thread::spawn(inside).join() {
        Ok(outcome) => outcome,
        Err(panic) => {
            let owned = panic.downcast_ref::<String>().cloned();
            Err(owned.or_else(|| panic.downcast_ref::<&str>().map(|&t| t.to_owned())).unwrap_or_default())
        }
    }
}

/// Runs a shell command in the namespace of this thread; it must succeed.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("sh");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// All that a proxy may change. Without the kernel's own IPv6 routes: those come
/// some time after the address.
pub(crate) fn picture() -> String {
    sh(
        "ip rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all | grep -v 'proto kernel' || true; \
        tc qdisc show; sysctl net.ipv4.conf.lo.accept_local",
    )
}

/// Compares with an earlier [`picture`].
pub(crate) fn expect_as_before(before: &str) -> Outcome {
    let after = picture();
    if after == before { Ok(()) } else { Err(format!("before:\n{before}after:\n{after}")) }
}

/// Runs asynchronous code on this thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(future)
}

/// The configuration of these flags.
pub(crate) fn config(flags: &str) -> Config {
    let argv = std::iter::once("tproxy-user").chain(flags.split_whitespace());
    resolve::config(&Cli::try_parse_from(argv).expect("flags").run).expect("valid")
}

/// Fails a test with a message.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use ensure;

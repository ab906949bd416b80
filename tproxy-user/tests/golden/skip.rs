//! Tests that this kernel cannot run.

use std::panic::{catch_unwind, resume_unwind};

use libtest_mimic::{Completion, Failed};
use tproxy_user::config::Kernel;
use tproxy_user::privilege::running_kernel;

/// Why a test is not run, carried out of it by unwinding.
struct Skip(String);

/// Ends the test: the kernel has refused what comes with a later version. From
/// that version on it is a failure.
///
/// # Panics
/// The kernel should have it.
pub(crate) fn needs(what: &str, since: Kernel) -> ! {
    let running = running_kernel().expect("a kernel version");
    assert!(running < since, "{what}: refused by Linux {running}, and there since {since}");
    resume_unwind(Box::new(Skip(format!("{what} needs Linux {since}"))))
}

/// Runs a test.
pub(crate) fn run(test: fn()) -> Result<Completion, Failed> {
    let Err(panic) = catch_unwind(test) else { return Ok(Completion::Completed) };
    if let Some(Skip(why)) = panic.downcast_ref() {
        return Ok(Completion::ignored_with(why));
    }
    let message = panic.downcast_ref::<String>().cloned();
    Err(message
        .or_else(|| panic.downcast_ref::<&str>().map(|&message| message.to_owned()))
        .unwrap_or_default()
        .into())
}

//! `cleanup`: removes what a killed run left.

use std::path::Path;

use crate::instance::{Instance, Paths};
use crate::undo::{self, Report};
use crate::{netlink, output, privilege};

/// Removes it, and says what it was.
///
/// # Errors
/// A conflict (exit code 5) while the proxy runs; where something cannot be
/// removed, after the rest was.
pub fn run(pin: &Path) -> anyhow::Result<()> {
    privilege::require_admin("cleanup")?;
    let mut report = Report::default();
    let instance = Instance::acquire_leftover(Paths::of(pin))?;
    if let Some(instance) = &instance {
        report = super::runtime()?.block_on(async {
            let handle = netlink::connect()?;
            anyhow::Ok(undo::everything(instance.state(), &handle).await)
        })?;
        // An instance is told by the last part of the path: this may be another directory.
        if instance.state().pin != pin {
            undo::pins(pin, &mut report);
        }
    } else {
        undo::pins(pin, &mut report);
    }
    for line in &report.done {
        output::print(&format!("{line}\n"))?;
    }
    if report.done.is_empty() && report.failed.is_empty() {
        output::print("nothing to clean up\n")?;
    }
    // The state stays where something failed, for another try.
    for error in report.failed.iter().skip(1) {
        super::complain(&format!("{error:#}"));
    }
    report.into_result()?;
    if let Some(instance) = instance {
        instance.finish()?;
    }
    Ok(())
}

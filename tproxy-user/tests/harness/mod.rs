//! The command line of tests that libtest-mimic runs: any number of filters, as libtest itself
//! takes; it takes one.

use clap::Parser;
use libtest_mimic::{Arguments, Trial};

/// Its arguments, and further filters.
#[derive(Parser)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    arguments: Arguments,
    /// Tests that one of several filters selects are run
    #[arg(value_name = "FILTER")]
    further: Vec<String>,
}

impl CommandLine {
    /// The tests that any of several filters selects, and arguments that do not select among them
    /// again. One filter is left to libtest-mimic, which counts what it leaves out.
    pub(crate) fn select(mut self, mut trials: Vec<Trial>) -> (Arguments, Vec<Trial>) {
        if !self.further.is_empty() {
            self.further.extend(self.arguments.filter.take());
            let is_meant = |name: &str, filter: &String| {
                if self.arguments.exact { name == filter } else { name.contains(filter) }
            };
            trials.retain(|trial| self.further.iter().any(|filter| is_meant(trial.name(), filter)));
        }
        (self.arguments, trials)
    }
}

//! What the tests of a guest have said.

use std::collections::BTreeMap;

use serde::Serialize;
use xtask::lab::kernel::{Lacking, Version};

use crate::recap::Details;
use crate::totals::Totals;

/// What came of one test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "outcome", content = "why")]
pub(crate) enum Outcome {
    /// It ran and found no fault.
    Passed,
    /// The kernel lacks something.
    Skipped(String),
    /// It found a fault, or was skipped for no good reason.
    Failed(String),
}

/// What came of the tests on one kernel.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Results {
    /// By `EXECUTABLE TEST`.
    pub(crate) tests: BTreeMap<String, Outcome>,
    /// What is wrong with the run as a whole.
    pub(crate) faults: Vec<String>,
    /// What the executables print about their failed tests.
    #[serde(skip)]
    pub(crate) details: String,
}

impl Results {
    /// Reads the output of a guest. `release` is its kernel's: a test may be
    /// skipped only for what that kernel lacks. `expected` are the executables.
    pub(crate) fn parse(output: &str, release: &str, expected: &[&str]) -> Self {
        let running = Version::parse(release);
        let mut results = Self::default();
        let (mut executable, mut counted, mut details) = ("", Totals::default(), Details::default());
        let mut ended: Vec<&str> = Vec::new();
        for line in output.lines() {
            if let Some(name) = line.strip_prefix("begin ") {
                (executable, counted) = (name, Totals::default());
            } else if let Some((name, status)) = line.strip_prefix("end ").and_then(|end| end.split_once(' '))
            {
                let of_run = results.totals_of(name);
                if counted != of_run || (status == "0") != (counted.failed == 0) {
                    results.faults.push(format!(
                        "{name} ended with {status} and told of {}, but counted {}",
                        of_run.line(),
                        counted.line()
                    ));
                }
                ended.push(name);
            } else if let Some(totals) = Totals::parse(line) {
                counted = totals;
            } else if let Some((name, outcome)) =
                line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            {
                results.tests.insert(format!("{executable} {name}"), Outcome::parse(outcome));
            }
            details.line(line);
        }
        results.details = details.found().unwrap_or_default();
        for name in expected.iter().filter(|name| !ended.contains(*name)) {
            results.faults.push(format!("{name} did not end"));
        }
        results.refuse_skips(running);
        results
    }

    /// The kernel named by a skip must be newer than the one that ran.
    fn refuse_skips(&mut self, running: Option<Version>) {
        for outcome in self.tests.values_mut() {
            let Outcome::Skipped(why) = outcome else { continue };
            let lacks =
                Lacking::parse(why).is_some_and(|lacking| running.is_some_and(|has| has < lacking.since));
            if !lacks {
                *outcome = Outcome::Failed(format!("skipped, but this kernel has what it needs: {why}"));
            }
        }
    }

    fn totals_of(&self, executable: &str) -> Totals {
        let mut totals = Totals::default();
        for (name, outcome) in &self.tests {
            if name.split_once(' ').is_some_and(|(of, _)| of == executable) {
                totals.count(outcome);
            }
        }
        totals
    }

    /// What failed, and why.
    pub(crate) fn failures(&self) -> impl Iterator<Item = String> {
        let refused = self.tests.iter().filter_map(|(name, outcome)| match outcome {
            Outcome::Failed(why) if !why.is_empty() => Some(format!("{name}: {why}")),
            _ => None,
        });
        let details = (!self.details.is_empty()).then(|| format!("\n{}", self.details));
        self.faults.iter().cloned().chain(refused).chain(details)
    }

    /// Every test, and one failure for each fault of the whole.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals { failed: self.faults.len() as u64, ..Totals::default() };
        for outcome in self.tests.values() {
            totals.count(outcome);
        }
        totals
    }
}

impl Outcome {
    /// Reads what libtest (`ignored, WHY`) and libtest-mimic (`ignored (WHY)`) say.
    fn parse(said: &str) -> Self {
        match (said, said.strip_prefix("ignored")) {
            ("ok", _) => Self::Passed,
            (_, Some(why)) => {
                let why = why.trim_start_matches(", ").trim_start_matches(" (").trim_end_matches(')');
                Self::Skipped(why.to_owned())
            }
            _ => Self::Failed(String::new()),
        }
    }
}

impl Totals {
    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
            Outcome::Failed(_) => self.failed += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "begin golden\n\nrunning 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\n\
        wrong\n\nfailures:\n    b\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n\nend golden 101\n\
        begin netns\n\nrunning 2 tests\ntest T1_x::v4   ... ok\ntest c::v4 ... ignored (tcx needs Linux 6.6)\n\n\
        test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured\nend netns 0\n";

    fn failed(results: &Results) -> Vec<&str> {
        results
            .tests
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Failed(_)))
            .map(|(name, _)| name.as_str())
            .collect()
    }

    #[test]
    fn outcomes_are_read_with_what_explains_them() {
        let results = Results::parse(OUTPUT, "6.1.0-50-cloud-amd64", &["golden", "netns"]);
        assert_eq!(results.faults, Vec::<String>::new());
        assert_eq!(failed(&results), ["golden b"]);
        assert_eq!(results.totals(), Totals { passed: 2, failed: 1, skipped: 1 });
        assert_eq!(results.tests["netns c::v4"], Outcome::Skipped("tcx needs Linux 6.6".into()));
        assert!(
            results.details.contains("wrong") && !results.details.contains("T1_x"),
            "{}",
            results.details
        );
    }

    #[test]
    fn both_harnesses_are_understood() {
        for said in ["ignored, tcx needs Linux 6.6", "ignored (tcx needs Linux 6.6)"] {
            assert_eq!(Outcome::parse(said), Outcome::Skipped("tcx needs Linux 6.6".into()));
        }
        assert_eq!(Outcome::parse("ok"), Outcome::Passed);
        assert_eq!(Outcome::parse("FAILED"), Outcome::Failed(String::new()));
    }

    #[test]
    fn a_skip_that_the_kernel_does_not_justify_is_a_failure() {
        let results = Results::parse(OUTPUT, "6.6.1", &["golden", "netns"]);
        assert_eq!(failed(&results), ["golden b", "netns c::v4"]);
        let vague = OUTPUT.replace("tcx needs Linux 6.6", "no mood");
        assert_eq!(failed(&Results::parse(&vague, "6.1.0", &[])), ["golden b", "netns c::v4"]);
    }

    #[test]
    fn what_did_not_end_or_lost_tests_is_a_fault() {
        let cut = OUTPUT.split("end netns").next().unwrap_or_default();
        assert_eq!(Results::parse(cut, "6.1.0", &["golden", "netns"]).faults, ["netns did not end"]);
        let lost = OUTPUT.replace("test a ... ok\n", "");
        assert_eq!(Results::parse(&lost, "6.1.0", &["golden"]).faults.len(), 1);
        let lied = OUTPUT.replace("end netns 0", "end netns 134");
        assert_eq!(Results::parse(&lied, "6.1.0", &["golden", "netns"]).totals().failed, 2);
    }
}

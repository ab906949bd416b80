//! How many tests passed, failed, were skipped.

/// What came of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Totals {
    /// Adds others.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// The line that ends `cargo xtask test`.
    pub(crate) fn line(self) -> String {
        let skipped = if self.skipped > 0 { format!(", {} skipped", self.skipped) } else { String::new() };
        format!("{} passed, {} failed{skipped}", self.passed, self.failed)
    }

    /// Reads the line that ends the output of a test executable.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
        let count = |what: &str| {
            let piece = counts.split("; ").find(|piece| piece.ends_with(what))?;
            piece.split(' ').next()?.parse().ok()
        };
        Some(Self { passed: count(" passed")?, failed: count(" failed")?, skipped: count(" ignored")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        let line = "test result: FAILED. 79 passed; 11 failed; 120 ignored; 0 measured; 0 filtered out; finished in 5s";
        assert_eq!(Totals::parse(line), Some(Totals { passed: 79, failed: 11, skipped: 120 }));
        assert_eq!(Totals::parse("test a ... ok"), None);
    }

    #[test]
    fn the_last_line_is_as_documented() {
        assert_eq!(Totals { passed: 3, failed: 0, skipped: 0 }.line(), "3 passed, 0 failed");
        assert_eq!(Totals { passed: 3, failed: 1, skipped: 2 }.line(), "3 passed, 1 failed, 2 skipped");
    }
}

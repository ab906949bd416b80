//! What failed, told once more at the end: a log is often read from there, or only there.

/// Lines of one failure that are told again.
const LONGEST: usize = 60;

/// What failed so far.
#[derive(Debug, Default)]
pub(crate) struct Recap(Vec<String>);

impl Recap {
    /// Says what failed, and remembers it.
    pub(crate) fn tell(&mut self, failure: String) {
        println!("{failure}");
        self.note(failure);
    }

    /// Remembers what was said already.
    pub(crate) fn note(&mut self, failure: String) {
        self.0.push(failure);
    }

    /// All of it; nothing where nothing failed.
    pub(crate) fn text(&self) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut text = String::from("\nwhat failed, again:\n");
        for failure in &self.0 {
            let lines: Vec<_> = failure.lines().collect();
            for line in lines.iter().take(LONGEST) {
                text.extend([line, "\n"]);
            }
            if let Some(more) = lines.len().checked_sub(LONGEST + 1) {
                text.extend(["… and ", &(more + 1).to_string(), " lines above\n"]);
            }
        }
        text
    }
}

/// Finds what executables of libtest and libtest-mimic tell of their failed tests: between
/// `failures:` and another `failures:`, behind which their names follow once more.
#[derive(Debug, Default)]
pub(crate) struct Details {
    headings: usize,
    text: String,
}

impl Details {
    /// Takes the next line.
    pub(crate) fn line(&mut self, line: &str) {
        if line == "failures:" {
            self.headings += 1;
        } else if line.starts_with("test result:") {
            self.headings = 0;
        } else if self.headings == 1 && !(line.is_empty() && self.text.is_empty()) {
            self.text.extend([line, "\n"]);
        }
    }

    /// What was found; `None`: all went well.
    pub(crate) fn found(self) -> Option<String> {
        let text = self.text.trim_end();
        (!text.is_empty()).then(|| text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(output: &str) -> Option<String> {
        let mut details = Details::default();
        output.lines().for_each(|line| details.line(line));
        details.found()
    }

    #[test]
    fn details_of_failures_are_found() {
        let output = "test a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b ----\nwrong\n\nby far\n\n\nfailures:\n    b\n\ntest result: FAILED.\n";
        assert_eq!(details(output).as_deref(), Some("---- b ----\nwrong\n\nby far"));
        assert_eq!(details(&output.repeat(2)).map(|found| found.matches("wrong").count()), Some(2));
        assert_eq!(details("test a ... ok\n\ntest result: ok."), None);
    }

    #[test]
    fn a_long_failure_is_cut_and_says_so() {
        let mut recap = Recap::default();
        assert_eq!(recap.text(), "");
        recap.note("line\n".repeat(LONGEST + 2));
        assert_eq!(recap.text().matches("line\n").count(), LONGEST);
        assert!(recap.text().ends_with("… and 2 lines above\n"), "{}", recap.text());
    }
}

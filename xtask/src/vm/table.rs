//! The table at the end: a test a row, a kernel a column.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::results::{Outcome, Results};

/// A column: its head, and what came of the tests.
pub(crate) type Column<'a> = (String, &'a Results);

/// Renders the table. The families of a scenario share a row; its cell tells
/// the worst. Reasons stand below, numbered.
pub(crate) fn render(columns: &[Column<'_>]) -> String {
    let name = |test: &str| test.split("::v").next().unwrap_or_default().to_owned();
    let rows: BTreeSet<String> =
        columns.iter().flat_map(|(_, results)| results.tests.keys()).map(|test| name(test)).collect();
    let mut notes = Notes::default();
    let mut lines: Vec<Vec<String>> = vec![
        std::iter::once("test".to_owned()).chain(columns.iter().map(|(head, _)| head.clone())).collect(),
    ];
    for row in rows {
        let mut line = vec![row.clone()];
        for (_, results) in columns {
            let outcomes =
                results.tests.iter().filter(|(test, _)| name(test) == row).map(|(_, outcome)| outcome);
            line.push(cell(outcomes, &mut notes));
        }
        lines.push(line);
    }
    let widths: Vec<usize> =
        (0..=columns.len()).map(|n| lines.iter().map(|line| line[n].len()).max().unwrap_or(0)).collect();
    let mut table = String::new();
    for line in lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        table.extend([cells.join("  ").trim_end(), "\n"]);
    }
    table + &notes.render()
}

/// The reasons, each with its number.
#[derive(Default)]
struct Notes(BTreeMap<String, usize>);

impl Notes {
    fn number(&mut self, why: &str) -> usize {
        let next = self.0.len() + 1;
        *self.0.entry(why.to_owned()).or_insert(next)
    }

    fn render(&self) -> String {
        let mut sorted: Vec<_> = self.0.iter().collect();
        sorted.sort_by_key(|(_, number)| **number);
        sorted.iter().fold(String::new(), |mut text, (why, number)| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "[{number}] {why}");
            text
        })
    }
}

fn cell<'a>(outcomes: impl Iterator<Item = &'a Outcome>, notes: &mut Notes) -> String {
    let (mut text, mut worst) = ("-".to_owned(), 0);
    for outcome in outcomes {
        let (rank, word, why) = match outcome {
            Outcome::Passed => (1, "ok", ""),
            Outcome::Skipped(why) => (2, "skipped", why.as_str()),
            Outcome::Failed(why) => (3, "FAILED", why.as_str()),
        };
        if rank > worst {
            worst = rank;
            text = if why.is_empty() { word.into() } else { format!("{word} [{}]", notes.number(why)) };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_tests_and_columns_kernels() {
        let results = |tests: &[(&str, Outcome)]| Results {
            tests: tests.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect(),
            ..Results::default()
        };
        let tcx = || Outcome::Skipped("tcx needs Linux 6.6".into());
        let old = results(&[
            ("golden mark", Outcome::Passed),
            ("netns tcx::v4", tcx()),
            ("netns tcx::v6", tcx()),
            ("netns T1_web::v4", Outcome::Passed),
            ("netns T1_web::v6", Outcome::Failed(String::new())),
        ]);
        let new = results(&[("netns tcx::v6", Outcome::Passed), ("netns T1_web::v6", Outcome::Passed)]);
        let expected = "\
test          5.10         newest v6
golden mark   ok           -
netns T1_web  FAILED       ok
netns tcx     skipped [1]  ok
[1] tcx needs Linux 6.6
";
        assert_eq!(render(&[("5.10".into(), &old), ("newest v6".into(), &new)]), expected);
    }
}

//! The figures, for people.

use std::fmt::Write as _;

use super::series::{DIRECT, Figures, IPTABLES, Judgement, Of, Role, Series, figure};
use super::statistics::Spread;

/// What the ratios of a line are to.
const RATIOS: [Of; 3] = [DIRECT, IPTABLES, Of::BestPeer];

/// Lines for a terminal: one a candidate.
pub(crate) fn text(series: &Series) -> String {
    let mut rows = vec![vec![
        format!("{}: {}", series.title, heading(series)),
        "median (least–most)".to_owned(),
        "of direct".to_owned(),
        "of iptables".to_owned(),
        "of best peer".to_owned(),
        "target".to_owned(),
    ]];
    for figures in &series.figures {
        let mut row = vec![format!("  {}", figures.name), spread(figures)];
        row.extend(RATIOS.map(|of| share(series, figures, of)));
        let verdicts: Vec<String> = series.judge(figures).iter().map(verdict).collect();
        row.push(figures.failure.clone().unwrap_or_else(|| verdicts.join("; ")));
        rows.push(row);
    }
    align(&rows)
}

fn heading(series: &Series) -> String {
    format!("{}, {}", series.metric.name, series.metric.unit)
}

fn spread(figures: &Figures) -> String {
    let Some(spread) = figures.spread() else { return "failed".to_owned() };
    format!("{} ({}–{})", figure(spread.median), figure(spread.least), figure(spread.most))
}

/// Of other people's only the median: they are many.
fn cell(figures: &Figures) -> String {
    match figures.spread() {
        Some(Spread { median, least, most }) if figures.role == Role::Peer || least >= most => figure(median),
        _ => spread(figures),
    }
}

fn share(series: &Series, figures: &Figures, of: Of) -> String {
    series.ratio(figures, of).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
}

fn verdict(judgement: &Judgement) -> String {
    let reached = match judgement.reached {
        Some(true) => "reached",
        Some(false) => "MISSED",
        None => "nothing to compare with",
    };
    format!("{}: {}, {reached}", judgement.target, judgement.measured)
}

/// Columns as wide as their longest entry; all but the first and the last to the right.
fn align(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let last = rows[0].len() - 1;
    let mut text = String::new();
    for row in rows {
        let mut line = format!("{:<1$}", row[0], width(0));
        for (column, entry) in row.iter().enumerate().take(last).skip(1) {
            // Writing to a string does not fail.
            let _ = write!(line, "  {entry:>0$}", width(column));
        }
        text.push_str(format!("{line}  {}", row[last]).trim_end());
        text.push('\n');
    }
    text
}

/// How many of the targets were reached, and which were not.
pub(crate) fn summary(all: &[Series]) -> String {
    let judgements: Vec<(&Series, Judgement)> = all
        .iter()
        .flat_map(|series| {
            series.figures.iter().flat_map(move |figures| {
                series.judge(figures).into_iter().map(move |judgement| (series, judgement))
            })
        })
        .filter(|(_, judgement)| judgement.reached.is_some())
        .collect();
    let reached = judgements.iter().filter(|(_, judgement)| judgement.reached == Some(true)).count();
    let mut text = format!("{reached} of {} targets reached", judgements.len());
    for (series, judgement) in judgements.iter().filter(|(_, judgement)| judgement.reached == Some(false)) {
        let _ = write!(
            text,
            "\n  missed: {}, {}: {}, here {}",
            series.title, series.metric.name, judgement.target, judgement.measured
        );
    }
    text
}

/// Markdown tables: a line for each series, a column for each candidate; those that have no
/// candidate in common with the one before begin another.
pub(crate) fn markdown(all: &[Series]) -> String {
    let related = |one: &Series, other: &Series| {
        one.figures.iter().any(|figures| other.figures.iter().any(|others| others.name == figures.name))
    };
    all.chunk_by(related).map(markdown_of).collect::<Vec<_>>().join("\n")
}

fn markdown_of(all: &[Series]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for figures in all.iter().flat_map(|series| &series.figures) {
        if !names.contains(&figures.name.as_str()) {
            names.push(&figures.name);
        }
    }
    let mut text = "| what | ".to_owned();
    text.push_str(&names.join(" | "));
    text.push_str(" | target: here |\n|---|");
    text.push_str(&"---|".repeat(names.len() + 1));
    text.push('\n');
    for series in all {
        let _ = write!(text, "| {}: {}", series.title, heading(series));
        for name in &names {
            let figures = series.figures.iter().find(|figures| figures.name == *name);
            text.push_str(" | ");
            text.push_str(&figures.map_or_else(String::new, cell));
        }
        let verdicts: Vec<String> = series
            .figures
            .iter()
            .flat_map(|figures| series.judge(figures))
            .map(|judged| verdict(&judged))
            .collect();
        let _ = writeln!(text, " | {} |", verdicts.join("; "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::series::tests::series;
    use super::super::series::{Better, Target};
    use super::*;

    const TARGETS: &[Target] = &[Target::AtLeast(0.95, DIRECT), Target::AtLeast(1.3, Of::BestPeer)];

    #[test]
    fn a_line_a_candidate() {
        let mut series = series(Better::More, TARGETS);
        series.figures[2].failure = Some("it ended with exit status: 1".into());
        let expected = "\
a case: rate, 1/s  median (least–most)  of direct  of iptables  of best peer  target
  direct           1,500 (1,000–2,000)       1.00            -          1.67
  ebpf               1,200 (900–1,800)       0.90            -          1.50  ≥ 0.95 of direct: 0.90, MISSED; ≥ 1.3 of best peer (fast): 1.50, reached
  slow                          failed          -            -             -  it ended with exit status: 1
  fast                 900 (600–1,200)       0.60            -          1.00
";
        assert_eq!(text(&series), expected);
    }

    #[test]
    fn what_was_missed_is_summed_up() {
        let all = [series(Better::More, TARGETS)];
        assert_eq!(
            summary(&all),
            "1 of 2 targets reached\n  missed: a case, rate: ≥ 0.95 of direct, here 0.90"
        );
    }

    #[test]
    fn a_column_a_candidate_and_a_table_for_those_of_another_kind() {
        let mut second = series(Better::More, &[]);
        second.title = "another".into();
        second.figures.truncate(2);
        let mut third = second.clone();
        third.figures.truncate(1);
        third.figures[0].name = "1 rule".into();
        let expected = "\
| what | direct | ebpf | slow | fast | target: here |
|---|---|---|---|---|---|
| a case: rate, 1/s | 1,500 (1,000–2,000) | 1,200 (900–1,800) | 250 | 900 | ≥ 0.95 of direct: 0.90, MISSED; ≥ 1.3 of best peer (fast): 1.50, reached |
| another: rate, 1/s | 1,500 (1,000–2,000) | 1,200 (900–1,800) |  |  |  |

| what | 1 rule | target: here |
|---|---|---|
| another: rate, 1/s | 1,500 (1,000–2,000) |  |
";
        assert_eq!(markdown(&[series(Better::More, TARGETS), second, third]), expected);
    }
}

//! What commands print on standard output: tables for people, JSON for programs.

use std::io::{self, Write as _};
use std::time::Duration;

/// Prints, and takes a reader that went away (`flows | head`) for done.
///
/// # Errors
/// Where standard output cannot be written for another reason.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Prints JSON, indented, with a final newline.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl serde::Serialize) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    print(&(text + "\n"))
}

/// How a column is aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// For words.
    Left,
    /// For numbers.
    Right,
}

/// A table with a head line; columns are as wide as their widest cell.
#[derive(Debug)]
pub struct Table<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// An empty table.
    #[must_use]
    pub fn new(columns: [(&str, Align); N]) -> Self {
        Self { align: columns.map(|(_, align)| align), rows: vec![columns.map(|(name, _)| name.to_owned())] }
    }

    /// Adds a line.
    pub fn push(&mut self, row: [String; N]) {
        self.rows.push(row);
    }
}

impl<const N: usize> std::fmt::Display for Table<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width: [usize; N] =
            std::array::from_fn(|i| self.rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(self.align)
                .zip(width)
                .map(|((cell, align), width)| match align {
                    Align::Left => format!("{cell:<width$}"),
                    Align::Right => format!("{cell:>width$}"),
                })
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// A number of bytes in three digits or a little more: `999 B`, `1.2 KiB`, `34.5 MiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    // In tenths, rounded down, so that no float is needed.
    let mut tenths = u128::from(count) * 10;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]) }
}

/// A span of time by its two greatest units: `3d4h`, `5m20s`, `7s`.
#[must_use]
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes, seconds) =
        (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{seconds}s"),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans() {
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in [(0, "0s"), (59, "59s"), (320, "5m20s"), (7440, "2h4m"), (273_600, "3d4h")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([("NAME", Align::Left), ("COUNT", Align::Right)]);
        table.push(["a".to_owned(), "1".to_owned()]);
        table.push(["longer".to_owned(), "23".to_owned()]);
        assert_eq!(table.to_string(), "NAME    COUNT\na           1\nlonger     23\n");
    }
}

//! Which scenarios run, where not all of them can: on a slow machine.

use super::Family;

/// Environment variable: `FAMILY N/M`. Scenarios run with this family only,
/// `v4` or `v6`, and of the scenarios only the Nth of M parts, besides the core.
pub const VARIABLE: &str = "TPROXY_LAB_SELECTION";

/// The scenario of 100,000 idle connections, which runs only where it is named in full.
pub const IDLE: &str = "idle_100000_connections";

/// A part of the scenarios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The family that they run with.
    pub family: Family,
    /// Which part, from 0.
    pub part: usize,
    /// Of how many.
    pub parts: usize,
}

impl Selection {
    /// That of the environment; `None`: all scenarios run with both families.
    ///
    /// # Errors
    /// Where the variable is not understood.
    pub fn from_environment() -> anyhow::Result<Option<Self>> {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(None) };
        match Self::parse(&text) {
            Some(selection) => Ok(Some(selection)),
            None => anyhow::bail!("{VARIABLE}: not understood: {text:?}"),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (family, share) = text.split_once(' ')?;
        let family = Family::ALL.into_iter().find(|known| known.name() == family)?;
        let (part, parts) = share.split_once('/')?;
        let (part, parts) = (part.parse().ok()?, part_count(parts)?);
        (part < parts).then_some(Self { family, part, parts })
    }

    /// Whether the `number`th scenario runs with a family.
    #[must_use]
    pub fn takes(&self, number: usize, core: bool, family: Family) -> bool {
        family == self.family && (core || number % self.parts == self.part)
    }
}

fn part_count(text: &str) -> Option<usize> {
    text.parse().ok().filter(|parts| *parts > 0)
}

impl std::fmt::Display for Selection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}/{}", self.family.name(), self.part, self.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_read_as_it_is_written() {
        let selection = Selection { family: Family::V6, part: 1, parts: 4 };
        assert_eq!(selection.to_string(), "v6 1/4");
        assert_eq!(Selection::parse("v6 1/4"), Some(selection));
        for wrong in ["v5 0/4", "v4 4/4", "v4 0/0", "v4", ""] {
            assert_eq!(Selection::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn each_scenario_is_in_one_part_and_the_core_in_all() {
        let parts = [0, 1, 2, 3].map(|part| Selection { family: Family::V4, part, parts: 4 });
        for number in 0..10 {
            let takes = |core| parts.iter().filter(|part| part.takes(number, core, Family::V4)).count();
            assert_eq!((takes(false), takes(true)), (1, 4));
        }
        assert!(!parts[0].takes(0, true, Family::V6));
    }
}

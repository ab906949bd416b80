//! A list of rules → a shorter one that says the same.

use super::condition::Conditions;

/// A rule, as far as it matters here.
pub(crate) trait Decides {
    /// When it decides.
    fn conditions(&self) -> &Conditions;
    /// Whether it decides the same.
    fn agrees(&self, other: &Self) -> bool;
    /// Takes over the flows of another rule; `conditions` are those of both.
    fn absorb(&mut self, other: Self, conditions: Conditions);
}

/// Rules that never decide, or decide as the next ones would, are left out; neighbours
/// that decide the same become one.
#[must_use]
pub(crate) fn simplify<R: Decides>(mut rules: Vec<R>) -> Vec<R> {
    loop {
        let before = rules.len();
        rules = without_superfluous(without_hidden(joined(rules)));
        if rules.len() == before {
            return rules;
        }
    }
}

fn joined<R: Decides>(rules: Vec<R>) -> Vec<R> {
    let mut joined: Vec<R> = Vec::new();
    for rule in rules {
        match joined.last_mut() {
            Some(last) if last.agrees(&rule) => match last.conditions().or(rule.conditions()) {
                Some(either) => last.absorb(rule, either),
                None => joined.push(rule),
            },
            _ => joined.push(rule),
        }
    }
    joined
}

/// Without rules all of whose flows an earlier one takes.
fn without_hidden<R: Decides>(rules: Vec<R>) -> Vec<R> {
    let mut seen: Vec<R> = Vec::new();
    for rule in rules {
        if !seen.iter().any(|earlier| earlier.conditions().covers(rule.conditions())) {
            seen.push(rule);
        }
    }
    seen
}

/// Without rules all of whose flows a later one decides in the same way, with none between
/// that would decide some otherwise.
fn without_superfluous<R: Decides>(mut rules: Vec<R>) -> Vec<R> {
    for index in (0..rules.len()).rev() {
        let (rule, later) = (&rules[index], &rules[index + 1..]);
        let touched = later.iter().find(|other| {
            if rule.agrees(other) {
                other.conditions().covers(rule.conditions())
            } else {
                other.conditions().and(rule.conditions()).is_some()
            }
        });
        if touched.is_some_and(|other| rule.agrees(other)) {
            rules.remove(index);
        }
    }
    rules
}

//! Rules of iptables and nft that lead traffic to a proxy → a configuration.
//!
//! Text → chains as they are ([`model`]) → rules of which the first that matches decides
//! ([`flatten`]) → what the configuration says ([`settle`]) → its text ([`write`]). All of it is pure.

mod condition;
mod flatten;
mod iptables;
mod model;
mod nft;
mod ports;
mod relevant;
mod settle;
mod simplify;
mod value;
mod write;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use flatten::{Lost, Way};
use model::Ruleset;

/// A configuration that was made of rules.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Its text.
    pub toml: String,
    /// What it does not hold of the rules: one line each.
    pub lost: Vec<String>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input is of another kind.
    #[error("line 1: neither what iptables-save prints nor what 'nft -j list ruleset' does: {0}")]
    Neither(&'static str),
    /// iptables-save prints no such line.
    #[error("line {line}: {what}")]
    Malformed {
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// Not JSON; it tells line and column.
    #[error("malformed JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// There are too many jumps within each other, or they go in a circle.
    #[error("the rules jump and set marks in too many ways to be written as one list")]
    TooComplex,
    /// No rule would be in the configuration.
    #[error("there is no TPROXY, REDIRECT or DNAT rule that could be carried over")]
    Nothing(Vec<String>),
}

/// Makes a configuration of what iptables-save, ip6tables-save or `nft -j list ruleset` printed.
///
/// # Errors
/// [`Error`].
pub fn import(text: &str) -> Result<Imported, Error> {
    let (tool, ruleset) = read(text)?;
    let steering = relevant::steering(&ruleset);
    let relevant = relevant::bases(&ruleset, steering);
    let mut lost = Lost::new();
    let arriving = flatten::flatten(&ruleset, &relevant, Way::Arriving, steering, &mut lost)?;
    let own = flatten::flatten(&ruleset, &relevant, Way::Own, steering, &mut lost)?;
    let settled = settle::settle(&arriving, &own, steering, &mut lost);
    let lost: Vec<_> = lost
        .iter()
        .map(|(source, why)| {
            let model::Source { place, text, .. } = &ruleset.sources[*source];
            write::printable(&format!("not carried over: {place}: {text}: {why}"))
        })
        .collect();
    if settled.interfaces.is_empty() && !settled.own_traffic {
        return Err(Error::Nothing(lost));
    }
    let mut comments = vec![format!("Made by tproxy-user import of what {tool} printed.")];
    comments.extend(others(&ruleset, &relevant));
    comments.extend(lost.iter().cloned());
    Ok(Imported { toml: write::write(&settled, &ruleset.sources, &comments), lost })
}

/// Tells the tool by the text.
fn read(text: &str) -> Result<(&'static str, Ruleset), Error> {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines().find(|line| !line.starts_with('#')).unwrap_or_default();
    if first.starts_with('{') {
        return Ok(("nft", nft::parse(text)?));
    }
    if first.starts_with('*') {
        return Ok(("iptables-save", iptables::parse(text)?));
    }
    Err(Error::Neither(match first.split_ascii_whitespace().next() {
        None => "there is nothing in it",
        Some("table") => "this is the language of nft itself; give it -j",
        Some("-P" | "-N" | "-A") => "'iptables -S' does not tell the table; use iptables-save",
        Some("Chain") => "'iptables -L' leaves out much; use iptables-save",
        Some(_) => "the first is a line such as *mangle, the second begins with '{'",
    }))
}

/// What is said of rules that have nothing to do with a proxy.
fn others(ruleset: &Ruleset, relevant: &[&model::Base]) -> Option<String> {
    let reached = relevant::reached(ruleset, relevant.iter().map(|base| &base.chain));
    let mut tables = BTreeMap::<&str, usize>::new();
    let others = ruleset.chains.iter().filter(|(chain, _)| !reached.contains(chain));
    for rule in others.flat_map(|(_, rules)| rules).filter(|rule| !relevant::never(rule)) {
        *tables.entry(&ruleset.sources[rule.source].table).or_default() += 1;
    }
    let tables: Vec<_> = tables.iter().map(|(table, count)| format!("{table} {count}")).collect();
    (!tables.is_empty()).then(|| {
        format!(
            "Rules that do not lead to a proxy stay in force beside tproxy, and are not in here: {}.",
            tables.join(", ")
        )
    })
}

//! What `nft -j list ruleset` prints → [`Ruleset`].

mod matching;
mod rule;

use serde_json::Value;

use crate::nft;

use super::Error;
use super::model::{Base, Hook, Ruleset, Source};

/// Characters of a rule that are shown: what is meant can be found by its handle.
const SHOWN: usize = 160;

/// Reads it.
///
/// # Errors
/// [`Error::Json`], or [`Error::Neither`] for JSON of another kind.
pub(crate) fn parse(text: &str) -> Result<Ruleset, Error> {
    let json: Value = serde_json::from_str(text).map_err(Error::Json)?;
    if !json["nftables"].is_array() {
        return Err(Error::Neither("the JSON has no list \"nftables\""));
    }
    let listed = nft::Ruleset::parse(&json);
    let mut ruleset = Ruleset { bases: listed.bases.iter().filter_map(base).collect(), ..Ruleset::default() };
    ruleset.bases.sort_by_key(|base| base.priority);
    let mut chains: Vec<_> = listed.rules.iter().collect();
    chains.sort_by_key(|(chain, _)| (&chain.family, &chain.table, &chain.name));
    for (chain, rules) in chains {
        for rule in rules {
            let source = ruleset.sources.len();
            ruleset.sources.push(describe(chain, rule));
            let read = rule::parse(rule, source, chain, &listed.sets);
            ruleset.chains.entry(chain.clone()).or_default().extend(read);
        }
    }
    Ok(ruleset)
}

/// A base chain of a hook that is looked at.
fn base(base: &nft::Base) -> Option<Base> {
    let hook = match &*base.hook {
        "prerouting" => Hook::Prerouting,
        "output" => Hook::Output,
        _ => return None,
    };
    let v6 = match &*base.chain.family {
        "ip" => Some(false),
        "ip6" => Some(true),
        "inet" => None,
        _ => return None,
    };
    Some(Base { chain: base.chain.clone(), hook, priority: base.priority, drops: base.drops, v6 })
}

fn describe(chain: &nft::Chain, rule: &nft::Rule) -> Source {
    let nft::Chain { family, table, name } = chain;
    let whole = Value::from(rule.expressions.clone()).to_string();
    let mut text: String = whole.chars().take(SHOWN).collect();
    if text.len() < whole.len() {
        text.push('…');
    }
    Source {
        place: format!("{family} {table} {name} handle {}", rule.handle),
        text,
        table: format!("{family} {table}"),
    }
}

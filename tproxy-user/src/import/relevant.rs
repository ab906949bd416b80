//! Which chains lead traffic to a proxy. All others stay in force beside tproxy.

use std::collections::HashSet;

use crate::config::Mark;
use crate::nft::Chain;

use super::model::{Base, Hook, Rule, Ruleset, Verdict};

/// The mark of what goes to the proxy: that of a TPROXY rule, else one that is set where
/// packets arrive.
#[must_use]
pub(crate) fn steering(ruleset: &Ruleset) -> Option<Mark> {
    let of_rule = |rule: &Rule| rule.mark.map(super::model::SetMark::writes).filter(|mark| mark.value != 0);
    let arriving = ruleset.bases.iter().filter(|base| base.hook == Hook::Prerouting);
    let mut chains: Vec<_> = reached(ruleset, arriving.map(|base| &base.chain)).into_iter().collect();
    // By the order of the input, so that it does not depend on chance.
    chains.sort_by_key(|chain| ruleset.rules(chain).first().map(|rule| rule.source));
    let rules = || chains.iter().flat_map(|chain| ruleset.rules(chain));
    let captures = rules().any(|rule| matches!(rule.verdict, Verdict::Proxy(_)));
    let of_tproxy = rules().filter(|rule| matches!(rule.verdict, Verdict::Proxy(_))).find_map(of_rule);
    of_tproxy.or_else(|| rules().find_map(of_rule).filter(|_| captures))
}

/// The base chains from which a rule is reached that captures, or marks for it.
#[must_use]
pub(crate) fn bases(ruleset: &Ruleset, steering: Option<Mark>) -> Vec<&Base> {
    let marks = |rule: &Rule| {
        rule.mark.zip(steering).is_some_and(|(set, steering)| {
            let writes = set.writes();
            steering.mask & !writes.mask == 0 && steering.matches(writes.value)
        })
    };
    let concerns = |rule: &Rule| is_of_others(rule) && (rule.verdict.captures() || marks(rule));
    let leads = |base: &&Base| {
        reached(ruleset, [&base.chain]).into_iter().any(|chain| ruleset.rules(chain).iter().any(concerns))
    };
    ruleset.bases.iter().filter(leads).collect()
}

/// Whether it never applies to the first packet of a flow, such as what looks for its socket.
#[must_use]
pub(crate) fn never(rule: &Rule) -> bool {
    rule.matches.any.is_empty()
}

/// Whether it is about more than what goes to this host itself.
fn is_of_others(rule: &Rule) -> bool {
    rule.matches.any.iter().any(|any| !any.to_this_host)
}

/// Chains that packets can get to from others.
#[must_use]
pub(crate) fn reached<'a>(
    ruleset: &'a Ruleset,
    from: impl IntoIterator<Item = &'a Chain>,
) -> HashSet<&'a Chain> {
    let mut reached = HashSet::new();
    let mut open: Vec<_> = from.into_iter().collect();
    while let Some(chain) = open.pop() {
        if !reached.insert(chain) {
            continue;
        }
        open.extend(ruleset.rules(chain).iter().filter(|rule| never(rule) || is_of_others(rule)).filter_map(
            |rule| match &rule.verdict {
                Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
                _ => None,
            },
        ));
    }
    reached
}

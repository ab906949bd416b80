//! The rules that ask for names, as the relay reads them once it has found one.

use std::sync::Arc;

use tproxy_common::abi::Decision;
use tproxy_common::policy::Known;

use crate::config::rule::Rule as Configured;

use super::compile::{RuleSet, Selector, Unfit, compile};
use super::domains::Domains;
use super::facts::{Memory, Packet};

/// Them, by the same engine as the kernel's.
#[derive(Debug)]
pub struct NamedRules {
    domains: Arc<Domains>,
    image: Memory,
}

impl NamedRules {
    /// Those of a set that was made of rules; `None` where none asks for names.
    ///
    /// # Errors
    ///
    /// [`Unfit`].
    pub fn of(set: &RuleSet, rules: &[Configured]) -> Result<Option<Self>, Unfit> {
        let Some(domains) = Domains::of(rules) else { return Ok(None) };
        let asks = |rule: &&super::compile::Rule| {
            rule.conditions.iter().any(|condition| condition.selector == Selector::Domain)
        };
        let set = RuleSet { rules: set.rules.iter().filter(asks).cloned().collect(), otherwise: 0 };
        Ok(Some(Self { domains: Arc::clone(domains), image: Memory(compile(&set)?) }))
    }

    /// The names that they ask for.
    #[must_use]
    pub fn domains(&self) -> &Arc<Domains> {
        &self.domains
    }

    /// What they say of a flow that is for this name, as names are compared, where a rule of the number `before`, or
    /// with 0 none, decides otherwise. `None`: nothing, so that it does.
    #[must_use]
    pub fn decide(&self, name: &str, packet: Packet, before: u16) -> Option<Decision> {
        let domain = Known::Is(self.domains.set_of(name));
        let (word, _) = self.image.decide(&Packet { domain, ..packet });
        let decision = Decision::from_word(word).settled();
        let stands_before = before == 0 || decision.rule() < before;
        (decision.rule() != 0 && stands_before).then_some(decision)
    }
}

#[cfg(test)]
mod tests {
    use tproxy_common::abi::{TCP, UDP, Verdict};

    use super::*;
    use crate::config::Scope;
    use crate::config::file;
    use crate::config::upstream::Upstream;
    use crate::policy::names::Names;
    use crate::policy::rules::Written;
    use crate::policy::rules::rule_set;
    use crate::policy::targets::Targets;

    const CONFIG: &str = "[[rule]]\nto_port = 22\naction = 'drop'\n\
        [[rule]]\ndomain = 'a.example'\nprotocol = 'tcp'\naction = 'reject'\n\
        [[rule]]\nto_port = 80\naction = 'pass'\n\
        [[rule]]\ndomain = ['*.example', 'b.test']\naction = 'divert'\ntarget = '127.0.0.1:1'\n";

    #[test]
    fn the_first_that_stands_before_decides() {
        let rules = file::parse(CONFIG.as_bytes(), "t.toml".as_ref()).expect("rules").1.rules;
        let set = rule_set(
            Written { scope: &Scope::default(), upstream: &Upstream::Direct, rules: &rules },
            &Names::default(),
            &Targets::default(),
        )
        .expect("few");
        let behind: Vec<_> =
            set.rules.iter().map(|rule| Decision::from_word(rule.verdict).is_behind_names()).collect();
        assert_eq!(behind, [false, false, true, true]);
        assert!(Decision::from_word(set.otherwise).is_behind_names());
        let named = NamedRules::of(&set, &rules).expect("few").expect("some ask");
        let decide = |name: &str, protocol, before| {
            named.decide(name, Packet { protocol, ..Packet::EMPTY }, before).map(Decision::rule)
        };
        assert_eq!(decide("a.example", TCP, 0), Some(2));
        assert_eq!(decide("a.example", UDP, 0), Some(4));
        assert_eq!(decide("a.example", UDP, 3), None);
        assert_eq!(decide("a.example", TCP, 3), Some(2));
        assert_eq!(decide("b.test", TCP, 0), Some(4));
        assert_eq!(decide("example", TCP, 0), None);
        assert_eq!(NamedRules::of(&set, &rules[..1]).map(|rules| rules.is_none()), Ok(true));
        let asked = Decision::of(Verdict::Pass as u8, 3, 0).behind_names().asked();
        assert_eq!((asked.raw_verdict(), asked.fallback(), asked.rule()), (6, 1, 3));
        assert!(!asked.is_behind_names());
        assert_eq!(Decision::of_flow(6, 1, 3, 0), asked);
    }
}

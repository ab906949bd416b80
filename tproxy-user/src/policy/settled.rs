//! What the family and the protocol of a packet decide by themselves: see
//! [`settled`](tproxy_common::policy::settled).

use tproxy_common::abi::{Family, TCP, UDP};
use tproxy_common::policy::layout;

use super::compile::{Condition, RuleSet, Selector, word};

/// The words of an image's header, as [`layout::SETTLED`] says.
pub(super) fn settled(set: &RuleSet) -> [u32; 4] {
    [(Family::V4, TCP), (Family::V4, UDP), (Family::V6, TCP), (Family::V6, UDP)]
        .map(|(family, protocol)| of_kind(set, family, protocol))
}

/// The number of the rule that decides over a family and a protocol whatever else a packet is, that
/// of no rule being how many there are; [`layout::UNSETTLED`] where it depends on what else it is.
fn of_kind(set: &RuleSet, family: Family, protocol: u8) -> u32 {
    for (number, rule) in set.rules.iter().enumerate() {
        let meets: Vec<_> = rule.conditions.iter().map(|c| c.is_met(family, protocol)).collect();
        if meets.contains(&Some(false)) {
            continue;
        }
        return if meets.contains(&None) { layout::UNSETTLED } else { word(number) };
    }
    word(set.rules.len())
}

impl Condition {
    /// Whether packets of this family and protocol meet it; `None` where it depends on what else
    /// they are.
    fn is_met(&self, family: Family, protocol: u8) -> Option<bool> {
        let family_of_address = match self.selector {
            Selector::Protocol => return Some(self.values.contains(protocol.into())),
            Selector::Source4 | Selector::Destination4 => Family::V4,
            Selector::Source6 | Selector::Destination6 => Family::V6,
            _ => return None,
        };
        if family_of_address != family {
            return Some(true);
        }
        let bits = match family {
            Family::V4 => 32,
            Family::V6 => 128,
        };
        match self.values.as_slice() {
            [] => Some(false),
            [(0, last)] if *last == u128::MAX >> (128 - bits) => Some(true),
            _ => None,
        }
    }
}

//! Names of rules, as sets: what a name meets is found at once, however many are listed.
//!
//! A set is the conditions that a name meets. All sets that there can be follow from what is
//! listed: the name of an entry meets all that match it, and any other meets what the longest
//! suffix that is listed above it does. So a name has the number of its set by some
//! look-ups, and to the rules it is that number.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::config::rule::Rule;

use super::hostname::normal;
use super::ranges::Ranges;

/// A name, or all names below one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    /// In lower case, without a dot at its end.
    name: Box<str>,
    /// Whether names below it are meant, and not itself.
    below: bool,
}

impl Pattern {
    /// Reads `example.org`, or `*.example.org` for the names below it. Letters that are not
    /// ASCII are taken for what stands for them in the DNS (UTS #46).
    ///
    /// # Errors
    ///
    /// What is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected a name such as example.org, or *.example.org for all names below it";
        let (below, name) = text.strip_prefix("*.").map_or((false, text), |name| (true, name));
        if name.parse::<std::net::IpAddr>().is_ok() {
            return Err(format!("an address is no name; {EXPECTED}"));
        }
        let ascii = idna::domain_to_ascii(name).map_err(|_| EXPECTED)?;
        match normal(&ascii) {
            Some(name) => Ok(Self { name: name.into(), below }),
            None => Err(EXPECTED.to_owned()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.below { "*." } else { "" })?;
        f.write_str(&self.name)
    }
}

/// All names that rules list, and the sets that they make.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Domains {
    exact: HashMap<Box<str>, u32>,
    below: HashMap<Box<str>, u32>,
    /// The conditions of each set, in order; the first one is empty.
    sets: Vec<Box<[u16]>>,
}

impl Domains {
    /// The sets of conditions, each of which is met by any of its patterns.
    pub fn new<'a, P: IntoIterator<Item = &'a Pattern>>(conditions: impl IntoIterator<Item = P>) -> Self {
        let (mut exact, mut below) = (Listed::new(), Listed::new());
        for (condition, patterns) in (0..).zip(conditions) {
            for pattern in patterns {
                let listed = if pattern.below { &mut below } else { &mut exact };
                listed.entry(&pattern.name).or_default().push(condition);
            }
        }
        let mut numbers = HashMap::from([(Box::default(), 0)]);
        let mut number = |mut set: Vec<u16>| {
            set.sort_unstable();
            set.dedup();
            let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
            *numbers.entry(set.into_boxed_slice()).or_insert(next)
        };
        // An entry meets what is listed for itself, and for all that are above it.
        let mut all = |listed: &Listed<'_>| {
            let mut set = |name: &str, own: &[u16]| {
                let above = suffixes(name).filter_map(|above| below.get(above)).flatten();
                number(own.iter().chain(above).copied().collect())
            };
            listed.iter().map(|(name, own)| (Box::from(*name), set(name, own))).collect()
        };
        let (exact, below) = (all(&exact), all(&below));
        let mut sets = vec![Box::default(); numbers.len()];
        for (set, number) in numbers {
            sets[number as usize] = set;
        }
        Self { exact, below, sets }
    }

    /// The number of the set that a name has; 0: it meets nothing.
    #[must_use]
    pub fn set_of(&self, name: &str) -> u32 {
        let above = || suffixes(name).find_map(|above| self.below.get(above));
        self.exact.get(name).or_else(above).copied().unwrap_or(0)
    }

    /// The sets that meet a condition.
    #[must_use]
    pub fn meeting(&self, condition: u16) -> Ranges {
        let meets = |set: &[u16]| set.binary_search(&condition).is_ok();
        let numbers = (0..).zip(&self.sets).filter(|(_, set)| meets(set)).map(|(number, _)| (number, number));
        Ranges::new(numbers.collect())
    }

    /// Those that rules share.
    #[must_use]
    pub fn of(rules: &[Rule]) -> Option<&Arc<Self>> {
        rules
            .iter()
            .map(|rule| &rule.conditions.domains)
            .find(|asked| !asked.is_empty())
            .map(|asked| &asked.all)
    }

    /// Tells rules that ask for names which sets they mean.
    pub fn share(rules: &mut [Rule]) {
        let mut asking: Vec<&mut Rule> =
            rules.iter_mut().filter(|rule| !rule.conditions.domains.is_empty()).collect();
        if asking.is_empty() {
            return;
        }
        let domains = Arc::new(Self::new(asking.iter().map(|rule| rule.conditions.domains.patterns())));
        for (condition, rule) in (0..).zip(&mut asking) {
            rule.conditions.domains.sets = Arc::new(domains.meeting(condition));
            rule.conditions.domains.all = Arc::clone(&domains);
        }
    }
}

/// Conditions by what they list.
type Listed<'a> = HashMap<&'a str, Vec<u16>>;

/// What a name is below, the longest first.
fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(name.split_once('.'), |(_, above)| above.split_once('.')).map(|(_, above)| above)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).expect(text)
    }

    #[test]
    fn patterns_are_read() {
        for (text, expected) in [
            ("Example.ORG.", "example.org"),
            ("*.example.org", "*.example.org"),
            ("*.org", "*.org"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("*.BÜCHER.example", "*.xn--bcher-kva.example"),
            ("_dmarc.example.org", "_dmarc.example.org"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(pattern(text).to_string(), expected);
        }
        for text in ["", "*", "*.", ".", ".org", "a..b", "*.*.org", "a b", "a/b", "a:443", "www.*.org"] {
            assert!(Pattern::parse(text).expect_err(text).starts_with("expected a name such as"), "{text}");
        }
        for text in ["192.0.2.1", "2001:db8::1", "*.192.0.2.1"] {
            assert!(Pattern::parse(text).expect_err(text).starts_with("an address is no name"), "{text}");
        }
        assert!(Pattern::parse(&"a.".repeat(200)).is_err());
    }

    #[test]
    fn the_name_itself_is_not_below_it() {
        let domains = Domains::new([&[pattern("*.example.org")][..], &[pattern("example.org")]]);
        let meets = |name: &str| {
            let set = domains.set_of(name).into();
            [0, 1].map(|condition| domains.meeting(condition).contains(set))
        };
        assert_eq!(meets("example.org"), [false, true]);
        assert_eq!(meets("www.example.org"), [true, false]);
        assert_eq!(meets("a.b.example.org"), [true, false]);
        assert_eq!(meets("notexample.org"), [false, false]);
        assert_eq!(domains.set_of("org"), 0);
    }

    /// Of few labels, so that names and patterns often meet.
    fn name() -> impl Strategy<Value = String> {
        prop::collection::vec("[ab]", 1..5).prop_map(|labels| labels.join("."))
    }

    fn patterns() -> impl Strategy<Value = Vec<(bool, String)>> {
        prop::collection::vec((any::<bool>(), name()), 1..6)
    }

    proptest! {
        #[test]
        fn sets_are_what_a_naive_matcher_says(
            conditions in prop::collection::vec(patterns(), 0..6), names in prop::collection::vec(name(), 1..20),
        ) {
            let parsed: Vec<Vec<Pattern>> = conditions.iter().map(|patterns| {
                let text = |(below, name): &(bool, String)| format!("{}{name}", if *below { "*." } else { "" });
                patterns.iter().map(|one| pattern(&text(one))).collect()
            }).collect();
            let domains = Domains::new(&parsed);
            for name in names {
                let set = domains.set_of(&name).into();
                for (condition, patterns) in (0..).zip(&conditions) {
                    let met = patterns.iter().any(|(below, pattern)| {
                        if *below { name.ends_with(&format!(".{pattern}")) } else { name == *pattern }
                    });
                    prop_assert_eq!(domains.meeting(condition).contains(set), met, "{} {:?}", name, patterns);
                }
            }
        }

        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,80}") {
            let _: Option<String> = normal(&text);
            let _: Result<Pattern, String> = Pattern::parse(&text);
        }
    }
}

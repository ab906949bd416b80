//! From rules to the image that decides: see `tproxy_common::policy`.

use std::collections::HashMap;
use std::sync::Arc;

use tproxy_common::policy::{
    Dimension, LINE, Line, MAX_LEVELS, MAX_RULES, SUMMARY_WORDS, VECTOR_LINES, layout,
};

use super::ranges::Ranges;

/// One rule: it matches a packet that meets all its conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// At most one for a dimension.
    pub conditions: Vec<Condition>,
    /// The word that [`decide`](tproxy_common::policy::decide) answers with.
    pub verdict: u32,
}

/// What a rule wants a value to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which value. One of an address has a second condition for the other family,
    /// with an empty set where no packet of that family is to match.
    pub dimension: Dimension,
    /// Any of these; a set may be shared with other rules.
    pub values: Arc<Ranges>,
}

/// Rules in their order, and what they leave open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// The first that matches decides.
    pub rules: Vec<Rule>,
    /// The verdict over packets that no rule matches.
    pub otherwise: u32,
}

/// There are more rules than fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} rules; at most {MAX_RULES} are possible: join rules of one action by lists or files of prefixes"
)]
pub struct TooManyRules(pub usize);

/// Compiles rules.
///
/// Takes time for each range of each rule once (a million prefixes: below a second).
///
/// # Errors
///
/// [`TooManyRules`].
pub fn compile(set: &RuleSet) -> Result<Vec<Line>, TooManyRules> {
    if set.rules.len() > MAX_RULES {
        return Err(TooManyRules(set.rules.len()));
    }
    let descriptions = layout::description(Dimension::ALL.len()).0;
    let mut image = vec![[0; LINE]; descriptions];
    for dimension in Dimension::ALL {
        if set.rules.iter().any(|rule| condition(rule, dimension).is_some()) {
            image[0][layout::USED] |= 1 << dimension as u32;
            add_dimension(&mut image, set, dimension);
        }
    }
    let verdicts: Vec<u32> = set.rules.iter().map(|rule| rule.verdict).chain([set.otherwise]).collect();
    image[0][layout::RULES] = word(set.rules.len());
    image[0][layout::VERDICTS] = append(&mut image, &verdicts, 0);
    Ok(image)
}

fn condition(rule: &Rule, dimension: Dimension) -> Option<&Ranges> {
    let of_dimension = rule.conditions.iter().filter(|condition| condition.dimension == dimension);
    debug_assert!(of_dimension.count() <= 1, "two conditions for {dimension:?}");
    rule.conditions
        .iter()
        .find(|condition| condition.dimension == dimension)
        .map(|condition| &*condition.values)
}

fn add_dimension(image: &mut Vec<Line>, set: &RuleSet, dimension: Dimension) {
    let mut vectors = Vectors::default();
    // Where the rules change that a value satisfies: from which value on, and which one.
    let mut changes = Vec::new();
    let (mut absent, mut unknown) = (Vector::EMPTY, Vector::EMPTY);
    for (number, rule) in set.rules.iter().enumerate() {
        unknown.toggle(number);
        let Some(values) = condition(rule, dimension) else {
            absent.toggle(number);
            continue;
        };
        for (first, last) in values.as_slice() {
            changes.push((*first, number));
            changes.extend(last.checked_add(1).map(|after| (after, number)));
        }
    }
    changes.sort_unstable();
    let bits = 32 * dimension.width();
    debug_assert!(
        changes.last().is_none_or(|(from, _)| bits == 128 || *from <= 1 << bits),
        "{dimension:?} has {bits} bits"
    );
    let (mut ends, mut classes) = (Vec::new(), Vec::new());
    let mut satisfied = absent.clone();
    let mut class = vectors.class_of(&satisfied);
    for changes in changes.chunk_by(|a, b| a.0 == b.0) {
        for (_, rule) in changes {
            satisfied.toggle(*rule);
        }
        let next = vectors.class_of(&satisfied);
        let from = changes[0].0;
        if next != class && from > 0 {
            ends.push(from - 1);
            classes.push(class);
        }
        class = next;
    }
    classes.push(class);
    let (absent, unknown) = (vectors.class_of(&absent), vectors.class_of(&unknown));

    let (line, at) = layout::description(dimension as usize);
    let tree = tree(image, &ends, dimension.width());
    let classes = append(image, &classes, 0);
    let first_vector = word(image.len());
    for vector in &vectors.in_order {
        append(image, &vector.0, 0);
    }
    let described = &mut image[line][at..at + layout::DESCRIPTION];
    described[layout::LEVELS] = word(tree.len());
    described[layout::TREE..layout::TREE + tree.len()].copy_from_slice(&tree);
    described[layout::CLASSES] = classes;
    described[layout::VECTORS] = first_vector;
    described[layout::ABSENT] = absent;
    described[layout::UNKNOWN] = unknown;
}

/// Appends the levels of a tree over ends in order; the first line of each, the root first.
fn tree(image: &mut Vec<Line>, ends: &[u128], width: usize) -> Vec<u32> {
    let fan_out = LINE / width;
    let mut levels = Vec::new();
    let mut level = ends.to_vec();
    while !level.is_empty() {
        let words: Vec<u32> = level.iter().flat_map(|end| words(*end, width)).collect();
        levels.push(append(image, &words, u32::MAX));
        if level.len() <= fan_out {
            break;
        }
        // The last line holds whatever is above the others.
        level = level.chunks(fan_out).map(|line| line[line.len() - 1]).collect();
        level.pop();
    }
    assert!(levels.len() <= MAX_LEVELS, "{} ends make {} levels", ends.len(), levels.len());
    levels.reverse();
    levels
}

/// A number in words, the highest first.
fn words(number: u128, width: usize) -> impl Iterator<Item = u32> {
    (0..width).rev().map(move |at| {
        #[expect(clippy::cast_possible_truncation, reason = "word by word")]
        let word = (number >> (32 * at)) as u32;
        word
    })
}

/// Appends words in lines of their own, the last one filled up. Which line is the first.
fn append(image: &mut Vec<Line>, words: &[u32], filling: u32) -> u32 {
    let first = word(image.len());
    image.extend(words.chunks(LINE).map(|chunk| {
        let mut line = [filling; LINE];
        line[..chunk.len()].copy_from_slice(chunk);
        line
    }));
    first
}

/// An image of 2^32 words would be larger than any memory that the kernel gives to a map.
fn word(number: usize) -> u32 {
    u32::try_from(number).expect("fewer than 2^32 lines")
}

/// The rules that a value satisfies, with the summary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Vector([u32; VECTOR_LINES * LINE]);

impl Vector {
    const EMPTY: Self = Self([0; VECTOR_LINES * LINE]);

    fn toggle(&mut self, rule: usize) {
        let chunk = rule / 32;
        let word = &mut self.0[SUMMARY_WORDS + chunk];
        *word ^= 1 << (rule % 32);
        let summary = u32::from(*word != 0) << (chunk % 32);
        self.0[chunk / 32] = self.0[chunk / 32] & !(1 << (chunk % 32)) | summary;
    }
}

/// Vectors, each once, by their class.
#[derive(Debug, Default)]
struct Vectors {
    in_order: Vec<Vector>,
    classes: HashMap<Vector, u32>,
}

impl Vectors {
    fn class_of(&mut self, vector: &Vector) -> u32 {
        if let Some(class) = self.classes.get(vector) {
            return *class;
        }
        let class = word(self.in_order.len());
        self.in_order.push(vector.clone());
        self.classes.insert(vector.clone(), class);
        class
    }
}

//! From rules to the image that decides: see `tproxy_common::policy`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tproxy_common::policy::{
    Dimension, LINE, Line, MAX_LEVELS, MAX_RULES, SUMMARY_WORDS, VECTOR_LINES, layout,
};

use super::{ranges::Ranges, settled::settled};

/// One rule: it matches a packet that meets all its conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// At most one for a selector.
    pub conditions: Vec<Condition>,
    /// The word that [`decide`](tproxy_common::policy::decide) answers with.
    pub verdict: u32,
}

/// What a rule wants a value to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which value. One of an address has a second condition for the other family,
    /// with an empty set where no packet of that family is to match.
    pub selector: Selector,
    /// Any of these; a set may be shared with other rules.
    pub values: Arc<Ranges>,
}

/// Which value of a packet a condition is about: a [`Dimension`] as rules name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// Source address of an IPv4 packet.
    Source4,
    /// Source address of an IPv6 packet.
    Source6,
    /// Destination address of an IPv4 packet.
    Destination4,
    /// Destination address of an IPv6 packet.
    Destination6,
    /// Source port.
    SourcePort,
    /// Destination port.
    DestinationPort,
    /// Protocol number.
    Protocol,
    /// Index of the interface that it arrives on.
    Interface,
    /// Link-layer address that it comes from, as a number.
    Mac,
    /// Differentiated services codepoint.
    Dscp,
    /// The mark, without the bits that are not in the mask. Rules may have
    /// [two masks](Unfit::Masks).
    Mark {
        /// The bits that count.
        mask: u32,
    },
    /// User that owns the sending socket.
    Uid,
    /// Group of the process that made it.
    Gid,
    /// Number of the control group (cgroup v2) that the sending socket is in or below. Rules
    /// may have groups of [three depths](Unfit::Depths).
    Cgroup {
        /// How many directories below the root of its hierarchy it is.
        depth: u32,
    },
    /// Set of the name that it is for, by its number in
    /// [`Domains`](super::domains::Domains).
    Domain,
}

impl Selector {
    /// The dimensions that can stand for it.
    const fn dimensions(self) -> &'static [Dimension] {
        match self {
            Self::Source4 => &[Dimension::Source4],
            Self::Source6 => &[Dimension::Source6],
            Self::Destination4 => &[Dimension::Destination4],
            Self::Destination6 => &[Dimension::Destination6],
            Self::SourcePort => &[Dimension::SourcePort],
            Self::DestinationPort => &[Dimension::DestinationPort],
            Self::Protocol => &[Dimension::Protocol],
            Self::Interface => &[Dimension::Interface],
            Self::Mac => &[Dimension::Mac],
            Self::Dscp => &[Dimension::Dscp],
            Self::Mark { .. } => &MARKS,
            Self::Uid => &[Dimension::Uid],
            Self::Gid => &[Dimension::Gid],
            Self::Cgroup { .. } => &CGROUPS,
            Self::Domain => &[Dimension::Domain],
        }
    }

    /// The parameter of that dimension.
    const fn parameter(self) -> u32 {
        match self {
            Self::Mark { mask } => mask,
            Self::Cgroup { depth } => depth,
            _ => 0,
        }
    }
}

const MARKS: [Dimension; 2] = [Dimension::Mark0, Dimension::Mark1];
const CGROUPS: [Dimension; 3] = [Dimension::Cgroup0, Dimension::Cgroup1, Dimension::Cgroup2];

/// Rules in their order, and what they leave open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// The first that matches decides.
    pub rules: Vec<Rule>,
    /// The verdict over packets that no rule matches.
    pub otherwise: u32,
}

/// Rules that do not fit into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// There are so many of them.
    #[error(
        "{0} rules; at most {MAX_RULES} are possible: join rules of one action by lists or files of prefixes"
    )]
    Rules(usize),
    /// They compare marks by more masks than there are dimensions for.
    #[error(
        "rules compare marks by {0} different masks; at most {most} are possible: write marks with the same mask",
        most = MARKS.len()
    )]
    Masks(usize),
    /// Their sets of values overlap in so many ways, within one key.
    #[error("rules overlap in more than {MOST_CLASSES} ways within one key, such as `to`")]
    Overlaps,
    /// They ask for control groups at more depths than there are dimensions for.
    #[error(
        "rules ask for control groups at {0} different depths of the hierarchy; at most {most} are possible",
        most = CGROUPS.len()
    )]
    Depths(usize),
}

/// Compiles rules.
///
/// Takes time for each range of each rule once (a million prefixes: below a second).
///
/// # Errors
///
/// [`Unfit`].
pub fn compile(set: &RuleSet) -> Result<Vec<Line>, Unfit> {
    if set.rules.len() > MAX_RULES {
        return Err(Unfit::Rules(set.rules.len()));
    }
    let descriptions = layout::description(Dimension::ALL.len() - 1).0 + 1;
    let mut image = vec![[0; LINE]; descriptions];
    for (selector, dimension) in dimensions(set)? {
        image[0][layout::USED] |= 1 << dimension as u32;
        add_dimension(&mut image, set, selector, dimension)?;
    }
    let verdicts: Vec<u32> = set.rules.iter().map(|rule| rule.verdict).chain([set.otherwise]).collect();
    image[0][layout::RULES] = word(set.rules.len());
    image[0][layout::SETTLED..][..4].copy_from_slice(&settled(set));
    image[0][layout::VERDICTS] = append(&mut image, &verdicts, 0);
    Ok(image)
}

/// Classes of a dimension: leaves have half words for their numbers.
const MOST_CLASSES: usize = 1 << 16;

/// What rules ask for, each with a dimension of its own.
fn dimensions(set: &RuleSet) -> Result<Vec<(Selector, Dimension)>, Unfit> {
    let conditions = set.rules.iter().flat_map(|rule| &rule.conditions);
    let selectors: BTreeSet<Selector> = conditions.map(|condition| condition.selector).collect();
    let mut dimensions = Vec::new();
    // In their order those that share dimensions stand side by side.
    for selectors in Vec::from_iter(selectors).chunk_by(|a, b| a.dimensions() == b.dimensions()) {
        let shared = selectors[0].dimensions();
        if selectors.len() > shared.len() {
            return Err(match selectors[0] {
                Selector::Cgroup { .. } => Unfit::Depths(selectors.len()),
                _ => Unfit::Masks(selectors.len()),
            });
        }
        dimensions.extend(selectors.iter().copied().zip(shared.iter().copied()));
    }
    Ok(dimensions)
}

fn condition(rule: &Rule, selector: Selector) -> Option<&Arc<Ranges>> {
    let mut of_selector = rule.conditions.iter().filter(|condition| condition.selector == selector);
    let condition = of_selector.next();
    debug_assert!(of_selector.next().is_none(), "two conditions for {selector:?}");
    condition.map(|condition| &condition.values)
}

fn add_dimension(
    image: &mut Vec<Line>,
    set: &RuleSet,
    selector: Selector,
    dimension: Dimension,
) -> Result<(), Unfit> {
    let mut vectors = Vectors::default();
    let (mut absent, mut unknown) = (Vector::EMPTY, Vector::EMPTY);
    // Rules by the set that they ask for: one that they share counts once.
    let mut sets = Vec::<(&Arc<Ranges>, Vec<usize>)>::new();
    for (number, rule) in set.rules.iter().enumerate() {
        unknown.toggle(number);
        let Some(values) = condition(rule, selector) else {
            absent.toggle(number);
            continue;
        };
        match sets.iter_mut().find(|(known, _)| Arc::ptr_eq(known, values)) {
            Some((_, rules)) => rules.push(number),
            None => sets.push((values, vec![number])),
        }
    }
    // Where the sets change that a value is in: from which value on, and which one.
    let mut changes = Vec::new();
    for (number, (values, _)) in sets.iter().enumerate() {
        for (first, last) in values.as_slice() {
            changes.push((*first, number));
            changes.extend(last.checked_add(1).map(|after| (after, number)));
        }
    }
    changes.sort_unstable();
    let bits = 32 * dimension.width();
    debug_assert!(
        changes.last().is_none_or(|(from, _)| bits == 128 || *from <= 1 << bits),
        "{selector:?} has {bits} bits"
    );
    // The end and the class of each interval.
    let mut intervals = Vec::new();
    let mut satisfied = absent.clone();
    let mut class = vectors.class_of(&satisfied);
    for changes in changes.chunk_by(|a, b| a.0 == b.0) {
        for rule in changes.iter().flat_map(|(_, set)| &sets[*set].1) {
            satisfied.toggle(*rule);
        }
        let next = vectors.class_of(&satisfied);
        if vectors.in_order.len() > MOST_CLASSES {
            return Err(Unfit::Overlaps);
        }
        let from = changes[0].0;
        if next != class && from > 0 {
            intervals.push((from - 1, class));
        }
        class = next;
    }
    intervals.push((u128::MAX >> (128 - bits), class));
    let (absent, unknown) = (vectors.class_of(&absent), vectors.class_of(&unknown));
    if vectors.in_order.len() > MOST_CLASSES {
        return Err(Unfit::Overlaps);
    }

    let (line, at) = layout::description(dimension as usize);
    let (leaves, mut greatest) = if dimension.width() == 1 { short(&intervals) } else { long(&intervals) };
    greatest.pop();
    let tree = tree(image, &greatest, dimension.width());
    let first_leaf = word(image.len());
    image.extend(leaves);
    let first_vector = word(image.len());
    for vector in &vectors.in_order {
        append(image, &vector.0, 0);
    }
    let described = &mut image[line][at..at + layout::DESCRIPTION];
    described[layout::LEVELS] = word(tree.len());
    described[layout::TREE..layout::TREE + tree.len()].copy_from_slice(&tree);
    described[layout::LEAVES] = first_leaf;
    described[layout::VECTORS] = first_vector;
    described[layout::ABSENT] = absent;
    described[layout::UNKNOWN] = unknown;
    described[layout::PARAMETER] = selector.parameter();
    Ok(())
}

/// Leaves of intervals (end and class, in order) of values of one word; the last end of each.
#[expect(clippy::cast_possible_truncation, reason = "ends of 32 bits, and fewer than 2^16 classes")]
fn short(intervals: &[(u128, u32)]) -> (Vec<Line>, Vec<u128>) {
    let (mut leaves, mut greatest) = (Vec::new(), Vec::new());
    let mut rest = intervals;
    while let Some((base, _)) = rest.first() {
        let fits = |(end, _): &&(u128, u32)| end - base <= u128::from(u16::MAX);
        let (leaf, others) = rest.split_at(rest.iter().take(layout::SHORT_LEAF).take_while(fits).count());
        let mut line = [0; LINE];
        line[0] = *base as u32;
        for slot in 0..layout::SHORT_LEAF {
            let (offset, class) =
                leaf.get(slot).map_or((u16::MAX, 0), |(end, class)| ((end - base) as u16, *class));
            put_half_word(&mut line, 2 + slot, offset.into());
            put_half_word(&mut line, layout::SHORT_LEAF_CLASSES + slot, class);
        }
        leaves.push(line);
        greatest.push(leaf[leaf.len() - 1].0);
        rest = others;
    }
    (leaves, greatest)
}

/// The same of longer values.
fn long(intervals: &[(u128, u32)]) -> (Vec<Line>, Vec<u128>) {
    let leaf = |leaf: &[(u128, u32)]| {
        let mut line = [0; LINE];
        line[..layout::LONG_LEAF_CLASSES / 2].fill(u32::MAX);
        for (slot, (end, class)) in leaf.iter().enumerate() {
            for (at, word) in words(*end, 4).enumerate() {
                line[4 * slot + at] = word;
            }
            put_half_word(&mut line, layout::LONG_LEAF_CLASSES + slot, *class);
        }
        line
    };
    let leaves = intervals.chunks(layout::LONG_LEAF);
    leaves.map(|intervals| (leaf(intervals), intervals[intervals.len() - 1].0)).unzip()
}

/// Sets a half word that is zero; the low half of a word comes first.
fn put_half_word(line: &mut Line, at: usize, value: u32) {
    line[at / 2] |= value << (at % 2 * 16);
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
pub(super) fn word(number: usize) -> u32 {
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

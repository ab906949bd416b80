//! What the words on the command line of `cargo xtask test` stand for.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use super::Part;
use crate::vm::Kernel;

/// A word on the command line.
#[derive(Clone, Copy, Debug)]
pub(super) enum Choice {
    Part(Part),
    Kernel(Kernel),
}

impl ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [Choice; 10] = [
            Choice::Part(Part::Unit),
            Choice::Part(Part::Golden),
            Choice::Part(Part::Netns),
            Choice::Part(Part::Bench),
            Choice::Part(Part::Fuzz),
            Choice::Part(Part::Vm),
            Choice::Kernel(Kernel::V5_10),
            Choice::Kernel(Kernel::V6_1),
            Choice::Kernel(Kernel::V6_12),
            Choice::Kernel(Kernel::Newest),
        ];
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Part(part) => part.to_possible_value(),
            Self::Kernel(kernel) => kernel.to_possible_value(),
        }
    }
}

/// Parts, and the kernels of part `vm` where not all of them are meant.
pub(super) fn chosen(choices: &[Choice]) -> (Vec<Part>, Vec<Kernel>) {
    let (mut parts, mut kernels) = (Vec::new(), Vec::new());
    for choice in choices {
        let part = match choice {
            Choice::Part(part) => *part,
            Choice::Kernel(kernel) => {
                kernels.push(*kernel);
                Part::Vm
            }
        };
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    if parts.is_empty() {
        parts = Part::value_variants().to_vec();
    }
    (parts, kernels)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_kernel_stands_for_part_vm() {
        let all = Part::value_variants().to_vec();
        assert_eq!(chosen(&[]), (all, vec![]));
        assert_eq!(chosen(&[Choice::Part(Part::Vm)]), (vec![Part::Vm], vec![]));
        let words = [Choice::Part(Part::Vm), Choice::Kernel(Kernel::V6_1)];
        assert_eq!(chosen(&words), (vec![Part::Vm], vec![Kernel::V6_1]));
        assert_eq!(chosen(&words[1..]), (vec![Part::Vm], vec![Kernel::V6_1]));
    }

    #[test]
    fn every_part_and_kernel_can_be_chosen() {
        let named: Vec<_> = Choice::value_variants().iter().map(|choice| chosen(&[*choice])).collect();
        let parts: BTreeSet<_> = named.iter().flat_map(|(parts, _)| parts).map(|part| part.name()).collect();
        assert_eq!(parts.len(), Part::value_variants().len());
        let kernels: Vec<_> = named.iter().flat_map(|(_, kernels)| kernels.clone()).collect();
        assert_eq!(kernels, Kernel::ALL);
    }
}

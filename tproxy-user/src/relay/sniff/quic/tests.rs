//! The example of RFC 9001, and hellos that are spread over datagrams.

use proptest::prelude::*;

use super::sent::{V1, V2, crypto, datagram};
use super::*;
use crate::relay::sniff::check;

/// The frame that carries the `ClientHello` of the example (RFC 9001, appendix A.2).
const EXAMPLE: &str = "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e86804fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578616d706c652e636f6dff01000100000a00080006001d0017001800100007000504616c706e000500050100000000003300260024001d00209370b2c9caa47fbabaf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b0003020304000d0010000e0403050306030203080408050806002d00020101001c00024001003900320408ffffffffffffffff05048000ffff07048000ffff0801100104800075300901100f088394c8f03e51570806048000ffff";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<_> = hex.chars().map(|digit| digit.to_digit(16).expect("a digit")).collect();
    digits.chunks(2).map(|pair| u8::try_from(pair[0] << 4 | pair[1]).expect("a byte")).collect()
}

/// The `ClientHello` of the example.
fn hello() -> Vec<u8> {
    bytes(EXAMPLE).split_off(4)
}

fn example() -> Sniffed {
    Sniffed::Name("example.com".to_owned())
}

#[test]
fn the_example_is_sealed_and_opened() {
    let sealed = datagram(V1, 2, &bytes(EXAMPLE));
    let expected = "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11d242b123dc9bd8bab936b47d92ec356c0bab7df5976d27cd449f63300099f399";
    assert_eq!(sealed[..64], bytes(expected)[..]);
    assert_eq!(sealed.len(), 1200);
    assert_eq!(Initials::default().add(&sealed), example());
}

#[test]
fn both_versions_and_other_frames() {
    for version in [V1, V2] {
        let frames =
            [&[1, 0, 2, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0][..], &crypto(0, &hello())].concat();
        assert_eq!(Initials::default().add(&datagram(version, 0, &frames)), example(), "{version:?}");
    }
}

#[test]
fn hellos_may_be_spread_and_come_in_any_order() {
    let hello = hello();
    let parts = [(0, 50), (50, 100), (90, hello.len())];
    let datagrams: Vec<_> = (0..)
        .zip(parts)
        .map(|(number, (from, to))| datagram(V1, number, &crypto(from, &hello[from..to])))
        .collect();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut initials = Initials::default();
        let told: Vec<_> = order.iter().map(|at| initials.add(&datagrams[*at])).collect();
        assert_eq!(told, [Sniffed::More, Sniffed::More, example()], "{order:?}");
    }
    // One datagram may have several packets.
    let early = {
        let mut packet = bytes("d300000001088394c8f03e5157080004");
        packet.extend([9; 4]);
        packet
    };
    let joined = [&datagrams[0][..], &early, &datagrams[1], &datagrams[2]].concat();
    assert_eq!(Initials::default().add(&joined), example());
    let mut initials = Initials::default();
    assert_eq!(initials.add(&datagrams[0]), Sniffed::More);
    assert_eq!(initials.add(&early), Sniffed::More);
    assert_eq!(initials.add(&[&datagrams[1][..], &datagrams[2]].concat()), example());
}

#[test]
fn what_is_no_hello_has_no_name() {
    let sealed = datagram(V1, 0, &bytes(EXAMPLE));
    let nothing = |datagram: &[u8]| assert_eq!(Initials::default().add(datagram), Sniffed::Nothing);
    nothing(&[]);
    nothing(b"who am I?");
    nothing(&sealed[..1199]);
    nothing(&[&sealed[..], &[0; LONGEST]].concat());
    // A bit of it that is not as it was sent, another version, no Initial, a frame that is not allowed.
    for at in [1, 20, 700, 1199] {
        let mut altered = sealed.clone();
        altered[at] ^= 1;
        nothing(&altered);
    }
    nothing(&datagram(V1, 0, &[8, 0, 0]));
    nothing(&datagram(V1, 0, &[6, 0x7f, 0xff, 2, 1, 1]));
}

/// The datagrams of the end-to-end scenarios, a line each: the example, and its hello in two
/// datagrams of version 2, the second part first.
#[test]
fn the_datagrams_of_the_scenarios_are_such() {
    let hello = hello();
    let (first, second) = (crypto(100, &hello[100..]), crypto(0, &hello[..100]));
    let expected = [datagram(V1, 2, &bytes(EXAMPLE)), datagram(V2, 0, &first), datagram(V2, 1, &second)];
    let lines = include_str!("../../../../../xtask/tests/netns/domains/initials.txt").lines();
    assert_eq!(lines.map(bytes).collect::<Vec<_>>(), expected);
}

proptest! {
    #[test]
    fn what_holds_for_all_holds(
        noise in prop::collection::vec(any::<u8>(), 0..200), at in 0_usize..1200, value: u8,
        frames in prop::collection::vec(prop_oneof![0_u8..8, any::<u8>()], 0..100),
    ) {
        check::datagrams(&noise);
        check::datagrams(&[&V1[..], &noise].concat());
        check::datagrams(&frames);
        let mut altered = datagram(V2, 0, &bytes(EXAMPLE));
        altered[at] = value;
        check::datagrams(&altered);
    }

    #[test]
    fn wherever_it_is_cut(first in 0_usize..240, second in 0_usize..240) {
        let hello = hello();
        let (first, second) = (first.min(second), first.max(second));
        let parts = [(0, first), (first, second), (second, hello.len())].map(|(from, to)| crypto(from, &hello[from..to]));
        let mut initials = Initials::default();
        let told = parts.map(|part| initials.add(&datagram(V1, 0, &part)));
        prop_assert_eq!(told.last(), Some(&example()));
        prop_assert!(told.iter().all(|told| *told == Sniffed::More || *told == example()));
    }
}

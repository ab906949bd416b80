//! Random rules: the kernel decides as userspace does, and both as the rules read.

use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::TestRunner;
use tproxy_common::abi::{TCP, UDP, Verdict, program};
use tproxy_common::classify::is_special;
use tproxy_common::policy::{Known, MAX_RULES};
use tproxy_user::policy::compile::compile;
use tproxy_user::policy::facts::{Memory, Packet};

use crate::kernel::{Kernel, PASS, STEERED, usual};
use crate::packets as p;
use crate::predict::parse;
use model::{naive, packet, rule_set};

#[path = "../../src/policy/model.rs"]
mod model;

tests![kernel_and_userspace_and_the_naive_reading_agree];

/// Rule sets, and packets for each.
const SETS: usize = 250;
const PACKETS: usize = 40;

/// The interface of a test run: `lo` of a new network namespace.
const IFINDEX: u32 = 1;

fn kernel_and_userspace_and_the_naive_reading_agree() {
    let mut kernel = Kernel::new(&usual());
    let mut runner = TestRunner::default();
    let (mut compared, mut proxied) = (0, 0);
    for number in 0..SETS {
        // Few rules that match much, or many that match little.
        let sets =
            if number % 10 == 0 { rule_set(MAX_RULES, 4..=7).boxed() } else { rule_set(12, 0..=4).boxed() };
        let set = new(&mut runner, &sets);
        let image = Memory(compile(&set).expect("as many rules as there may be"));
        kernel.set_rules(&set);
        for _ in 0..PACKETS {
            let seen = new(
                &mut runner,
                &packet().prop_map(as_frame).prop_filter("special", |seen| {
                    !is_special(&seen.source, seen.family) && !is_special(&seen.destination, seen.family)
                }),
            );
            let frame = p::opening(&seen);
            let outcome = kernel.run(program::CAPTURE, &frame);
            let expected = image.decide(&seen);
            assert_eq!(expected, naive(&set, &seen), "userspace and the naive reading: {seen:?}\n{set:?}");
            let captured = expected.0 == Verdict::Proxy as u32;
            let (action, counter) =
                if captured { (STEERED, "assign_eopnotsupp") } else { (PASS, "pass_policy") };
            assert_eq!(
                (outcome.action, outcome.only_counter()),
                (action, counter),
                "the kernel: {seen:?}\n{set:?}"
            );
            kernel.forget(&parse(&frame).expect("a packet"));
            compared += 1;
            proxied += usize::from(captured);
        }
    }
    // Of both kinds many.
    assert!(proxied > compared / 5 && proxied < compared * 4 / 5, "{proxied} of {compared} are proxied");
}

/// A packet that opens a flow on the interface of a test run.
fn as_frame(mut seen: Packet) -> Packet {
    seen.protocol = if seen.protocol.is_multiple_of(2) { TCP } else { UDP };
    seen.interface = Some(IFINDEX);
    if !matches!(seen.ports, Known::Is(_)) {
        seen.ports = Known::Is((40_000, 443));
    }
    seen
}

fn new<S: Strategy>(runner: &mut TestRunner, strategy: &S) -> S::Value {
    strategy.new_tree(runner).expect("a value").current()
}

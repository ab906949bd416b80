//! Rules take the place of others while packets are decided over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use aya::programs::{TestRun as _, TestRunOptions};
use tproxy_common::abi::{Verdict, program};
use tproxy_common::policy::Known;
use tproxy_user::policy::compile::{RuleSet, Selector, compile};
use tproxy_user::policy::facts::Packet;

use crate::kernel::{Kernel, usual};
use crate::packets as p;
use crate::rules::{as_frame, only};

tests![a_decision_is_of_one_image,];

/// A program decides over packets without a pause while the rules are exchanged. Both
/// let it be proxied, one by its source and one by its destination; to what is of each a part,
/// no rule applies, and it is dropped.
fn a_decision_is_of_one_image() {
    const EXCHANGES: usize = 100;
    let mut kernel = Kernel::new(&usual());
    let alone = |addr| (u32::from_be_bytes(addr).into(), u32::from_be_bytes(addr).into());
    let images =
        [only(Selector::Source4, alone(p::CLIENT_V4)), only(Selector::Destination4, alone(p::SERVER_V4))]
            .map(|set| compile(&RuleSet { otherwise: Verdict::Drop as u32, ..set }).expect("one rule"));
    kernel.set_image(&images[0]);
    let program = kernel.again(program::CAPTURE);
    let packet = p::opening(&as_frame(Packet {
        source: p::mapped(p::CLIENT_V4),
        destination: p::mapped(p::SERVER_V4),
        ports: Known::Is((40_000, 443)),
        ..Packet::EMPTY
    }));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let options =
                    TestRunOptions { data_in: Some(&packet), repeat: 1000, ..TestRunOptions::default() };
                program.test_run(options).expect("a run");
            }
        });
        for exchange in 1..=EXCHANGES {
            kernel.set_image(&images[exchange % 2]);
        }
        over.store(true, Ordering::Relaxed);
    });
    let counted = kernel.counted();
    let decided: Vec<_> = counted.iter().filter(|(name, _)| *name != "flows_created").collect();
    assert!(matches!(decided[..], [("assign_eopnotsupp", 1000..)]), "{counted:?}");
}

//! The programs against userspace's parser and classification: for every packet
//! of the corpus both must come to the same action, mark, counters and flow.

use nix::errno::Errno;
use tproxy_common::abi::{Settings, program};
use tproxy_user::config::Scope;

use crate::corpus;
use crate::kernel::{Kernel, usual};
use crate::packets as p;
use crate::predict::{Model, Seen, SeenFlow, parse};

tests![everything_captured, little_captured];

const PROGRAMS: [&str; 5] =
    [program::CAPTURE, program::UPLINK, program::REPLY, program::OWN, program::LOOPBACK];

fn everything_captured() {
    compare(&Model::new(&Settings { own_traffic: 1, ..usual() }, &Scope::default()));
}

fn little_captured() {
    let settings = Settings { own_traffic: 1, mark_value: 0x10, mark_mask: 0xf0, ..usual() };
    let ports = vec![(p::SERVER_PORT, p::SERVER_PORT)];
    compare(&Model::new(&settings, &Scope { tcp: false, v4: false, ports, ..Scope::default() }));
}

/// Runs the whole corpus, and names each packet that is seen differently.
fn compare(model: &Model) {
    let mut kernel = Kernel::new(&model.settings);
    kernel.set_rules(&model.rules);
    let corpus = corpus::all();
    let (mut ran, mut wrong) = (0, Vec::new());
    for name in PROGRAMS {
        for case in &corpus {
            let outcome = match kernel.try_run(name, &case.frame, case.context) {
                Ok(outcome) => outcome,
                // Some kernels refuse it in a test run.
                Err(Errno::EINVAL) if !has_ip_header(&case.frame) => continue,
                Err(error) => panic!("{name}, {}: {error}", case.name),
            };
            ran += 1;
            let expected = model.predict(name, case);
            // Were there another flow, the counters would tell of it.
            let entry = expected.flow.as_ref().and_then(|flow| Some((flow.key, kernel.flow(&flow.key)?)));
            let seen = Seen {
                action: outcome.action,
                mark: outcome.mark,
                counters: outcome.counters.iter().map(|(counter, _)| *counter).collect(),
                flow: entry.map(|(key, flow)| SeenFlow {
                    key,
                    verdict: flow.verdict,
                    origin: flow.origin,
                    packets_up: flow.packets_up,
                    bytes_up: flow.bytes_up,
                    seen_up: flow.seen_up,
                }),
                added: outcome.packet.strip_suffix(&case.frame[..]).map(<[u8]>::to_vec),
            };
            let once = outcome.counters.iter().all(|(_, by)| *by == 1);
            if seen != expected || !once {
                wrong.push(format!("{name}, {}:\n  kernel    {seen:?}\n  userspace {expected:?}", case.name));
            }
            if let Ok(packet) = parse(&case.frame) {
                kernel.forget(&packet);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {ran} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

fn has_ip_header(frame: &[u8]) -> bool {
    frame.len() >= p::ETHERNET + if frame[12] == 0x08 { 20 } else { 40 }
}

//! Fragments, in any order.

use tproxy_user::config::Scope;

use crate::kernel::{Kernel, PASS, STEERED, capture, usual};
use crate::packets::{self as p, fragment_v4, fragment_v6};
use tproxy_common::abi::{Settings, program};

tests![
    fragments_are_marked_alike_in_any_order,
    fragments_of_what_is_not_captured_pass,
    an_atomic_fragment_is_a_whole_datagram,
    a_fragment_of_a_fragment_is_malformed,
    datagrams_with_one_identification_are_told_apart,
    before_sk_lookup_fragments_are_forwarded,
];

fn fragments_are_marked_alike_in_any_order() {
    for whole in [p::udp_v4(3000), p::udp_v6(3000)] {
        let fragments =
            if whole[12] == 0x08 { fragment_v4(&whole, 1480, 77) } else { fragment_v6(&whole, 1432, 77) };
        assert_eq!(fragments.len(), 3);
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let mut kernel = Kernel::new(&usual());
            let mut bytes = 0;
            for i in order {
                let outcome = kernel.run(program::CAPTURE, &fragments[i]);
                assert_eq!((outcome.action, outcome.mark), (STEERED, 1), "fragment {i} of {order:?}");
                bytes += fragments[i].len() as u64 - 14;
            }
            let (key, flow) = kernel.only_flow();
            assert_eq!(key.destination_port, p::SERVER_PORT);
            assert_eq!((flow.packets_up, flow.bytes_up), (3, bytes), "{order:?}");
        }
    }
}

fn fragments_of_what_is_not_captured_pass() {
    let mut kernel = Kernel::new(&usual());
    kernel.select(&Scope { udp: false, ..Scope::default() });
    for fragment in fragment_v4(&p::udp_v4(3000), 1480, 5) {
        let outcome = kernel.run(program::CAPTURE, &fragment);
        assert_eq!((outcome.action, outcome.mark), (PASS, 0));
    }
}

fn before_sk_lookup_fragments_are_forwarded() {
    let mut kernel = Kernel::new(&Settings { sk_lookup: 0, ..usual() });
    for fragment in fragment_v6(&p::udp_v6(3000), 1432, 6) {
        kernel.run(program::CAPTURE, &fragment).expect(PASS, "pass_policy");
    }
}

fn an_atomic_fragment_is_a_whole_datagram() {
    let atomic = fragment_v6(&p::udp_v6(32), 2000, 7).remove(0);
    capture(&atomic).expect(STEERED, "assign_eopnotsupp");
}

fn a_fragment_of_a_fragment_is_malformed() {
    let first = fragment_v6(&p::udp_v6(3000), 1432, 7).remove(0);
    let nested = fragment_v6(&first, 704, 8).remove(0);
    capture(&nested).expect(PASS, "malformed");
}

fn datagrams_with_one_identification_are_told_apart() {
    const OTHER: [u8; 4] = [203, 0, 113, 8];
    let mut kernel = Kernel::new(&usual());
    kernel.add_local(OTHER);
    let to_server = fragment_v4(&p::udp_v4(3000), 1480, 5);
    let to_other = to_server.iter().map(|fragment| p::with_destination(fragment.clone(), OTHER));
    for (fragment, local) in to_server.iter().zip(to_other) {
        assert_eq!(kernel.run(program::CAPTURE, fragment).action, STEERED);
        kernel.run(program::CAPTURE, &local).expect(PASS, "pass_local");
    }
    assert_eq!(kernel.only_flow().1.packets_up, 3);
}

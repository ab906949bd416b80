//! Where the listeners are, and what is done while there are none.

use std::thread::sleep;
use std::time::Duration;

use crate::kernel::{DROP, Kernel, PASS, STEERED, usual};
use crate::packets::{self as p, fragment_v4};
use tproxy_common::abi::{ListenerKind, Settings, program};

tests![
    listeners_are_found_by_port_too,
    datagrams_with_df_have_a_listener_of_their_own,
    without_a_listener_fail_decides,
    a_port_used_again_while_no_proxy_listens_stays_passed,
    without_a_proxy_late_packets_go_their_way,
    a_proxy_that_has_gone_is_noticed_within_a_moment,
    fragments_too_ask_whether_a_proxy_listens,
];

fn listeners_are_found_by_port_too() {
    // What Linux 5.7 does; the listeners of this kernel answer as well.
    let datagrams = [false, true].map(|dont_fragment| p::with_dont_fragment(p::udp_v4(3), dont_fragment));
    for packet in [p::syn_v4(), p::syn_v6(), p::udp_v6(3)].into_iter().chain(datagrams) {
        let mut kernel = Kernel::by_tuple();
        kernel.run(program::CAPTURE, &packet).expect(STEERED, "assign_eopnotsupp");
    }
}

fn datagrams_with_df_have_a_listener_of_their_own() {
    for program in [program::CAPTURE, program::LOOPBACK] {
        for (gone, with_df) in [(ListenerKind::Udp4, false), (ListenerKind::Udp4Df, true)] {
            for dont_fragment in [false, true] {
                let packet = p::with_dont_fragment(p::udp_v4(3), dont_fragment);
                let mut kernel = Kernel::new(&usual());
                kernel.remove_listener(gone);
                let (action, counter) = if dont_fragment == with_df {
                    (PASS, "fail_open")
                } else {
                    (STEERED, "assign_eopnotsupp")
                };
                kernel.run(program, &packet).expect(action, counter);
            }
        }
        // Neither matters for anything else.
        for packet in [p::udp_v6(3), p::with_dont_fragment(p::syn_v4(), true)] {
            let mut kernel = Kernel::new(&usual());
            kernel.remove_listener(ListenerKind::Udp4);
            kernel.remove_listener(ListenerKind::Udp4Df);
            kernel.run(program, &packet).expect(STEERED, "assign_eopnotsupp");
        }
    }
}

fn without_a_listener_fail_decides() {
    for (fail_open, action, counter) in [(1, PASS, "fail_open"), (0, DROP, "fail_closed")] {
        for packet in [p::syn_v4(), p::syn_v6(), p::udp_v4(3), p::udp_v6(3)] {
            let mut kernel = Kernel::without_listeners(&Settings { fail_open, ..usual() });
            kernel.run(program::CAPTURE, &packet).expect(action, counter);
        }
    }
}

fn a_port_used_again_while_no_proxy_listens_stays_passed() {
    let mut kernel = Kernel::new(&usual());
    kernel.run(program::CAPTURE, &p::syn_v4());
    kernel.run(program::CAPTURE, &p::rst_v4());
    kernel.remove_listeners();
    kernel.run(program::CAPTURE, &p::syn_v4()).expect(PASS, "fail_open");
    // Were it still taken for a proxied one, the client would get a reset.
    kernel.run(program::CAPTURE, &p::ack_v4()).expect(PASS, "pass_policy");
    assert_eq!(kernel.only_flow().1.packets_up, 2, "both have passed");
}

fn without_a_proxy_late_packets_go_their_way() {
    for early_demux in [0, 1] {
        let mut kernel = Kernel::new(&Settings { early_demux, ..usual() });
        kernel.run(program::CAPTURE, &p::syn_v4());
        kernel.remove_listeners();
        kernel.run(program::CAPTURE, &p::ack_v4()).expect(PASS, "fail_open");
    }
}

fn a_proxy_that_has_gone_is_noticed_within_a_moment() {
    let mut kernel = Kernel::new(&Settings { early_demux: 1, ..usual() });
    kernel.run(program::CAPTURE, &p::syn_v4());
    kernel.run(program::CAPTURE, &p::ack_v4()).expect(STEERED, "steered_established");
    kernel.remove_listeners();
    sleep(Duration::from_millis(50));
    kernel.run(program::CAPTURE, &p::ack_v4()).expect(PASS, "fail_open");
}

fn fragments_too_ask_whether_a_proxy_listens() {
    for (fail_open, action, counter) in [(1, PASS, "fail_open"), (0, DROP, "fail_closed")] {
        let mut kernel = Kernel::without_listeners(&Settings { fail_open, ..usual() });
        for fragment in fragment_v4(&p::udp_v4(3000), 1480, 6) {
            kernel.run(program::CAPTURE, &fragment).expect(action, counter);
        }
    }
}

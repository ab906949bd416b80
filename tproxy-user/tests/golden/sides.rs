//! The other programs: upstream side, replies, the host's own traffic.

use crate::kernel::{Kernel, PASS, STEERED, usual};
use crate::packets as p;
use tproxy_common::abi::{Settings, program};

tests![
    upstream_side_takes_nothing_without_a_socket,
    replies_are_counted,
    own_packets_are_turned_back_and_those_of_the_proxy_are_not,
    plain_loopback_traffic_is_left_alone,
];

fn upstream_side_takes_nothing_without_a_socket() {
    for packet in [p::syn_v4(), p::ack_v4(), p::udp_v6(9)] {
        Kernel::new(&usual()).run(program::UPLINK, &packet).expect(PASS, "pass_no_socket");
    }
}

fn replies_are_counted() {
    let mut kernel = Kernel::new(&usual());
    let request = p::udp_v4(20);
    kernel.run(program::CAPTURE, &request);
    kernel.run(program::REPLY, &p::reply_of(&request));
    let (_, flow) = kernel.only_flow();
    assert_eq!((flow.packets_down, flow.bytes_down), (1, request.len() as u64 - 14));
}

fn own_packets_are_turned_back_and_those_of_the_proxy_are_not() {
    let settings = Settings { own_traffic: 1, ..usual() };
    let mut kernel = Kernel::new(&settings);
    kernel.run_marked(program::OWN, &p::syn_v4(), 2).expect(PASS, "pass_own_mark");
    let outcome = kernel.run(program::OWN, &p::syn_v4());
    assert_eq!(outcome.counters, [("own_redirected", 1), ("flows_created", 1)]);
    let outcome = kernel.run(program::LOOPBACK, &p::syn_v4());
    assert_eq!((outcome.action, outcome.mark), (STEERED, 3));
}

fn plain_loopback_traffic_is_left_alone() {
    let mut kernel = Kernel::new(&Settings { own_traffic: 1, ..usual() });
    kernel.add_local(p::SERVER_V4);
    kernel.run(program::LOOPBACK, &p::syn_v4()).expect(PASS, "pass_local");
    kernel.run(program::LOOPBACK, &p::udp_to_v4([127, 0, 0, 53])).expect(PASS, "pass_special");
}

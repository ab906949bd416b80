//! ICMP errors about packets that the proxy sent with a client's address. They
//! go to that address, so routing would forward them; marked, they are delivered
//! to this host, whose stack finds the socket by the packet inside. A smaller
//! path MTU and an unreachable destination are learnt in no other way.

use tproxy_common::abi::UDP;
use tproxy_common::counter::Counter;
use tproxy_common::wire::Packet;

use crate::account::{FlowRef, down_key};
use crate::nat;
use crate::policy;
use crate::skb::Skb;
use crate::sock;
use crate::steer::{Mark, pass, to_stack};

/// Decides over an error, given an answer to the packet that it is about. The
/// stack checks sequence numbers and sizes by itself.
#[inline(never)]
pub(crate) fn ingress(skb: &Skb, answer: &Packet) -> i32 {
    // What is for this host arrives without help, if NAT does not send it on.
    let ours = !policy::is_local(&answer.destination) && is_answer(skb, answer);
    if ours || nat::is_answer(skb, answer) {
        return to_stack(skb, Mark::Tproxy, Counter::SteeredIcmp);
    }
    pass(Counter::PassProtocol)
}

/// Whether the answer would go to a socket of the proxy.
#[inline(always)]
fn is_answer(skb: &Skb, answer: &Packet) -> bool {
    if answer.protocol != UDP {
        return sock::connection(skb, answer).is_some();
    }
    // A passed flow of a client, see `uplink`.
    FlowRef::find(&down_key(answer)).is_none_or(|flow| flow.is_proxied(UDP))
        && sock::own_udp(skb, answer).is_some()
}

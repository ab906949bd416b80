//! The policy, read from maps.

use aya_ebpf::btf_maps::LpmTrie;
use aya_ebpf::btf_maps::lpm_trie::Key;
use tproxy_common::abi::{Addr, Family, TCP};
use tproxy_common::classify::{self, Policy};
use tproxy_common::wire::Packet;

use crate::maps::{DESTINATIONS, LOCAL, PORTS, SOURCES};
use crate::settings;

/// The maps as a [`Policy`].
struct Maps;

/// The value of the longest prefix that holds the address, 0 where none does.
#[inline(always)]
fn longest_match<const N: usize, const F: usize>(trie: &LpmTrie<Addr, u8, N, F>, addr: &Addr) -> u8 {
    // A number on both paths: of an `Option` the compiler makes a flag and a
    // value that is not initialised where there is none, which the verifier refuses.
    trie.get(&Key::new(128, *addr)).map_or(0, |value| *value)
}

impl Policy for Maps {
    #[inline(always)]
    fn protocol(&self, protocol: u8) -> bool {
        if protocol == TCP { settings::tcp() == 1 } else { settings::udp() == 1 }
    }

    #[inline(always)]
    fn family(&self, family: Family) -> bool {
        match family {
            Family::V4 => settings::v4() == 1,
            Family::V6 => settings::v6() == 1,
        }
    }

    #[inline(always)]
    fn port(&self, port: u16) -> bool {
        PORTS.get(u32::from(port >> 6)).is_some_and(|word| word >> (port & 63) & 1 == 1)
    }

    #[inline(always)]
    fn any_port(&self) -> bool {
        settings::any_port() == 1
    }

    #[inline(always)]
    fn source(&self, addr: &Addr) -> bool {
        settings::any_source() == 1 || longest_match(&SOURCES, addr) == 1
    }

    #[inline(always)]
    fn destination(&self, addr: &Addr) -> bool {
        settings::any_destination() == 1 || longest_match(&DESTINATIONS, addr) == 1
    }
}

/// Whether the address is one of this host's own.
#[inline(never)]
pub(crate) fn is_local(addr: &Addr) -> bool {
    longest_match(&LOCAL, addr) == 1
}

/// Whether the policy captures the flow that this packet opens.
#[inline(never)]
pub(crate) fn captures(packet: &Packet) -> bool {
    classify::captures(
        &Maps,
        packet.family,
        packet.protocol,
        &packet.source,
        &packet.destination,
        Some(packet.destination_port),
    )
}

/// Whether the policy could capture it, were the ports known.
#[inline(never)]
pub(crate) fn captures_some_port(packet: &Packet) -> bool {
    classify::captures(&Maps, packet.family, packet.protocol, &packet.source, &packet.destination, None)
}

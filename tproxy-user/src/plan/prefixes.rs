//! "In one of these, and in none of those" as a table for longest-prefix match.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use tproxy_common::abi::LpmKey;

/// Length of `::ffff:0:0/96`, in which IPv4 addresses are mapped.
const MAPPED_LEN: u32 = 96;
const MAPPED_PREFIX: u128 = 0xffff_0000_0000;

/// The mapped form of a network: address as a number, and prefix length.
fn bits(net: &IpNet) -> (u128, u32) {
    match net.trunc() {
        IpNet::V4(v4) => (v4.addr().to_ipv6_mapped().to_bits(), MAPPED_LEN + u32::from(v4.prefix_len())),
        IpNet::V6(v6) => (v6.addr().to_bits(), u32::from(v6.prefix_len())),
    }
}

fn contains((outer, outer_len): (u128, u32), (inner, inner_len): (u128, u32)) -> bool {
    outer_len <= inner_len && (outer ^ inner).checked_shr(128 - outer_len).unwrap_or(0) == 0
}

/// The key of a network.
#[must_use]
pub fn key(net: &IpNet) -> LpmKey {
    let (address, prefix_len) = bits(net);
    LpmKey { prefix_len, addr: address.to_be_bytes() }
}

/// The network of a key.
#[must_use]
pub fn net(key: &LpmKey) -> Option<IpNet> {
    let address = Ipv6Addr::from(key.addr);
    let (address, len) = match address.to_ipv4_mapped() {
        Some(v4) if key.prefix_len >= MAPPED_LEN => (IpAddr::V4(v4), key.prefix_len - MAPPED_LEN),
        _ => (IpAddr::V6(address), key.prefix_len),
    };
    IpNet::new(address, u8::try_from(len).ok()?).ok()
}

/// Compiles a selection so that the longest matching prefix of any address has
/// the value 1 exactly if the address is in one of `include` (or that is empty)
/// and in none of `exclude`.
///
/// Entries that would change nothing are left out. Takes n·log n.
#[must_use]
pub fn compile(include: &[IpNet], exclude: &[IpNet]) -> Vec<(LpmKey, u8)> {
    // Both families have a default of their own: `::/0` of the user's is
    // about IPv6 alone, though mapped addresses lie in it.
    const ROOTS: [(u128, u32); 2] = [(0, 0), (MAPPED_PREFIX, MAPPED_LEN)];
    let mut nets = BTreeMap::from(ROOTS.map(|root| (root, [false; 2])));
    for (list, which) in [(include, 0), (exclude, 1)] {
        for net in list {
            nets.entry(bits(net)).or_default()[which] = true;
        }
    }
    let mut table = Vec::new();
    // Prefixes that contain the current one, the longest last. In the order of
    // the map (address, then length) a prefix comes before all that it contains.
    let mut stack: Vec<((u128, u32), [bool; 2])> = Vec::new();
    for (net, listed) in nets {
        while stack.last().is_some_and(|(outer, _)| !contains(*outer, net)) {
            stack.pop();
        }
        let root = ROOTS.contains(&net);
        let outer = match stack.last() {
            Some((_, covered)) if !root => *covered,
            _ => [include.is_empty(), false],
        };
        let covered = [outer[0] || listed[0], outer[1] || listed[1]];
        let value = |[included, excluded]: [bool; 2]| included && !excluded;
        if root || value(covered) != value(outer) {
            table.push((LpmKey { prefix_len: net.1, addr: net.0.to_be_bytes() }, u8::from(value(covered))));
        }
        stack.push((net, covered));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    /// What the kernel's LPM trie does.
    fn lookup(table: &[(LpmKey, u8)], address: IpAddr) -> Option<u8> {
        let (address, _) = bits(&address.into());
        table
            .iter()
            .filter(|(key, _)| contains((u128::from_be_bytes(key.addr), key.prefix_len), (address, 128)))
            .max_by_key(|(key, _)| key.prefix_len)
            .map(|(_, value)| *value)
    }

    fn naive(include: &[IpNet], exclude: &[IpNet], address: IpAddr) -> u8 {
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
        u8::from((include.is_empty() || within(include)) && !within(exclude))
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("network")).collect()
    }

    #[test]
    fn nothing_given_is_everything() {
        let table = compile(&[], &[]);
        assert_eq!(table.len(), 2);
        assert!(table.iter().all(|(_, value)| *value == 1));
    }

    #[test]
    fn families_do_not_mix() {
        let table = compile(&nets(&["::/0"]), &[]);
        assert_eq!(lookup(&table, "10.0.0.1".parse().expect("address")), Some(0));
        assert_eq!(lookup(&table, "2001:db8::1".parse().expect("address")), Some(1));
        let table = compile(&nets(&["0.0.0.0/0", "::/8"]), &nets(&["10.0.0.0/8"]));
        assert_eq!(lookup(&table, "10.0.0.1".parse().expect("address")), Some(0));
        assert_eq!(lookup(&table, "11.0.0.1".parse().expect("address")), Some(1));
    }

    #[test]
    fn entries_without_effect_are_left_out() {
        let table = compile(&nets(&["10.0.0.0/8", "10.1.0.0/16"]), &nets(&["192.168.0.0/16"]));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn keys_and_networks_are_the_same() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "::/0", "::/96", "2001:db8::/32", "::1/128"] {
            let network: IpNet = text.parse().expect("network");
            assert_eq!(net(&key(&network)), Some(network));
        }
    }

    /// Addresses with few bits, so that prefixes and addresses often meet.
    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0u32..16, 0u32..4).prop_map(|(high, low)| IpAddr::V4((high << 28 | low).into())),
            (0u128..16, 0u128..4).prop_map(|(high, low)| IpAddr::V6((high << 124 | low).into())),
            (0u128..4).prop_map(|low| IpAddr::V6((0x1_0000_0000 | low).into())),
        ]
    }

    fn network() -> impl Strategy<Value = IpNet> {
        (address(), any::<u8>(), any::<bool>()).prop_map(|(address, len, short)| match address {
            IpAddr::V4(v4) => {
                Ipv4Net::new(v4, if short { len % 6 } else { len % 33 }).expect("length").trunc().into()
            }
            IpAddr::V6(v6) => {
                Ipv6Net::new(v6, if short { len % 6 } else { len % 129 }).expect("length").trunc().into()
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn longest_match_is_the_selection(
            include in prop::collection::vec(network(), 0..6),
            exclude in prop::collection::vec(network(), 0..6),
            addresses in prop::collection::vec(address(), 1..20),
        ) {
            let table = compile(&include, &exclude);
            for address in addresses {
                prop_assert_eq!(lookup(&table, address), Some(naive(&include, &exclude, address)), "{}", address);
            }
        }
    }
}

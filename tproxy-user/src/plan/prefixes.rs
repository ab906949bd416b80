//! Networks as keys of a table for longest-prefix match.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use tproxy_common::abi::LpmKey;

/// Length of `::ffff:0:0/96`, in which IPv4 addresses are mapped.
const MAPPED_LEN: u32 = 96;

/// The mapped form of a network: address as a number, and prefix length.
fn bits(net: &IpNet) -> (u128, u32) {
    match net.trunc() {
        IpNet::V4(v4) => (v4.addr().to_ipv6_mapped().to_bits(), MAPPED_LEN + u32::from(v4.prefix_len())),
        IpNet::V6(v6) => (v6.addr().to_bits(), u32::from(v6.prefix_len())),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_networks_are_the_same() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "::/0", "::/96", "2001:db8::/32", "::1/128"] {
            let network: IpNet = text.parse().expect("network");
            assert_eq!(net(&key(&network)), Some(network));
        }
    }
}

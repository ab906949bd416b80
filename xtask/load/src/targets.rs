//! The addresses that a client asks, in turn.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// Consecutive addresses, all of them of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    first: IpAddr,
    count: u32,
}

impl Targets {
    /// How many there are.
    pub(crate) const fn count(self) -> u32 {
        self.count
    }

    /// The `n`th, from 0 on; after the last the first again.
    pub(crate) fn at(self, n: u64, port: u16) -> SocketAddr {
        #[expect(clippy::cast_possible_truncation, reason = "it is less than `count`")]
        let step = (n % u64::from(self.count)) as u32;
        let address = match self.first {
            IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + step).into(),
            IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + u128::from(step)).into(),
        };
        SocketAddr::new(address, port)
    }
}

impl FromStr for Targets {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?}: expected FIRST_ADDR/COUNT, as 198.18.0.1/64");
        let (first, count) = text.split_once('/').ok_or_else(expected)?;
        let first: IpAddr = first.parse().map_err(|_| expected())?;
        let count: u32 = count.parse().map_err(|_| expected())?;
        let further = count.checked_sub(1).ok_or_else(|| format!("{text:?}: no address"))?;
        let ends = match first {
            IpAddr::V4(first) => first.to_bits().checked_add(further).is_some(),
            IpAddr::V6(first) => first.to_bits().checked_add(further.into()).is_some(),
        };
        if ends { Ok(Self { first, count }) } else { Err(format!("{text:?}: ends behind the last address")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str, n: u64) -> String {
        text.parse::<Targets>().expect("targets").at(n, 9000).to_string()
    }

    #[test]
    fn targets_are_consecutive_and_taken_in_turn() {
        assert_eq!(target("198.18.0.1/64", 0), "198.18.0.1:9000");
        assert_eq!(target("198.18.0.1/64", 63), "198.18.0.64:9000");
        assert_eq!(target("198.18.0.1/64", 64), "198.18.0.1:9000");
        assert_eq!(target("198.18.0.255/2", 1), "198.18.1.0:9000");
        assert_eq!(target("2001:db8::ffff/2", 3), "[2001:db8::1:0]:9000");
    }

    #[test]
    fn what_is_no_range_of_addresses_is_refused() {
        for text in ["198.18.0.1", "198.18.0.1/", "198.18.0.1/0", "x/1", "::/-1", "255.255.255.255/2"] {
            assert!(text.parse::<Targets>().is_err(), "{text}");
        }
        assert!("255.255.255.255/1".parse::<Targets>().is_ok());
    }
}

//! Addresses with their roles: three values of one type that must not be swapped.

use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// IPv4-mapped addresses become IPv4, and an IPv6 flow label is dropped, so that
/// one peer compares equal however the kernel spelled it. The scope of a
/// link-local address stays: without it the address cannot be replied to.
fn normalised(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(_) => addr,
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => (v4, v6.port()).into(),
            None => SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
        },
    }
}

macro_rules! role {
    ($(#[$doc:meta])+ $name:ident) => {
        $(#[$doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name(SocketAddr);

        impl $name {
            /// The address without its role.
            #[must_use]
            pub const fn get(self) -> SocketAddr {
                self.0
            }

            /// The IP address.
            #[must_use]
            pub const fn ip(self) -> IpAddr {
                self.0.ip()
            }

            /// The port, host byte order.
            #[must_use]
            pub const fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl From<SocketAddr> for $name {
            fn from(addr: SocketAddr) -> Self {
                Self(normalised(addr))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// Who opened the connection or sent the datagram.
    ClientAddr
}
role! {
    /// Where the client wanted to go.
    OrigDst
}
role! {
    /// Where the proxy connects to for it.
    UpstreamAddr
}

impl From<OrigDst> for UpstreamAddr {
    /// Without an upstream proxy the client's wish is where we go.
    fn from(destination: OrigDst) -> Self {
        Self(destination.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:53".parse().expect("an address");
        let plain: SocketAddr = "192.0.2.1:53".parse().expect("an address");
        assert_eq!(OrigDst::from(mapped), OrigDst::from(plain));
        assert_eq!(OrigDst::from(mapped).to_string(), "192.0.2.1:53");
    }

    #[test]
    fn flow_label_goes_and_scope_stays() {
        let ip = "fe80::1".parse().expect("an address");
        let client = ClientAddr::from(SocketAddr::from(SocketAddrV6::new(ip, 7, 9, 3)));
        assert_eq!(client.get(), SocketAddrV6::new(ip, 7, 0, 3).into());
    }
}

//! The PROXY protocol (specification by `HAProxy`): who the client is, and where it wanted to
//! go, before the first byte of a connection, or in front of each datagram.

use proxy_header::{ProxiedAddress, ProxyHeader};

use crate::addr::{ClientAddr, OrigDst};
use crate::config::upstream::SendProxy;

/// What goes before a connection's first byte; empty where nothing does.
#[must_use]
pub fn of_stream(version: SendProxy, client: ClientAddr, destination: OrigDst) -> Vec<u8> {
    let header = ProxyHeader::with_address(ProxiedAddress::stream(client.get(), destination.get()));
    let mut bytes = Vec::new();
    // Both fail only for addresses of two families, and for version 1 for what is no stream.
    let written = match version {
        SendProxy::Off => Ok(()),
        SendProxy::V1 => header.encode_v1(&mut bytes),
        SendProxy::V2 => header.encode_v2(&mut bytes),
    };
    if written.is_err() {
        bytes.clear();
    }
    bytes
}

/// What goes before a datagram's payload; version 1 has no datagrams.
#[must_use]
pub fn of_datagram(version: SendProxy, client: ClientAddr, destination: OrigDst) -> Vec<u8> {
    let mut bytes = Vec::new();
    if version == SendProxy::V2 {
        let address = ProxiedAddress::datagram(client.get(), destination.get());
        if ProxyHeader::with_address(address).encode_v2(&mut bytes).is_err() {
            bytes.clear();
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn ends(client: &str, destination: &str) -> (ClientAddr, OrigDst) {
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        (address(client).into(), address(destination).into())
    }

    #[test]
    fn headers_are_those_of_the_specification() {
        let (client, destination) = ends("192.0.2.1:56324", "198.51.100.1:443");
        assert_eq!(
            of_stream(SendProxy::V1, client, destination),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n"
        );
        let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc6\x33\x64\x01\xdc\x04\x01\xbb";
        assert_eq!(of_stream(SendProxy::V2, client, destination), v2);
        let datagram = of_datagram(SendProxy::V2, client, destination);
        assert_eq!((datagram[13], &datagram[14..]), (0x12, &v2[14..]));
        let (client, destination) = ends("[2001:db8::1]:1", "[2001:db8::2]:2");
        assert_eq!(
            of_stream(SendProxy::V1, client, destination),
            b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n"
        );
        assert_eq!(of_stream(SendProxy::V2, client, destination).len(), 16 + 36);
    }

    #[test]
    fn nothing_is_said_where_nothing_can_be() {
        let (client, destination) = ends("192.0.2.1:1", "198.51.100.1:2");
        assert_eq!(of_stream(SendProxy::Off, client, destination), b"");
        assert_eq!(of_datagram(SendProxy::V1, client, destination), b"");
    }
}

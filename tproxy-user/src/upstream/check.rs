//! What holds of any bytes that a proxy server may answer. For fuzzing and for unit tests.

use std::net::SocketAddr;

use super::destination::Destination;
use super::http;
use super::socks5::datagram::{self, Sender};
use super::socks5::{Command, Handshake, LONGEST, Step};
use crate::config::upstream::Credentials;

/// The most that is sent and read in one handshake: method, password, request, each with its answer,
/// of which the last comes in two pieces.
const MOST_STEPS: usize = 4;

/// A SOCKS5 server that says these bytes, but for the first, which says what it is asked for.
///
/// # Panics
/// Where the handshake asks for more than the protocol has, or goes on for ever.
pub fn socks5(bytes: &[u8]) {
    let Some((kind, mut server)) = bytes.split_first() else { return };
    let credentials = Credentials::new("alice", "open sesame").ok().filter(|_| kind & 1 != 0);
    let to = SocketAddr::from(([192, 0, 2, 1], 443));
    let command = match kind >> 1 & 3 {
        0 => Command::Connect(Destination::Address(to)),
        1 => Command::Connect(Destination::of(to, Some("www.example.org"))),
        2 => Command::UdpAssociate(to),
        _ => Command::Nothing,
    };
    let pipelined = kind & 8 != 0;
    let (mut handshake, first) = Handshake::new(command, credentials.as_ref(), pipelined);
    assert!(if pipelined { first.len() <= 3 + 513 + 262 } else { first.len() == 3 });
    for _ in 0..MOST_STEPS {
        let wants = handshake.wants();
        assert!((1..=LONGEST).contains(&wants), "{wants} bytes");
        // Another length is told, and nothing comes of it.
        let Some((piece, rest)) = server.split_at_checked(wants) else { return };
        server = rest;
        match handshake.receive(piece) {
            Ok(Step::Read) => {}
            Ok(Step::Send(message)) => assert!(!pipelined && message.len() <= 513, "{} bytes", message.len()),
            Ok(Step::Done(_)) | Err(_) => return,
        }
    }
    panic!("it goes on after {MOST_STEPS} messages");
}

/// A datagram that a SOCKS5 server brings.
///
/// # Panics
/// Where what is read is not what would be written, or lies outside.
pub fn datagram(bytes: &[u8]) {
    let Some((sender, at)) = datagram::parse(bytes) else { return };
    assert!(at <= bytes.len() && bytes[2] == 0, "outside, or a fragment");
    let Sender::Address(sender) = sender else { return };
    let header = datagram::header(Destination::Address(sender));
    // Reserved bytes may be anything, and an IPv4 address may come as IPv6.
    if header.len() == at {
        assert_eq!(header[3..], bytes[3..at]);
    } else {
        assert_eq!((header.len(), at), (10, datagram::LONGEST));
    }
}

/// The answer of an HTTP server to CONNECT and to OPTIONS, as it comes byte by byte.
///
/// # Panics
/// Where an answer changes when more comes, or the head lies outside.
pub fn http(bytes: &[u8]) {
    for with_credentials in [false, true] {
        for parse in [http::response, http::answer] {
            let whole = parse(bytes, with_credentials);
            if let Ok(Some(length)) = &whole {
                assert!(*length <= bytes.len());
            }
            for length in 0..bytes.len() {
                match parse(&bytes[..length], with_credentials) {
                    Ok(None) => {}
                    told => assert_eq!(told, whole, "after {length} bytes"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_server_may_say_anything(kind: u8, noise in prop::collection::vec(any::<u8>(), 0..64), begun in 0_usize..9) {
            let valid = b"\x05\x00\x05\x00\x00\x01\x0a\x00\x00";
            socks5(&[&[kind], &valid[..begun], &noise].concat());
            let password = b"\x05\x02\x01\x00\x05\x00\x00\x04\x0a";
            socks5(&[&[kind], &password[..begun], &noise].concat());
        }

        #[test]
        fn datagrams_may_have_anything(head in 0_u8..6, noise in prop::collection::vec(any::<u8>(), 0..64)) {
            datagram(&[&[0, 0, 0, head], &noise[..]].concat());
            datagram(&noise);
        }

        #[test]
        fn heads_may_have_anything(
            status in prop::sample::select(vec!["", "HTTP/1.1 200 OK\r\n", "HTTP/1.0 407\r\n", "HTTP/1.1 5"]),
            rest in "[\r\n:a ]{0,24}", noise in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            http(&[status.as_bytes(), rest.as_bytes(), &noise].concat());
        }
    }
}

//! What holds for all bytes, whatever they are. The tests beside this and the fuzz targets share it:
//! each function panics where something does not hold.

use super::quic::Initials;
use super::quic::sent::{V1, V2, crypto, datagram};
use super::{MOST, Sniffed, dns, stream, tls};
use crate::policy::hostname::normal;

/// The first bytes of a TCP connection: what a beginning of them tells does not change.
///
/// # Panics
///
/// It does.
pub fn first_bytes(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(MOST)];
    let whole = stream(bytes);
    is_normal(&whole);
    for at in 0..bytes.len() {
        let told = stream(&bytes[..at]);
        assert!(told == Sniffed::More || told == whole, "{told:?} by {at} bytes, {whole:?} by all");
    }
}

/// A `ClientHello`, or what is to look like one, of at most 8000 bytes: it tells the same however
/// it is carried.
///
/// # Panics
///
/// It does not.
pub fn hello(message: &[u8]) {
    let message = &message[..message.len().min(8000)];
    let whole = tls::message_of(message);
    is_normal(&whole);
    // Of TLS, the records' headers must not take it beyond what is looked at.
    for most in [16_000, 1 + message.len() / 2, 100, 10] {
        assert_eq!(stream(&records(message, most)), whole, "in records of {most}");
    }
    for most in [1000, 1 + message.len() / 3] {
        let parts = message.chunks(most.min(1000)).zip((0..).step_by(most.min(1000)));
        let datagrams: Vec<_> =
            (0..).zip(parts).map(|(number, (part, at))| datagram(V1, number, &crypto(at, part))).collect();
        let backwards = datagrams.iter().rev().collect();
        for order in [datagrams.iter().collect::<Vec<_>>(), backwards] {
            let mut initials = Initials::default();
            let told = order.into_iter().map(|datagram| initials.add(datagram));
            let told = told.into_iter().find(|told| *told != Sniffed::More).unwrap_or(Sniffed::More);
            assert_eq!(told, whole, "in datagrams of {most}");
        }
    }
}

/// Datagrams of a client, each behind its length in two bytes: as they are, and as the frames of
/// a protected packet.
///
/// # Panics
///
/// A name that is none.
pub fn datagrams(bytes: &[u8]) {
    let (mut raw, mut sealed) = (Initials::default(), Initials::default());
    let mut rest = bytes;
    for number in 0..4 {
        let Some((length, after)) = rest.split_first_chunk() else { break };
        let (one, after) = after.split_at(after.len().min(u16::from_be_bytes(*length).into()));
        rest = after;
        is_normal(&raw.add(one));
        let version = if one.first().is_some_and(|byte| byte & 1 == 1) { V1 } else { V2 };
        is_normal(&sealed.add(&datagram(version, number, &one[..one.len().min(1162)])));
    }
}

/// A DNS answer: what is cut off tells nothing, and nothing else.
///
/// # Panics
///
/// It does, or a name that is none.
pub fn answer(bytes: &[u8]) {
    let whole = dns::answer(bytes);
    if let Some(dns::Answer { name, addresses }) = &whole {
        is_normal(&Sniffed::Name(name.clone()));
        assert!((1..=64).contains(&addresses.len()), "{} addresses", addresses.len());
    }
    for at in 0..bytes.len() {
        let told = dns::answer(&bytes[..at]);
        assert!(told.is_none() || told == whole, "{told:?} by {at} bytes, {whole:?} by all");
    }
}

/// A message in records of at most this many bytes.
pub(super) fn records(message: &[u8], most: usize) -> Vec<u8> {
    let record = |part: &[u8]| {
        let length = u16::try_from(part.len()).expect("short");
        [&[tls::HANDSHAKE, 3, 1][..], &length.to_be_bytes(), part].concat()
    };
    message.chunks(most).flat_map(record).collect()
}

/// A name is one that rules can be compared with.
fn is_normal(told: &Sniffed) {
    if let Sniffed::Name(name) = told {
        assert!(name.len() <= 253 && !name.bytes().any(|byte| byte.is_ascii_uppercase()), "{name:?}");
        assert_eq!(normal(name).as_ref(), Some(name));
    }
}

//! Datagrams as a client sends them: the reverse of what stands beside this, to check it.

use super::initial::{Keys, Packet};

/// The first byte of an Initial packet with a number of four bytes, and a version.
pub(crate) const V1: [u8; 5] = [0xc3, 0, 0, 0, 1];
/// The same of version 2.
pub(crate) const V2: [u8; 5] = [0xd3, 0x6b, 0x33, 0x43, 0xcf];

/// What follows: the ids of the example (RFC 9001, appendix A.2), no token, a length of 1182.
const IDS: [u8; 13] = [8, 0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 8, 0, 0, 0x44, 0x9e];

/// A datagram of 1200 bytes with these frames, at most 1162 bytes, as the example has it.
pub(crate) fn datagram(version: [u8; 5], number: u32, frames: &[u8]) -> Vec<u8> {
    let header = [&version[..], &IDS, &number.to_be_bytes()].concat();
    let mut content = frames.to_vec();
    content.resize(1162, 0);
    let mut unsealed = header.clone();
    unsealed.resize(1200, 0);
    let (packet, _) = Packet::split(&unsealed).expect("a packet");
    Keys::of(&packet).expect("keys").seal(&header, number, &content)
}

/// A frame with this part of the handshake.
pub(crate) fn crypto(offset: usize, content: &[u8]) -> Vec<u8> {
    let short = |number: usize| (0x4000 | u16::try_from(number).expect("short")).to_be_bytes();
    [&[6], &short(offset)[..], &short(content.len()), content].concat()
}

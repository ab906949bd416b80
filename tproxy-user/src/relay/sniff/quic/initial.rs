//! One Initial packet: its header, and what its protection hides.

use aes_gcm::aead::{AeadInOut as _, KeyInit as _};
use aes_gcm::aes::Aes128;
use aes_gcm::aes::cipher::BlockCipherEncrypt as _;
use aes_gcm::{Aes128Gcm, Nonce};
use hkdf::Hkdf;
use sha2::Sha256;

/// The longest connection id (RFC 9000, section 17.2).
const LONGEST_ID: usize = 20;

/// Bytes that the mask of a header is made from, and how far behind the packet number they are.
const SAMPLE: usize = 16;
const BEFORE_SAMPLE: usize = 4;

/// What differs between versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    number: u32,
    /// The type of an Initial packet, of two bits.
    initial: u8,
    salt: [u8; 20],
    key: &'static str,
    iv: &'static str,
    header: &'static str,
}

const VERSIONS: [Version; 2] = [
    Version {
        number: 1,
        initial: 0,
        salt: [
            0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad,
            0xcc, 0xbb, 0x7f, 0x0a,
        ],
        key: "quic key",
        iv: "quic iv",
        header: "quic hp",
    },
    Version {
        number: 0x6b33_43cf,
        initial: 1,
        salt: [
            0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb,
            0xf9, 0xbd, 0x2e, 0xd9,
        ],
        key: "quicv2 key",
        iv: "quicv2 iv",
        header: "quicv2 hp",
    },
];

/// A packet with a long header, as it has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    version: Version,
    /// Of the server, which the client chose.
    id: &'a [u8],
    bytes: &'a [u8],
    /// Where the packet number begins; `None`: it is no Initial.
    number_at: Option<usize>,
}

impl<'a> Packet<'a> {
    /// The first packet of a datagram, and what is behind it. `None`: there is none of a kind
    /// that is known here.
    pub(super) fn split(datagram: &'a [u8]) -> Option<(Self, &'a [u8])> {
        /// Packet with early data, by version: one more than an Initial.
        const EARLY: u8 = 1;
        let mut rest = datagram;
        let first = *take(&mut rest, 1)?.first()?;
        let number = u32::from_be_bytes(take(&mut rest, 4)?.try_into().ok()?);
        let version = *VERSIONS.iter().find(|version| version.number == number)?;
        // A long header with the bit that all have (RFC 9287 aside: nobody has agreed yet).
        if first & 0xc0 != 0xc0 {
            return None;
        }
        let mut id = || {
            let length = usize::from(*take(&mut rest, 1)?.first()?);
            if length > LONGEST_ID { None } else { take(&mut rest, length) }
        };
        let (destination, _source) = (id()?, id()?);
        let kind = first >> 4 & 3;
        let is_initial = kind == version.initial;
        if is_initial {
            let token = usize::try_from(self::number(&mut rest)?).ok()?;
            take(&mut rest, token)?;
        } else if kind != version.initial + EARLY {
            return None;
        }
        let length = usize::try_from(self::number(&mut rest)?).ok()?;
        let number_at = datagram.len() - rest.len();
        take(&mut rest, length)?;
        let bytes = &datagram[..number_at + length];
        let number_at = is_initial.then_some(number_at);
        Some((Self { version, id: destination, bytes, number_at }, rest))
    }

    pub(super) fn is_initial(&self) -> bool {
        self.number_at.is_some()
    }
}

/// What protects the packets of a client that opens a connection.
pub(super) struct Keys {
    version: Version,
    id: Vec<u8>,
    packets: Aes128Gcm,
    iv: [u8; 12],
    header: Aes128,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Keys {
    /// By the id that a client chose (RFC 9001, section 5.2).
    pub(super) fn of(packet: &Packet<'_>) -> Option<Self> {
        let version = packet.version;
        let (_, initial) = Hkdf::<Sha256>::extract(Some(&version.salt), packet.id);
        let client = Hkdf::<Sha256>::from_prk(&expand::<32>(&initial, "client in")?).ok()?;
        Some(Self {
            version,
            id: packet.id.to_vec(),
            packets: Aes128Gcm::new(&expand::<16>(&client, version.key)?.into()),
            iv: expand(&client, version.iv)?,
            header: Aes128::new(&expand::<16>(&client, version.header)?.into()),
        })
    }

    /// Whether they are this packet's.
    pub(super) fn are_of(&self, packet: &Packet<'_>) -> bool {
        self.version == packet.version && self.id == packet.id
    }

    /// The frames of a packet; `None`: it was not protected so.
    pub(super) fn open(&self, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let at = packet.number_at?;
        let mask = self.mask(packet.bytes, at)?;
        let first = packet.bytes[0] ^ mask[0] & 0x0f;
        let length = usize::from(first & 3) + 1;
        let mut header = packet.bytes.get(..at + length)?.to_vec();
        header[0] = first;
        let mut number = 0_u64;
        for (byte, mask) in header[at..].iter_mut().zip(&mask[1..]) {
            *byte ^= mask;
            number = number << 8 | u64::from(*byte);
        }
        // The first packets of a connection have small numbers, written whole.
        let mut content = packet.bytes[at + length..].to_vec();
        self.packets.decrypt_in_place(&self.nonce(number), &header, &mut content).ok()?;
        Some(content)
    }

    fn nonce(&self, number: u64) -> Nonce<aes_gcm::aead::consts::U12> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= number;
        }
        nonce.into()
    }

    /// What hides the first byte and the packet number, which begins there.
    fn mask(&self, bytes: &[u8], at: usize) -> Option<[u8; SAMPLE]> {
        let sample: [u8; SAMPLE] = bytes.get(at + BEFORE_SAMPLE..)?.first_chunk().copied()?;
        let mut block = sample.into();
        self.header.encrypt_block(&mut block);
        Some(block.into())
    }

    /// Protects a packet whose header ends with a number of four bytes.
    #[cfg(any(test, fuzzing))]
    pub(super) fn seal(&self, header: &[u8], number: u32, frames: &[u8]) -> Vec<u8> {
        let mut content = frames.to_vec();
        let sealed = self.packets.encrypt_in_place(&self.nonce(number.into()), header, &mut content);
        sealed.expect("room");
        let mut packet = [header, &content].concat();
        let at = header.len() - 4;
        let mask = self.mask(&packet, at).expect("long enough");
        packet[0] ^= mask[0] & 0x0f;
        for (byte, mask) in packet[at..at + 4].iter_mut().zip(&mask[1..]) {
            *byte ^= mask;
        }
        packet
    }
}

/// `HKDF-Expand-Label` without a context (RFC 8446, section 7.1).
fn expand<const N: usize>(secret: &Hkdf<Sha256>, label: &str) -> Option<[u8; N]> {
    let (length, label) = (u16::try_from(N).ok()?.to_be_bytes(), ["tls13 ", label].concat());
    let info = [&length[..], &[u8::try_from(label.len()).ok()?], label.as_bytes(), &[0]].concat();
    let mut key = [0; N];
    secret.expand(&info, &mut key).ok()?;
    Some(key)
}

/// Takes so many bytes off.
pub(super) fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(taken)
}

/// Takes a number off, of variable length (RFC 9000, section 16).
pub(super) fn number(bytes: &mut &[u8]) -> Option<u64> {
    let length = 1 << (bytes.first()? >> 6);
    let number = take(bytes, length)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    Some(number & (u64::MAX >> (64 - 8 * length + 2)))
}

/// Takes some numbers off.
pub(super) fn numbers<const N: usize>(bytes: &mut &[u8]) -> Option<[u64; N]> {
    let mut all = [0; N];
    for one in &mut all {
        *one = number(bytes)?;
    }
    Some(all)
}

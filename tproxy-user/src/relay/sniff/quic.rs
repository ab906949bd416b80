//! The server name in QUIC's first packets: versions 1 and 2 (RFC 9000, RFC 9001, RFC 9369). What
//! protects them anybody on the way can take off; that is by design.

mod initial;
#[cfg(any(test, fuzzing))]
pub(super) mod sent;

use initial::{Keys, Packet};

use super::{MOST, Sniffed, tls};

/// The longest datagram that is looked at, and held back meanwhile.
pub const LONGEST: usize = 4096;

/// Whether a datagram may be one that opens a connection.
#[must_use]
pub fn may_open(datagram: &[u8]) -> bool {
    Packet::split(datagram).is_some_and(|(packet, _)| packet.is_initial())
}

/// What a client's first datagrams have told so far.
#[derive(Debug, Default)]
pub struct Initials {
    /// Of the connection that the first one opens.
    keys: Option<Keys>,
    /// The stream of handshake messages, as far as it has come, and which bytes of it have.
    stream: Vec<u8>,
    come: Vec<bool>,
}

impl Initials {
    /// Looks at the next datagram.
    pub fn add(&mut self, datagram: &[u8]) -> Sniffed {
        if datagram.len() > LONGEST || self.packets(datagram).is_none() {
            return Sniffed::Nothing;
        }
        let whole = self.come.iter().position(|come| !come).unwrap_or(self.come.len());
        match tls::message_of(&self.stream[..whole]) {
            Sniffed::More if whole >= MOST => Sniffed::Nothing,
            told => told,
        }
    }

    /// Takes what the packets of a datagram carry; `None`: nobody opens a connection so.
    fn packets(&mut self, datagram: &[u8]) -> Option<()> {
        let mut rest = datagram;
        let mut opened = false;
        // Behind the first there may be early data, in the next datagrams early data alone.
        while let Some((packet, next)) = Packet::split(rest) {
            rest = next;
            if !packet.is_initial() {
                continue;
            }
            // A client that has been told to try again opens it anew.
            let keys = match self.keys.take() {
                Some(keys) if keys.are_of(&packet) => keys,
                _ => {
                    self.stream.clear();
                    self.come.clear();
                    Keys::of(&packet)?
                }
            };
            let frames = keys.open(&packet);
            self.keys = Some(keys);
            self.frames(&frames?)?;
            opened = true;
        }
        (opened || self.keys.is_some()).then_some(())
    }

    /// Takes what the frames of a packet carry (RFC 9000, section 12.4).
    fn frames(&mut self, mut bytes: &[u8]) -> Option<()> {
        const PADDING: u64 = 0;
        const PING: u64 = 1;
        const ACK: u64 = 2;
        const ACK_ECN: u64 = 3;
        const CRYPTO: u64 = 6;
        while !bytes.is_empty() {
            match initial::number(&mut bytes)? {
                PADDING | PING => {}
                kind @ (ACK | ACK_ECN) => {
                    let [_largest, _delay, ranges, _first] = initial::numbers(&mut bytes)?;
                    for _ in 0..ranges {
                        let [_gap, _length] = initial::numbers(&mut bytes)?;
                    }
                    if kind == ACK_ECN {
                        let [_, _, _] = initial::numbers(&mut bytes)?;
                    }
                }
                CRYPTO => {
                    let [offset, length] = initial::numbers(&mut bytes)?;
                    let content = initial::take(&mut bytes, usize::try_from(length).ok()?)?;
                    self.insert(usize::try_from(offset).ok()?, content)?;
                }
                _ => return None,
            }
        }
        Some(())
    }

    /// Puts a part of the stream where it belongs; `None`: too far from its beginning.
    fn insert(&mut self, offset: usize, content: &[u8]) -> Option<()> {
        let end = offset.checked_add(content.len()).filter(|end| *end <= MOST)?;
        if self.stream.len() < end {
            self.stream.resize(end, 0);
            self.come.resize(end, false);
        }
        self.stream[offset..end].copy_from_slice(content);
        self.come[offset..end].fill(true);
        Some(())
    }
}

#[cfg(test)]
mod tests;

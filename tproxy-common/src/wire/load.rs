//! How bytes of a packet are read, and what is in a word of them.

/// Source of packet bytes.
///
/// Headers are read by words of 32 bits, in which the RFCs draw them: of an array
/// of bytes eBPF moves each byte by itself.
pub trait Load {
    /// Copies `N` words, as they stand (network byte order), from `offset` bytes
    /// after the start of the network header; `None` where the packet is shorter.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
}

impl Load for &[u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let start = offset as usize;
        let (words, _) = self.get(start..start.checked_add(4 * N)?)?.as_chunks::<4>();
        Some(core::array::from_fn(|i| u32::from_ne_bytes(words[i])))
    }
}

/// Bits `from` to `from + count` of a word, numbered as the RFCs do: 0 is the first on the wire.
#[inline(always)]
pub(super) const fn bits(word: u32, from: u32, count: u32) -> u32 {
    u32::from_be(word) << from >> (32 - count)
}

/// Byte `i` of a word as it stands.
#[inline(always)]
pub(super) const fn byte(word: u32, i: usize) -> u8 {
    word.to_ne_bytes()[i]
}

/// Half `i` of a word as it stands, host byte order.
#[inline(always)]
pub(super) const fn half(word: u32, i: usize) -> u16 {
    let bytes = word.to_ne_bytes();
    u16::from_be_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

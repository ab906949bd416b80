//! Packets by a recipe of arbitrary bytes: most are nearly right.

use super::Numbers;

const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const EXTENSIONS: [u8; 5] = [0, 43, FRAGMENT, AUTHENTICATION, 60];

/// Builds a packet, from the network header on. Every recipe gives one; of a
/// recipe of random bytes most headers are valid, some fields are odd, and some
/// bytes are overwritten or cut off.
pub fn packet(recipe: &[u8]) -> Vec<u8> {
    let mut recipe = Numbers::new(recipe);
    let mut packet = if recipe.once_in(3) { v4(&mut recipe) } else { v6(&mut recipe) };
    for _ in 0..recipe.u8() % 4 {
        let at = usize::from(recipe.u8()) % packet.len();
        packet[at] = recipe.u8();
    }
    if recipe.once_in(4) {
        packet.truncate(usize::from(recipe.u8()) % (packet.len() + 1));
    }
    packet
}

/// A length field: the right one, none, or any.
fn length(recipe: &mut Numbers, right: usize) -> [u8; 2] {
    let right = u16::try_from(right).expect("short");
    match recipe.u8() % 8 {
        0 => 0,
        1 => recipe.u16(),
        2 => right.wrapping_add(u16::from(recipe.u8() % 64)),
        3 => right.wrapping_sub(u16::from(recipe.u8() % 64)),
        _ => right,
    }
    .to_be_bytes()
}

fn protocol(recipe: &mut Numbers) -> u8 {
    if recipe.once_in(8) { recipe.u8() } else { recipe.one_of(&[TCP, UDP]) }
}

fn v4(recipe: &mut Numbers) -> Vec<u8> {
    let protocol = protocol(recipe);
    let options = if recipe.once_in(2) { usize::from(recipe.u8() % 11) } else { 0 };
    let mut packet = vec![0; 20 + options * 4];
    packet[0] = 0x45 + u8::try_from(options).expect("few");
    packet[4..6].copy_from_slice(&recipe.array::<2>());
    let field: u16 = match recipe.u8() % 8 {
        0 => 0x2000,
        1 => 0x00b9,
        2 => recipe.u16(),
        _ => 0x4000,
    };
    packet[6..8].copy_from_slice(&field.to_be_bytes());
    packet[8..10].copy_from_slice(&[64, protocol]);
    packet[12..20].copy_from_slice(&recipe.array::<8>());
    packet[20..].fill_with(|| recipe.u8());
    packet.extend(transport(recipe, protocol));
    let total = length(recipe, packet.len());
    packet[2..4].copy_from_slice(&total);
    packet
}

fn v6(recipe: &mut Numbers) -> Vec<u8> {
    let protocol = protocol(recipe);
    let mut headers: Vec<u8> = (0..recipe.u8() % 9).map(|_| recipe.one_of(&EXTENSIONS)).collect();
    if recipe.once_in(4) {
        headers = vec![FRAGMENT];
    }
    let mut packet = vec![0; 40];
    packet[0] = 0x60;
    packet[6] = headers.first().copied().unwrap_or(protocol);
    packet[7] = 64;
    packet[8..40].copy_from_slice(&recipe.array::<32>());
    for (i, kind) in headers.iter().enumerate() {
        let next = headers.get(i + 1).copied().unwrap_or(protocol);
        packet.extend(extension(recipe, *kind, next));
    }
    packet.extend(transport(recipe, protocol));
    let payload = length(recipe, packet.len() - 40);
    packet[4..6].copy_from_slice(&payload);
    packet
}

fn extension(recipe: &mut Numbers, kind: u8, next: u8) -> Vec<u8> {
    if kind == FRAGMENT {
        let field = if recipe.once_in(2) { recipe.u16() } else { recipe.one_of(&[0, 1]) };
        let mut header = vec![next, recipe.u8()];
        header.extend(field.to_be_bytes());
        header.extend(recipe.array::<4>());
        return header;
    }
    let unit = if kind == AUTHENTICATION { 4 } else { 8 };
    let units = if recipe.once_in(3) { recipe.u8() % 4 } else { 0 };
    let mut header = vec![0; 8 + usize::from(units) * unit];
    header[..2].copy_from_slice(&[next, units]);
    // Segments left, in a routing header.
    header[3] = if recipe.once_in(8) { recipe.u8() } else { 0 };
    header
}

fn transport(recipe: &mut Numbers, protocol: u8) -> Vec<u8> {
    let mut header = recipe.array::<4>().to_vec();
    if protocol == TCP {
        let words = if recipe.once_in(8) { recipe.u8() % 16 } else { 5 + recipe.u8() % 11 };
        header.resize(usize::from(words.max(5)) * 4, 0);
        header[12..14].copy_from_slice(&[words << 4, recipe.u8()]);
    } else {
        header.extend([0, 8, 0, 0]);
    }
    header.resize(header.len() + usize::from(recipe.u8() % 16), 0x5a);
    header
}

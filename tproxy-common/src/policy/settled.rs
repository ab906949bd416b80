//! What needs no dimension looked up.

use crate::abi::{Family, TCP, UDP};

use super::{Image, layout, word};

/// The rule that decides over a family and a protocol by themselves, or [`layout::UNSETTLED`]: most
/// sets of rules ask little, and looking a dimension up costs more than all that is around it.
/// `None` as with [`decide`](super::decide).
#[inline(always)]
pub fn settled(image: &impl Image, family: Family, protocol: u8) -> Option<u32> {
    let header = image.line(0)?;
    Some(match (family, protocol) {
        (Family::V4, TCP) => word(header, layout::SETTLED),
        (Family::V4, UDP) => word(header, layout::SETTLED + 1),
        (Family::V6, TCP) => word(header, layout::SETTLED + 2),
        (Family::V6, UDP) => word(header, layout::SETTLED + 3),
        _ => layout::UNSETTLED,
    })
}

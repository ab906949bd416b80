//! What the fuzz targets check: the properties of `tproxy-common/tests`.

#[path = "../../tests/reference/mod.rs"]
mod reference;

pub use reference::{check_classification, check_packet, check_segments, packet};

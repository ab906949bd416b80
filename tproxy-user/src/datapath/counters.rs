//! Reads `COUNTERS`.

use std::path::Path;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use tproxy_common::abi::map;
use tproxy_common::counter::Counters;

/// The counters, summed over all CPUs, of the instance with this pin directory.
///
/// # Errors
///
/// The map is not pinned there, or cannot be read.
pub fn read(pin: &Path) -> Result<Counters, MapError> {
    let map = Map::PerCpuArray(MapData::from_pin(pin.join(map::COUNTERS))?);
    let array: PerCpuArray<_, Counters> = PerCpuArray::try_from(map)?;
    let mut sum = Counters::default();
    for of_cpu in array.get(&0, 0)?.iter() {
        sum.add(of_cpu);
    }
    Ok(sum)
}

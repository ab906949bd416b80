//! Reads `COUNTERS`.

use std::path::Path;

use aya::maps::{Map, MapData, MapError, PerCpuArray};
use tproxy_common::abi::map;
use tproxy_common::counter::Counters;

/// The pinned map, open.
pub struct CounterMap(PerCpuArray<MapData, Counters>);

impl std::fmt::Debug for CounterMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CounterMap").finish_non_exhaustive()
    }
}

impl CounterMap {
    /// Opens the map of the instance with this pin directory.
    ///
    /// # Errors
    ///
    /// It is not pinned there.
    pub fn open(pin: &Path) -> Result<Self, MapError> {
        let map = Map::PerCpuArray(MapData::from_pin(pin.join(map::COUNTERS))?);
        Ok(Self(PerCpuArray::try_from(map)?))
    }

    /// The counters, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn read(&self) -> Result<Counters, MapError> {
        let mut sum = Counters::default();
        for of_cpu in self.0.get(&0, 0)?.iter() {
            sum.add(of_cpu);
        }
        Ok(sum)
    }
}

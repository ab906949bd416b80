//! Reads `FLOWS`.

use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use tproxy_common::abi::{Flow, FlowKey, map};

/// The flow table of a running instance.
#[derive(Debug)]
pub struct FlowTable(HashMap<MapData, FlowKey, Flow>);

impl FlowTable {
    /// That of the instance with this pin directory.
    ///
    /// # Errors
    ///
    /// The map is not pinned there, or cannot be opened.
    pub fn open(pin: &Path) -> Result<Self, MapError> {
        let map = Map::LruHashMap(MapData::from_pin(pin.join(map::FLOWS))?);
        HashMap::try_from(map).map(Self)
    }

    /// One flow, as it is now.
    #[must_use]
    pub fn get(&self, key: &FlowKey) -> Option<Flow> {
        self.0.get(key, 0).ok()
    }
}

/// All flows of the instance with this pin directory, in no order. A flow that
/// is evicted while the table is read may be missing.
///
/// # Errors
///
/// The map is not pinned there, or cannot be read.
pub fn read(pin: &Path) -> Result<Vec<(FlowKey, Flow)>, MapError> {
    let table = FlowTable::open(pin)?;
    let keys: Vec<FlowKey> = table.0.keys().filter_map(Result::ok).collect();
    Ok(keys.into_iter().filter_map(|key| Some((key, table.get(&key)?))).collect())
}

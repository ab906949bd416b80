//! Reads `FLOWS`.

use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use tproxy_common::abi::{Flow, FlowKey, map};

/// All flows of the instance with this pin directory, in no order. A flow that
/// is evicted while the table is read may be missing.
///
/// # Errors
///
/// The map is not pinned there, or cannot be read.
pub fn read(pin: &Path) -> Result<Vec<(FlowKey, Flow)>, MapError> {
    let map = Map::LruHashMap(MapData::from_pin(pin.join(map::FLOWS))?);
    let flows: HashMap<_, FlowKey, Flow> = HashMap::try_from(map)?;
    let keys: Vec<FlowKey> = flows.keys().filter_map(Result::ok).collect();
    Ok(keys.into_iter().filter_map(|key| Some((key, flows.get(&key, 0).ok()?))).collect())
}

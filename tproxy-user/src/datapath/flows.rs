//! Reads `FLOWS`, and what the relay has decided of some: `DECIDED`.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use tproxy_common::abi::{Decided, Decision, Flow, FlowKey, Verdict, map};

/// The flow table of a running instance.
#[derive(Debug)]
pub struct FlowTable {
    flows: HashMap<MapData, FlowKey, Flow>,
    decided: Mutex<HashMap<MapData, FlowKey, Decided>>,
}

impl FlowTable {
    /// That of the instance with this pin directory.
    ///
    /// # Errors
    ///
    /// A map is not pinned there, or cannot be opened.
    pub fn open(pin: &Path) -> Result<Self, MapError> {
        Ok(Self { flows: hash(pin, map::FLOWS)?, decided: Mutex::new(hash(pin, map::DECIDED)?) })
    }

    /// One flow, as it is now.
    #[must_use]
    pub fn get(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.get(key, 0).ok()
    }

    /// What the relay has decided of a flow that it was asked about.
    #[must_use]
    pub fn decided(&self, key: &FlowKey, flow: &Flow) -> Option<Decision> {
        if flow.verdict != Verdict::Ask as u8 {
            return None;
        }
        let decided = self.decided.lock().unwrap_or_else(PoisonError::into_inner).get(key, 0).ok()?;
        let of_this = decided.first_seen == flow.first_seen;
        of_this.then(|| Decision::of(decided.verdict, decided.rule, decided.target))
    }

    /// Notes what the relay has decided of a flow.
    ///
    /// # Errors
    ///
    /// The map cannot be written.
    pub fn decide(&self, key: &FlowKey, flow: &Flow, decision: Decision) -> Result<(), MapError> {
        let decided = Decided {
            first_seen: flow.first_seen,
            rule: decision.rule(),
            target: decision.target(),
            verdict: decision.raw_verdict(),
            pad: [0; 3],
        };
        self.decided.lock().unwrap_or_else(PoisonError::into_inner).insert(key, decided, 0)
    }
}

fn hash<K: Pod, V: Pod>(pin: &Path, name: &str) -> Result<HashMap<MapData, K, V>, MapError> {
    HashMap::try_from(Map::LruHashMap(MapData::from_pin(pin.join(name))?))
}

/// All flows of the instance with this pin directory, in no order, each with what is decided of
/// it. A flow that is evicted while the table is read may be missing.
///
/// # Errors
///
/// A map is not pinned there, or cannot be read.
pub fn read(pin: &Path) -> Result<Vec<(FlowKey, Flow)>, MapError> {
    let table = FlowTable::open(pin)?;
    let keys: Vec<FlowKey> = table.flows.keys().filter_map(Result::ok).collect();
    let flow = |key: FlowKey| {
        let mut flow = table.get(&key)?;
        if let Some(decision) = table.decided(&key, &flow) {
            (flow.verdict, flow.rule, flow.target) =
                (decision.raw_verdict(), decision.rule(), decision.target());
        }
        Some((key, flow))
    };
    Ok(keys.into_iter().filter_map(flow).collect())
}

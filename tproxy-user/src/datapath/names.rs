//! Writes `NAMES`: what addresses are called, by the sets of the rules that hold.

use std::net::IpAddr;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use tproxy_common::abi::{Addr, Name, map, mapped};

/// The map of a run.
#[derive(Debug)]
pub struct NameTable(HashMap<MapData, Addr, Name>);

impl NameTable {
    /// That of the run with this pin directory.
    ///
    /// # Errors
    ///
    /// It is not pinned there, or cannot be opened.
    pub fn open(pin: &Path) -> Result<Self, MapError> {
        HashMap::try_from(Map::LruHashMap(MapData::from_pin(pin.join(map::NAMES))?)).map(Self)
    }

    /// What an address is called, and until when; `None`: that is not known any more.
    ///
    /// # Errors
    ///
    /// The map cannot be written.
    pub fn set(&mut self, address: IpAddr, called: Option<(u32, u64)>) -> Result<(), MapError> {
        let address = match address {
            IpAddr::V4(v4) => mapped(v4.octets()),
            IpAddr::V6(v6) => v6.octets(),
        };
        match called {
            Some((set, expires)) => self.0.insert(address, Name { set, pad: 0, expires }, 0),
            None => self.remove(&address),
        }
    }

    /// Forgets all of them.
    ///
    /// # Errors
    ///
    /// The map cannot be written.
    pub fn clear(&mut self) -> Result<(), MapError> {
        let addresses: Vec<Addr> = self.0.keys().collect::<Result<_, _>>()?;
        addresses.iter().try_for_each(|address| self.remove(address))
    }

    fn remove(&mut self, address: &Addr) -> Result<(), MapError> {
        match self.0.remove(address) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => {
                Ok(())
            }
            removed => removed,
        }
    }
}

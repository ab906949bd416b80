//! Fills the map of this host's own addresses.

use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use tproxy_common::abi::{LpmKey, map};

use super::load::{Datapath, LoadError};

impl Datapath {
    /// Makes the map hold exactly these networks. Those that stay are not touched, so
    /// a reader never misses one.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn set_local(&mut self, networks: &[LpmKey]) -> Result<(), LoadError> {
        let name = map::LOCAL;
        let error = |source| LoadError::Map { name, source };
        let map = self.ebpf.map_mut(name).ok_or(LoadError::Missing(name))?;
        let mut trie: LpmTrie<&mut MapData, [u8; 16], u8> = LpmTrie::try_from(map).map_err(error)?;
        for network in networks {
            trie.insert(&Key::new(network.prefix_len, network.addr), 1, 0).map_err(error)?;
        }
        let stale: Vec<_> = trie
            .keys()
            .filter_map(Result::ok)
            .filter(|key| {
                !networks.iter().any(|held| (held.prefix_len, held.addr) == (key.prefix_len(), key.data()))
            })
            .collect();
        for key in stale {
            trie.remove(&key).map_err(error)?;
        }
        Ok(())
    }
}

//! Fills the maps that classification reads.

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, MapData};
use tproxy_common::abi::{LpmKey, map};

use super::load::{Datapath, LoadError};

/// Words of the port bitmap: 65,536 ports, 64 in each.
pub const PORT_WORDS: usize = 1024;

impl Datapath {
    /// Writes the port bitmap.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn set_ports(&mut self, words: &[u64; PORT_WORDS]) -> Result<(), LoadError> {
        let name = map::PORTS;
        let error = |source| LoadError::Map { name, source };
        let map = self.ebpf.map_mut(name).ok_or(LoadError::Missing(name))?;
        let mut ports: Array<&mut MapData, u64> = Array::try_from(map).map_err(error)?;
        for (index, word) in (0..).zip(words) {
            ports.set(index, word, 0).map_err(error)?;
        }
        Ok(())
    }

    /// Makes one of the prefix tables hold exactly these entries. Entries that
    /// stay are not touched, so a reader never misses one.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn set_prefixes(&mut self, name: &'static str, entries: &[(LpmKey, u8)]) -> Result<(), LoadError> {
        let error = |source| LoadError::Map { name, source };
        let map = self.ebpf.map_mut(name).ok_or(LoadError::Missing(name))?;
        let mut trie: LpmTrie<&mut MapData, [u8; 16], u8> = LpmTrie::try_from(map).map_err(error)?;
        for (key, value) in entries {
            trie.insert(&Key::new(key.prefix_len, key.addr), value, 0).map_err(error)?;
        }
        let stale: Vec<_> = trie
            .keys()
            .filter_map(Result::ok)
            .filter(|key| {
                !entries.iter().any(|(k, _)| (k.prefix_len, k.addr) == (key.prefix_len(), key.data()))
            })
            .collect();
        for key in stale {
            trie.remove(&key).map_err(error)?;
        }
        Ok(())
    }
}

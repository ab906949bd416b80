//! The maps, with BTF, so that `bpftool map dump` prints field names.
//! Their layouts are in `tproxy_common::abi`.

use aya_ebpf::btf_maps::{Array, LpmTrie, LruHashMap, PerCpuArray, SockMap};
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{
    Addr, DEFAULT_MAX_FLOWS, Endpoint, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair, MAX_LISTENERS,
};
use tproxy_common::counter::Counters;

/// One entry a flow; the least recently used goes when it is full.
#[btf_map]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow, { DEFAULT_MAX_FLOWS as usize }> = LruHashMap::new();

/// All counters, as one struct a CPU.
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

/// The listeners of all workers.
#[btf_map]
pub(crate) static LISTENERS: SockMap<{ MAX_LISTENERS as usize }> = SockMap::new();

/// This host's own addresses.
#[btf_map]
pub(crate) static LOCAL: LpmTrie<Addr, u8, 65_536> = LpmTrie::new();

/// Source prefixes.
#[btf_map]
pub(crate) static SOURCES: LpmTrie<Addr, u8, 65_536> = LpmTrie::new();

/// Destination prefixes.
#[btf_map]
pub(crate) static DESTINATIONS: LpmTrie<Addr, u8, 65_536> = LpmTrie::new();

/// One bit a destination port.
#[btf_map]
pub(crate) static PORTS: Array<u64, 1024> = Array::new();

/// Datagrams that arrive or leave in fragments.
#[btf_map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentInfo, 8192> = LruHashMap::new();

/// Who asked whom over UDP.
#[btf_map]
pub(crate) static HOST_PAIRS: LruHashMap<HostPair, u8, 16_384> = LruHashMap::new();

/// What NAT made of the proxy's packets: as many as there may be connections by default.
#[btf_map]
pub(crate) static NAT: LruHashMap<FlowKey, Endpoint, 65_536> = LruHashMap::new();

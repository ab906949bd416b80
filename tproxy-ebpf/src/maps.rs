//! The maps, with BTF, so that `bpftool map dump` prints field names.
//! Their layouts are in `tproxy_common::abi`.

use aya_ebpf::btf_maps::{Array, ArrayOfMaps, LpmTrie, LruHashMap, PerCpuArray, SockMap};
use aya_ebpf::macros::btf_map;
use tproxy_common::abi::{
    Addr, DEFAULT_MAX_FLOWS, Decided, Endpoint, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair,
    MAX_LISTENERS, Name,
};
use tproxy_common::counter::Counters;
use tproxy_common::policy::Line;

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

/// The rules, as an image that `tproxy_common::policy` reads. New ones take its place whole.
#[btf_map]
pub(crate) static POLICY: ArrayOfMaps<PolicyImage, 1> = ArrayOfMaps::new();

/// An image. Userspace makes the map, and says how many lines there are.
pub(crate) type PolicyImage = Array<Line, 1>;

/// Datagrams that arrive or leave in fragments.
#[btf_map]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FragmentInfo, 8192> = LruHashMap::new();

/// Who asked whom over UDP.
#[btf_map]
pub(crate) static HOST_PAIRS: LruHashMap<HostPair, u8, 16_384> = LruHashMap::new();

/// What NAT made of the proxy's packets: as many as there may be connections by default.
#[btf_map]
pub(crate) static NAT: LruHashMap<FlowKey, Endpoint, 65_536> = LruHashMap::new();

/// What addresses are called. Userspace writes it.
#[btf_map]
pub(crate) static NAMES: LruHashMap<Addr, Name, 65_536> = LruHashMap::new();

/// What userspace has decided of flows by their names.
#[btf_map]
pub(crate) static DECIDED: LruHashMap<FlowKey, Decided, 65_536> = LruHashMap::new();

//! What the programs read from their maps, and what they have noted there.

use std::io::ErrorKind;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use tproxy_common::abi::{
    Addr, Decided, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair, LpmKey, Name, map,
};
use tproxy_common::counter::Counters;
use tproxy_common::policy::Line;
use tproxy_common::wire::Packet;
use tproxy_user::config::Scope;
use tproxy_user::datapath::policy::Image;
use tproxy_user::policy::compile::{RuleSet, compile};

use super::Kernel;
use crate::packets::mapped;

impl Kernel {
    /// Counters that are not zero.
    pub(crate) fn counted(&mut self) -> Vec<(&'static str, u64)> {
        let all = self.counters().entries();
        all.into_iter().filter(|(_, count, _)| *count > 0).map(|(name, count, _)| (name, count)).collect()
    }

    pub(super) fn counters(&mut self) -> Counters {
        let map = self.datapath.ebpf().map(map::COUNTERS).expect("counters");
        let array: PerCpuArray<&MapData, Counters> = PerCpuArray::try_from(map).expect("counters");
        let mut sum = Counters::default();
        for of_cpu in array.get(&0, 0).expect("one entry").iter() {
            sum.add(of_cpu);
        }
        sum
    }

    /// The one flow of the flow table.
    pub(crate) fn only_flow(&mut self) -> (FlowKey, Flow) {
        let flows = self.hash::<FlowKey, Flow>(map::FLOWS);
        let all: Vec<_> = flows.iter().collect::<Result<_, _>>().expect("readable");
        assert_eq!(all.len(), 1, "{all:?}");
        all[0]
    }

    /// An entry of the flow table. To walk through the whole table takes a
    /// while, and a corpus is long.
    pub(crate) fn flow(&mut self, key: &FlowKey) -> Option<Flow> {
        self.hash(map::FLOWS).get(key, 0).ok()
    }

    /// Forgets what the programs have noted of a packet.
    pub(crate) fn forget(&mut self, packet: &Packet) {
        let Packet { source, destination, protocol, source_port, destination_port, .. } = *packet;
        let flow = FlowKey::up(protocol, source, destination, source_port, destination_port);
        self.remove::<_, Flow>(map::FLOWS, &flow);
        let fragment = FragmentKey { source, destination, id: packet.fragment_id, protocol, pad: [0; 3] };
        self.remove::<_, FragmentInfo>(map::FRAGMENTS, &fragment);
        self.remove::<_, u8>(map::HOST_PAIRS, &HostPair { client: source, destination });
    }

    fn remove<K: Pod, V: Pod>(&mut self, name: &str, key: &K) {
        match self.hash::<K, V>(name).remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {}
            Err(error) => panic!("{name}: {error}"),
        }
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        match self.datapath.ebpf().map_mut(name) {
            Some(map @ Map::LruHashMap(_)) => HashMap::try_from(map).expect("keys and values as declared"),
            _ => panic!("{name} is no LRU hash"),
        }
    }

    /// What an address is called: for so many seconds from now on, or until so many ago.
    pub(crate) fn set_name(&mut self, addr: Addr, set: Option<u32>, seconds: i64) {
        let Some(set) = set else { return self.remove::<_, Name>(map::NAMES, &addr) };
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a clock");
        let expires = u64::try_from((now.tv_sec() + seconds) * 1_000_000_000).expect("after the start");
        let name = Name { set, pad: 0, expires };
        self.hash::<Addr, Name>(map::NAMES).insert(addr, name, 0).expect("room");
    }

    /// What the proxy has decided of a flow.
    pub(crate) fn set_decided(&mut self, key: &FlowKey, decided: Decided) {
        self.hash::<FlowKey, Decided>(map::DECIDED).insert(key, decided, 0).expect("room");
    }

    pub(crate) fn add_local(&mut self, v4: [u8; 4]) {
        let key = LpmKey { prefix_len: 128, addr: mapped(v4) };
        self.datapath.set_local(&[key]).expect("a prefix");
    }

    pub(crate) fn select(&mut self, scope: &Scope) {
        self.set_rules(&scope.rules());
    }

    pub(crate) fn set_rules(&mut self, rules: &RuleSet) {
        self.set_image(&compile(rules).expect("rules that fit"));
    }

    /// Rules that are compiled.
    pub(crate) fn set_image(&mut self, image: &[Line]) {
        let image = Image::new(self.datapath.features(), image).expect("memory");
        self.datapath.set_policy(image).expect("rules");
    }
}

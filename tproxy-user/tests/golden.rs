//! Golden packets: the programs run on them in the kernel, by
//! `BPF_PROG_TEST_RUN`, and the counters tell what was decided.
//!
//! Needs root (CAP_BPF, CAP_NET_ADMIN); says so and fails otherwise.

use aya::maps::{Array, LpmTrie, MapData, PerCpuArray, lpm_trie::Key};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use tproxy_common::abi::{Settings, map, mapped, program};
use tproxy_common::counter::Counters;
use tproxy_user::datapath::features::{Features, Version};
use tproxy_user::datapath::load::Datapath;

#[test]
fn loads() {
    let features = Features::of(Version::running().expect("version")).expect("features");
    for own in [0, 1] {
        let settings = Settings { abi_version: 1, workers: 1, tcp: 1, udp: 1, v4: 1, v6: 1, own_traffic: own, ..Settings::default() };
        Datapath::load_unpinned(&settings, features).unwrap_or_else(|e| panic!("{e:?}"));
    }
}

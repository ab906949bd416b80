//! The programs, loaded in a network namespace of the test's own.

use std::fs::File;
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{CgroupSock, ProgramError, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions};
use nix::errno::Errno;
use tproxy_common::abi::{
    ABI_VERSION, Addr, Decided, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair, ListenerKind, LpmKey,
    Name, Settings, listener_index, map, program,
};
use tproxy_common::counter::Counters;
use tproxy_common::policy::Line;
use tproxy_common::wire::Packet;
use tproxy_user::config::Kernel as Version;
use tproxy_user::config::Scope;
use tproxy_user::datapath::features::Features;
use tproxy_user::datapath::group::BESIDE_OTHERS;
use tproxy_user::datapath::load::Datapath;
use tproxy_user::datapath::policy::Image;
use tproxy_user::policy::compile::{RuleSet, compile};
use tproxy_user::privilege::running_kernel;

use crate::packets::mapped;
use crate::skip::needs;

/// On to the next program, or the stack.
pub(crate) const PASS: i32 = -1;
/// Accepted, steered.
pub(crate) const STEERED: i32 = 0;
/// On its way to another interface (`TC_ACT_REDIRECT`).
pub(crate) const REDIRECTED: i32 = 7;
/// Dropped.
pub(crate) const DROP: i32 = 2;

/// What a program is told of a packet besides its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Context {
    pub(crate) mark: u32,
    /// 0 for a packet that this host sends; another since Linux 5.16.
    pub(crate) ingress_ifindex: u32,
    /// Segments of a merged packet, 0 where nobody has counted.
    pub(crate) gso_segs: u32,
    /// Payload bytes of each.
    pub(crate) gso_size: u32,
}

impl Context {
    /// `struct __sk_buff`.
    const LEN: usize = 192;
    const MARK: usize = 8;
    const INGRESS_IFINDEX: usize = 36;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        for (at, value) in [
            (Self::MARK, self.mark),
            (Self::INGRESS_IFINDEX, self.ingress_ifindex),
            (Self::GSO_SEGS, self.gso_segs),
            (Self::GSO_SIZE, self.gso_size),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    fn mark_of(bytes: &[u8; Self::LEN]) -> u32 {
        u32::from_ne_bytes(std::array::from_fn(|i| bytes[Self::MARK + i]))
    }
}

fn errno(error: &ProgramError) -> Errno {
    let system = match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    system.map_or_else(|| panic!("{error}"), Errno::from_raw)
}

/// What a program did with a packet.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) action: i32,
    pub(crate) mark: u32,
    pub(crate) packet: Vec<u8>,
    /// Counters that rose, and by how much.
    pub(crate) counters: Vec<(&'static str, u64)>,
}

impl Outcome {
    /// The counter that says what was decided.
    pub(crate) fn only_counter(&self) -> &'static str {
        let decided: Vec<_> =
            self.counters.iter().map(|(name, _)| *name).filter(|name| *name != "flows_created").collect();
        assert_eq!(decided.len(), 1, "one outcome a packet: {:?}", self.counters);
        decided[0]
    }

    #[track_caller]
    pub(crate) fn expect(&self, action: i32, counter: &str) {
        assert_eq!((self.action, self.only_counter()), (action, counter));
    }
}

/// The programs, each loaded when it first runs, and listeners where they were asked for.
pub(crate) struct Kernel {
    datapath: Datapath,
    _sockets: Vec<Box<dyn AsRawFd>>,
}

fn enter_namespace() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .expect("cannot make a network namespace: these tests need root");
    let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
    assert!(up.is_ok_and(|status| status.success()), "ip link set lo up failed");
}

/// The default build or the debugging build, its maps made, every flow captured, no program loaded.
pub(crate) fn load(settings: &Settings, log: bool) -> (Datapath, Features) {
    let features =
        Features::of(running_kernel().expect("a kernel version")).expect("a kernel that can steer");
    let mut datapath = Datapath::maps_only(settings, features, log).unwrap_or_else(|error| panic!("{error}"));
    let rules = compile(&Scope::default().rules()).expect("few rules");
    datapath.set_policy(Image::new(features, &rules).expect("memory")).expect("rules");
    (datapath, features)
}

/// One worker.
pub(crate) fn usual() -> Settings {
    Settings {
        abi_version: ABI_VERSION,
        mark_value: 1,
        mark_mask: 1,
        own_mark: 2,
        workers: 1,
        lo_ifindex: 1,
        fail_open: 1,
        sk_lookup: 1,
        link_headers: 1,
        udp_timeout: 180_000_000_000,
        ..Settings::default()
    }
}

/// Runs one packet through the capture program with the usual settings.
pub(crate) fn capture(packet: &[u8]) -> Outcome {
    Kernel::new(&usual()).run(program::CAPTURE, packet)
}

fn bind() -> [(ListenerKind, Box<dyn AsRawFd>, u16); 5] {
    let tcp = |kind, address| {
        let socket = TcpListener::bind((address, 0)).expect("a port");
        let port = socket.local_addr().expect("bound").port();
        (kind, Box::new(socket) as Box<dyn AsRawFd>, port)
    };
    let udp = |kind, address| {
        let socket = UdpSocket::bind((address, 0)).expect("a port");
        let port = socket.local_addr().expect("bound").port();
        (kind, Box::new(socket) as Box<dyn AsRawFd>, port)
    };
    [
        tcp(ListenerKind::Tcp4, "127.0.0.1"),
        tcp(ListenerKind::Tcp6, "::1"),
        udp(ListenerKind::Udp4, "127.0.0.1"),
        udp(ListenerKind::Udp6, "::1"),
        udp(ListenerKind::Udp4Df, "127.0.0.1"),
    ]
}

impl Kernel {
    /// With one worker's listeners.
    pub(crate) fn new(settings: &Settings) -> Self {
        enter_namespace();
        let (mut datapath, _) = load(settings, false);
        let mut sockets = Vec::new();
        for (kind, socket, _) in bind() {
            datapath.set_listener(kind, 0, &socket.as_raw_fd()).expect("a listener");
            sockets.push(socket);
        }
        Self { datapath, _sockets: sockets }
    }

    /// As after the proxy has gone.
    pub(crate) fn without_listeners(settings: &Settings) -> Self {
        enter_namespace();
        Self { datapath: load(settings, false).0, _sockets: Vec::new() }
    }

    /// The proxy goes.
    pub(crate) fn remove_listeners(&mut self) {
        for kind in ListenerKind::ALL {
            self.remove_listener(kind);
        }
    }

    /// The listener of one kind goes.
    pub(crate) fn remove_listener(&mut self, kind: ListenerKind) {
        self.datapath.clear_listeners(kind, 1).expect("listeners");
    }

    /// With listeners that are not in the socket map.
    pub(crate) fn by_tuple() -> Self {
        enter_namespace();
        let mut settings = Settings { listener_by_tuple: 1, ..usual() };
        settings.listen_v4 = [127, 0, 0, 1];
        settings.listen_v6[15] = 1;
        let mut sockets = Vec::new();
        for (kind, socket, port) in bind() {
            settings.listener_ports.0[listener_index(kind, 0) as usize] = port;
            sockets.push(socket);
        }
        Self { datapath: load(&settings, false).0, _sockets: sockets }
    }

    /// Runs a program on a packet of which nothing else is known.
    pub(crate) fn run(&mut self, program: &str, packet: &[u8]) -> Outcome {
        self.run_with(program, packet, Context::default())
    }

    /// Runs a program on a packet with a mark.
    pub(crate) fn run_marked(&mut self, program: &str, packet: &[u8], mark: u32) -> Outcome {
        self.run_with(program, packet, Context { mark, ..Context::default() })
    }

    /// Runs a program on a packet that is forwarded: it has arrived on an interface.
    pub(crate) fn run_forwarded(&mut self, program: &str, packet: &[u8]) -> Outcome {
        self.run_with(program, packet, Context { ingress_ifindex: 1, ..Context::default() })
    }

    /// Runs a program on a packet; skips the test where the kernel cannot.
    pub(crate) fn run_with(&mut self, program: &str, packet: &[u8], context: Context) -> Outcome {
        match self.try_run(program, packet, context) {
            Ok(outcome) => outcome,
            Err(Errno::EINVAL) if context.ingress_ifindex != 0 => {
                needs("ingress_ifindex in a test run", Version { major: 5, minor: 16 })
            }
            Err(error) => panic!("the kernel runs {program}: {error}"),
        }
    }

    /// Runs a program on a packet, if the kernel takes it: it may refuse one
    /// without a whole IP header, or longer than a page.
    pub(crate) fn try_run(
        &mut self,
        program: &str,
        packet: &[u8],
        context: Context,
    ) -> Result<Outcome, Errno> {
        let ctx = context.to_bytes();
        let mut ctx_out = [0u8; Context::LEN];
        let mut packet_out = vec![0u8; packet.len() + 64];
        let before = self.counters();
        let result = self
            .loaded(program)
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut packet_out),
                ctx_in: Some(&ctx),
                ctx_out: Some(&mut ctx_out),
                ..TestRunOptions::default()
            })
            .map_err(|error| errno(&error))?;
        packet_out.truncate(result.data_size_out as usize);
        let after = self.counters();
        let counters = before
            .entries()
            .iter()
            .zip(after.entries())
            .filter(|(old, new)| old.1 != new.1)
            .map(|(old, new)| (new.0, new.1 - old.1))
            .collect();
        Ok(Outcome {
            action: i32::from_ne_bytes(result.return_value.to_ne_bytes()),
            mark: Context::mark_of(&ctx_out),
            packet: packet_out,
            counters,
        })
    }

    /// Attaches a program to an interface.
    pub(crate) fn attach(&mut self, program: &str, interface: &str, side: TcAttachType) {
        // In a new namespace there is no qdisc yet; tcx does not need one.
        qdisc_add_clsact(interface).expect("a qdisc");
        let classifier = self.loaded(program);
        classifier.attach(interface, side).expect("attached");
    }

    /// Notes the groups of sockets that are made from here on.
    pub(crate) fn note_groups(&mut self, root: &Path) {
        if !self.datapath.features().socket_notes() {
            needs("notes at sockets", Version { major: 5, minor: 9 });
        }
        let group = self.datapath.ebpf().program_mut(program::GROUP).expect("a program");
        let group: &mut CgroupSock = group.try_into().expect("a program of control groups");
        group.load().unwrap_or_else(|error| panic!("{error}"));
        let root = File::open(root).expect("a control group");
        group.attach(root, BESIDE_OTHERS).expect("attached");
    }

    /// Counters that are not zero.
    pub(crate) fn counted(&mut self) -> Vec<(&'static str, u64)> {
        let all = self.counters().entries();
        all.into_iter().filter(|(_, count, _)| *count > 0).map(|(name, count, _)| (name, count)).collect()
    }

    /// A program, loaded.
    fn loaded(&mut self, program: &str) -> &mut SchedClassifier {
        let classifier: &mut SchedClassifier =
            self.datapath.ebpf().program_mut(program).expect("a program").try_into().expect("a classifier");
        if classifier.fd().is_err() {
            classifier.load().unwrap_or_else(|error| panic!("{error}"));
        }
        classifier
    }

    /// The same program, for another thread.
    pub(crate) fn again(&mut self, program: &str) -> SchedClassifier {
        let thread = std::thread::current().id();
        let path = format!("/sys/fs/bpf/tproxy-golden-{}-{thread:?}", std::process::id());
        self.loaded(program).pin(&path).expect("pinned");
        let again = SchedClassifier::from_pin(&path);
        std::fs::remove_file(&path).expect("unpinned");
        again.expect("the same program")
    }

    fn counters(&mut self) -> Counters {
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

    /// How long a program takes over a packet, by the kernel's clock: the mean of so many runs.
    #[allow(dead_code, reason = "for the benchmarks")]
    pub(crate) fn time(&mut self, program: &str, packet: &[u8], repeat: u32) -> Duration {
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        self.loaded(program).test_run(options).expect("a run").duration
    }
}

//! The programs, loaded in a network namespace of the test's own.

use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;

use aya::maps::{HashMap, Map, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use tproxy_common::abi::{
    ABI_VERSION, Flow, FlowKey, ListenerKind, LpmKey, Settings, listener_index, map, program,
};
use tproxy_common::counter::Counters;
use tproxy_user::datapath::features::Features;
use tproxy_user::datapath::load::Datapath;
use tproxy_user::datapath::policy::PORT_WORDS;
use tproxy_user::privilege::running_kernel;

use crate::packets::mapped;

/// On to the next program, or the stack.
pub(crate) const PASS: i32 = -1;
/// Accepted, steered.
pub(crate) const STEERED: i32 = 0;
/// Dropped.
pub(crate) const DROP: i32 = 2;

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

/// The default build or the debugging build, its maps made, no program loaded.
pub(crate) fn load(settings: &Settings, log: bool) -> (Datapath, Features) {
    let features =
        Features::of(running_kernel().expect("a kernel version")).expect("a kernel that can steer");
    let datapath = Datapath::maps_only(settings, features, log).unwrap_or_else(|error| panic!("{error}"));
    (datapath, features)
}

/// Everything captured by one worker.
pub(crate) fn usual() -> Settings {
    Settings {
        abi_version: ABI_VERSION,
        mark_value: 1,
        mark_mask: 1,
        own_mark: 2,
        workers: 1,
        lo_ifindex: 1,
        tcp: 1,
        udp: 1,
        v4: 1,
        v6: 1,
        fail_open: 1,
        any_port: 1,
        any_source: 1,
        any_destination: 1,
        sk_lookup: 1,
        ..Settings::default()
    }
}

/// Runs one packet through the capture program with the usual settings.
pub(crate) fn capture(packet: &[u8]) -> Outcome {
    Kernel::new(&usual()).run(program::CAPTURE, packet)
}

fn bind() -> [(ListenerKind, Box<dyn AsRawFd>, u16); 4] {
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
            self.datapath.clear_listeners(kind, 1).expect("listeners");
        }
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

    /// Runs a program on a packet without a mark.
    pub(crate) fn run(&mut self, program: &str, packet: &[u8]) -> Outcome {
        self.run_marked(program, packet, 0)
    }

    /// Runs a program on a packet with a mark. `ingress_ifindex` is 0, as of a
    /// packet that this host sends: Linux 5.10 takes no other.
    pub(crate) fn run_marked(&mut self, program: &str, packet: &[u8], mark: u32) -> Outcome {
        self.run_with(program, packet, mark, 0)
    }

    /// Runs a program on a packet that is forwarded: it has arrived on an interface.
    pub(crate) fn run_forwarded(&mut self, program: &str, packet: &[u8]) -> Outcome {
        self.run_with(program, packet, 0, 1)
    }

    fn run_with(&mut self, program: &str, packet: &[u8], mark: u32, ingress_ifindex: u32) -> Outcome {
        // `struct __sk_buff`: the mark is the third word, ingress_ifindex the tenth.
        const LEN: usize = 192;
        const MARK: usize = 8;
        const INGRESS_IFINDEX: usize = 36;
        let mut ctx = [0u8; LEN];
        ctx[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        ctx[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&ingress_ifindex.to_ne_bytes());
        let mut ctx_out = [0u8; LEN];
        let mut packet_out = vec![0u8; packet.len() + 64];
        let before = self.counters();
        let classifier: &mut SchedClassifier =
            self.datapath.ebpf().program_mut(program).expect("a program").try_into().expect("a classifier");
        if classifier.fd().is_err() {
            classifier.load().unwrap_or_else(|error| panic!("{error}"));
        }
        let result = classifier
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut packet_out),
                ctx_in: Some(&ctx),
                ctx_out: Some(&mut ctx_out),
                ..TestRunOptions::default()
            })
            .expect("the kernel runs the program");
        packet_out.truncate(result.data_size_out as usize);
        let after = self.counters();
        let counters = before
            .entries()
            .iter()
            .zip(after.entries())
            .filter(|(old, new)| old.1 != new.1)
            .map(|(old, new)| (new.0, new.1 - old.1))
            .collect();
        Outcome {
            action: i32::from_ne_bytes(result.return_value.to_ne_bytes()),
            mark: u32::from_ne_bytes([
                ctx_out[MARK],
                ctx_out[MARK + 1],
                ctx_out[MARK + 2],
                ctx_out[MARK + 3],
            ]),
            packet: packet_out,
            counters,
        }
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
        let map = self.datapath.ebpf().map(map::FLOWS).expect("flows");
        let flows: HashMap<&MapData, FlowKey, Flow> = match map {
            map @ Map::LruHashMap(_) => HashMap::try_from(map).expect("flows"),
            _ => panic!("not an LRU hash"),
        };
        let all: Vec<_> = flows.iter().collect::<Result<_, _>>().expect("readable");
        assert_eq!(all.len(), 1, "{all:?}");
        all[0]
    }

    pub(crate) fn add_local(&mut self, v4: [u8; 4]) {
        let key = LpmKey { prefix_len: 128, addr: mapped(v4) };
        self.datapath.set_prefixes(map::LOCAL, &[(key, 1)]).expect("a prefix");
    }

    pub(crate) fn set_ports(&mut self, ports: &[u16]) {
        let mut words = [0u64; PORT_WORDS];
        for port in ports {
            words[usize::from(port / 64)] |= 1 << (port % 64);
        }
        self.datapath.set_ports(&words).expect("ports");
    }
}

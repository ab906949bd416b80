//! The programs, loaded in a network namespace of the test's own.

mod maps;
mod run;

pub(crate) use run::{Context, Outcome};

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{CgroupSock, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions};
use nix::errno::Errno;
use tproxy_common::abi::{ABI_VERSION, ListenerKind, Settings, listener_index, program};
use tproxy_user::config::Kernel as Version;
use tproxy_user::config::Scope;
use tproxy_user::datapath::features::Features;
use tproxy_user::datapath::group::BESIDE_OTHERS;
use tproxy_user::datapath::load::Datapath;
use tproxy_user::datapath::policy::Image;
use tproxy_user::policy::compile::compile;
use tproxy_user::privilege::running_kernel;

use crate::skip::needs;
use run::errno;

/// On to the next program, or the stack.
pub(crate) const PASS: i32 = -1;
/// Accepted, steered.
pub(crate) const STEERED: i32 = 0;
/// On its way to another interface (`TC_ACT_REDIRECT`).
pub(crate) const REDIRECTED: i32 = 7;
/// Dropped.
pub(crate) const DROP: i32 = 2;

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

    /// How long a program takes over a packet, by the kernel's clock: the mean of so many runs.
    #[allow(dead_code, reason = "for the benchmarks")]
    pub(crate) fn time(&mut self, program: &str, packet: &[u8], repeat: u32) -> Duration {
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        self.loaded(program).test_run(options).expect("a run").duration
    }
}

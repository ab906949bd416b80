//! Client, router and server in network namespaces, with iptables TPROXY rules on the
//! router and the relay behind them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use tproxy_user::config::upstream::{SendProxy, Upstream};
use tproxy_user::config::{
    Attach, Capture, Config, Fail, Handshake, Limits, Log, Mark, Scope, SourceMode, Steer, Steering, Timeouts,
};
use tproxy_user::listener;
use tproxy_user::relay::{Routes, Shared};
use tproxy_user::rulebook::Rulebook;
use tproxy_user::shutdown::{self, Controller};
use tproxy_user::stats::{Snapshot, Stats};
use tproxy_user::worker::{self, WorkerHandle};

/// The port of the listeners.
pub(crate) const ON_PORT: u16 = 15001;

/// What the names of all namespaces of these labs begin with.
const PREFIX: &str = "rl-";

/// Both families, for tests that hold for either.
pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    fn pick(self, v4: &str, v6: &str) -> IpAddr {
        if self == Self::V4 { v4 } else { v6 }.parse().expect("an address")
    }

    pub(crate) fn client(self) -> IpAddr {
        self.pick("10.7.1.2", "fd07:1::2")
    }

    pub(crate) fn server(self) -> IpAddr {
        self.pick("10.7.2.2", "fd07:2::2")
    }

    /// Another address of the server.
    pub(crate) fn server2(self) -> IpAddr {
        self.pick("10.7.2.3", "fd07:2::3")
    }

    /// The router, as the client sees it.
    pub(crate) fn router(self) -> IpAddr {
        self.pick("10.7.1.1", "fd07:1::1")
    }

    /// The router, as the server sees it.
    pub(crate) fn uplink(self) -> IpAddr {
        self.pick("10.7.2.1", "fd07:2::1")
    }

    pub(crate) fn any(self) -> SocketAddr {
        (self.pick("0.0.0.0", "::"), 0).into()
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Host {
    Client,
    Router,
    Server,
}

/// The three namespaces; removed when dropped.
pub(crate) struct Lab {
    name: String,
}

impl Lab {
    /// The lab that another process made and will remove.
    pub(crate) fn borrowed(name: String) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self { name })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `name` must be unlike that of every other test that may run at the time.
    pub(crate) fn new(name: &str) -> Self {
        remove_abandoned();
        let lab = Self { name: format!("{PREFIX}{name}-{}", std::process::id()) };
        let [c, r, s] = [Host::Client, Host::Router, Host::Server].map(|host| lab.netns(host));
        for ns in [&c, &r, &s] {
            sh(&format!("ip netns add {ns} && ip -n {ns} link set lo up"));
        }
        sh(&format!(
            "ip link add c0 netns {c} type veth peer name r0 netns {r}
             ip link add s0 netns {s} type veth peer name r1 netns {r}
             ip -n {c} addr add 10.7.1.2/24 dev c0
             ip -n {c} addr add fd07:1::2/64 dev c0 nodad
             ip -n {r} addr add 10.7.1.1/24 dev r0
             ip -n {r} addr add fd07:1::1/64 dev r0 nodad
             ip -n {r} addr add 10.7.2.1/24 dev r1
             ip -n {r} addr add fd07:2::1/64 dev r1 nodad
             for a in 2 3; do
               ip -n {s} addr add 10.7.2.$a/24 dev s0
               ip -n {s} addr add fd07:2::$a/64 dev s0 nodad
             done
             ip -n {c} link set c0 up; ip -n {r} link set r0 up
             ip -n {s} link set s0 up; ip -n {r} link set r1 up
             ip -n {c} route add default via 10.7.1.1
             ip -n {c} -6 route add default via fd07:1::1
             ip -n {s} route add default via 10.7.2.1
             ip -n {s} -6 route add default via fd07:2::1
             ip netns exec {r} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             for v in -4 -6; do
               ip -n {r} $v rule add fwmark 1/1 lookup 100
               ip -n {r} $v route add local default dev lo table 100
             done
             for t in iptables ip6tables; do
               t=\"ip netns exec {r} $t -w -t mangle -A PREROUTING\"
               $t -m socket --transparent -j MARK --set-mark 1
               $t -m socket --transparent -j ACCEPT
               for p in tcp udp; do
                 $t -i r0 -p $p -m addrtype ! --dst-type LOCAL -j TPROXY --on-port {ON_PORT} --tproxy-mark 1/1
               done
             done
             # The kernel brings IPv6 up a moment after the link.
             for to in 10.7.2.2 fd07:2::2; do
               tries=0
               until ip netns exec {c} ping -q -c 1 -W 0.2 $to >/dev/null; do
                 tries=$((tries + 1)); [ $tries -lt 50 ]
               done
             done"
        ));
        lab
    }

    pub(crate) fn netns(&self, host: Host) -> String {
        let host = match host {
            Host::Client => "c",
            Host::Router => "r",
            Host::Server => "s",
        };
        format!("{}-{host}", self.name)
    }

    /// Runs `job` in a thread that lives in the namespace of `host`.
    pub(crate) fn on<T: Send>(&self, host: Host, job: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter(host);
                job()
            });
            thread.join().expect("the job did not panic")
        })
    }

    fn enter(&self, host: Host) {
        let path = format!("/run/netns/{}", self.netns(host));
        let file = File::open(&path).expect(&path);
        setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
    }

    /// Starts the relay on the router.
    pub(crate) fn proxy(&self, config: Config) -> Proxy {
        self.on(Host::Router, move || Proxy::start(&config))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in [Host::Client, Host::Router, Host::Server] {
            sh(&format!("ip netns del {}", self.netns(host)));
        }
    }
}

/// Removes what interrupted runs have left: namespaces whose process is gone.
fn remove_abandoned() {
    // One at a time: what another removes meanwhile could not be removed again.
    static REMOVING: Mutex<()> = Mutex::new(());
    let _removing = REMOVING.lock();
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let of_process = name.strip_prefix(PREFIX).and_then(|rest| rest.rsplit('-').nth(1));
        if of_process.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            sh(&format!("ip netns del {name}"));
        }
    }
}

#[test]
#[ignore = "needs root"]
fn what_an_interrupted_run_has_left_is_removed() {
    let mut gone = Command::new("true").spawn().expect("true runs");
    gone.wait().expect("it ends");
    let [left, mine] = [gone.id(), std::process::id()].map(|pid| format!("{PREFIX}left-{pid}-c"));
    sh(&format!("ip netns add {left} && ip netns add {mine}"));
    remove_abandoned();
    let [left, mine_is_there] = [&left, &mine].map(|name| Path::new("/run/netns").join(name).exists());
    sh(&format!("ip netns del {mine}"));
    assert!(!left && mine_is_there);
}

/// Binds a socket, also to an address that was freed just now: a program that another test starts
/// holds all our sockets from its fork to its exec.
pub(crate) fn bound<T>(bind: impl Fn() -> io::Result<T>) -> T {
    const FORK_TO_EXEC: Duration = Duration::from_secs(1);
    let end = Instant::now() + FORK_TO_EXEC;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return outcome.expect("an address that is free"),
        }
    }
}

#[test]
fn an_address_can_be_bound_again_although_a_child_still_holds_it() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let address = listener.local_addr().expect("bound");
    let of_a_child = listener.try_clone().expect("a duplicate");
    drop(listener);
    let child = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(of_a_child);
    });
    bound(|| TcpListener::bind(address));
    child.join().expect("no panic");
}

pub(crate) fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().expect("sh runs");
    assert!(status.success(), "failed: {script}");
}

/// The relay; stopped when dropped.
pub(crate) struct Proxy {
    pub(crate) controller: Controller,
    pub(crate) workers: Vec<WorkerHandle>,
    stats: Arc<Stats>,
}

impl Proxy {
    fn start(config: &Config) -> Self {
        let listeners = listener::bind(config).expect("listeners");
        let stats = Arc::new(Stats::new(listeners.len()));
        let shared =
            Shared::new(config, &listeners, Arc::clone(&stats), Routes::by_default(Rulebook::default()));
        let (controller, shutdown) = shutdown::channel();
        let workers = listeners
            .into_iter()
            .enumerate()
            .map(|(index, listeners)| {
                worker::spawn(index, listeners, None, &shared, shutdown.clone()).expect("a worker")
            })
            .collect();
        Self { controller, workers, stats }
    }

    pub(crate) fn stats(&self) -> Snapshot {
        self.stats.snapshot()
    }

    /// Waits for a state of the counters.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&Snapshot) -> bool) {
        let end = Instant::now() + Duration::from_secs(5);
        while !condition(&self.stats()) {
            assert!(Instant::now() < end, "{what} did not come: {:#?}", self.stats());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until every worker has ended by itself.
    pub(crate) fn join(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        for worker in self.workers.drain(..) {
            runtime.block_on(worker.finished()).expect("no panic");
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.controller.stop();
        self.join();
    }
}

/// Bytes that show where some are missing.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

/// A usual configuration, with two workers.
pub(crate) fn config(source: SourceMode) -> Config {
    let seconds = Duration::from_secs;
    Config {
        capture: Capture {
            interfaces: Vec::new(),
            scope: Scope::default(),
            rules: Arc::default(),
            own_traffic: false,
            fail: Fail::Open,
        },
        steering: Steering {
            by: Steer::None,
            handshake: Handshake::Eager,
            attach: Attach::Auto,
            mark: Mark { value: 1, mask: 1 },
            own_mark: 2,
            table: 100,
            rule_priority: 100,
            on_ip4: [0; 4].into(),
            on_ip6: [0; 16].into(),
            on_port: ON_PORT,
            bpf_log: false,
        },
        source,
        upstream: Upstream::Direct,
        send_proxy: SendProxy::Off,
        timeouts: Timeouts {
            connect: seconds(5),
            tcp_idle: seconds(60),
            half_close: seconds(60),
            udp: seconds(60),
            udp_unreplied: seconds(30),
            drain: seconds(5),
        },
        limits: Limits { connections: 10_000, per_client: 10_000, udp_flows: 1000, flow_table: 1000 },
        workers: 2,
        pin: "/nonexistent".into(),
        log: Log::default(),
        access_log: tproxy_user::config::AccessLog::Off,
        files: Vec::new(),
        watch: false,
        assume_kernel: None,
    }
}

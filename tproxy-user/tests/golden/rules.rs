//! Random rules: the kernel decides as userspace does, and both as the rules read.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::strategy::{Strategy, ValueTree as _};
use proptest::test_runner::TestRunner;
use tproxy_common::abi::{Settings, TCP, UDP, Verdict, program};
use tproxy_common::classify::is_special;
use tproxy_common::policy::{Known, MAX_RULES};
use tproxy_user::policy::compile::{Condition, Rule, RuleSet, Selector, compile};
use tproxy_user::policy::facts::{Memory, Packet};
use tproxy_user::policy::ranges::Ranges;

use crate::hierarchy::Hierarchy;
use crate::kernel::{Context, Kernel, PASS, REDIRECTED, STEERED, usual};
use crate::packets as p;
use crate::predict::parse;
use model::{naive, packet, rule_set};

#[path = "../../src/policy/model.rs"]
mod model;

tests![kernel_and_userspace_and_the_naive_reading_agree, the_control_group_of_a_socket_is_known_at_its_depth,];

/// Rule sets, and for a share of the tests (in a guest of the kernel matrix); and packets for each.
const SETS: (usize, usize) = (250, 50);
const PACKETS: usize = 40;

/// The interface of a test run: `lo` of a new network namespace.
const IFINDEX: u32 = 1;

/// With the programs for the host's own traffic.
pub(crate) fn with_own_traffic() -> Settings {
    Settings { own_traffic: 1, ..usual() }
}

fn kernel_and_userspace_and_the_naive_reading_agree() {
    let mut kernel = Kernel::new(&with_own_traffic());
    let mut runner = TestRunner::default();
    let (mut compared, mut proxied) = (0, 0);
    // See `xtask::lab::selection`; on a kernel that is named there is none, and everything runs.
    let count = if std::env::var_os("TPROXY_LAB_SELECTION").is_some() { SETS.1 } else { SETS.0 };
    for number in 0..count {
        // Few rules that match much, or many that match little.
        let sets =
            if number % 10 == 0 { rule_set(MAX_RULES, 4..=7).boxed() } else { rule_set(12, 0..=4).boxed() };
        let mut set = new(&mut runner, &sets);
        // Every third set for the host's own traffic.
        let own = number % 3 == 0;
        if own {
            // Who runs the test is in a control group that is not known here.
            for rule in &mut set.rules {
                rule.conditions.retain(|one| !matches!(one.selector, Selector::Cgroup { .. }));
            }
        }
        let image = Memory(compile(&set).expect("as many rules as there may be"));
        kernel.set_rules(&set);
        for _ in 0..PACKETS {
            let packets = packet()
                .prop_map(|seen| if own { own_frame(seen) } else { as_frame(seen) })
                .prop_filter("special", |seen| {
                    !is_special(&seen.source, seen.family) && !is_special(&seen.destination, seen.family)
                });
            let seen = new(&mut runner, &packets);
            let frame = p::opening(&seen);
            let expected = image.decide(&seen);
            assert_eq!(expected, naive(&set, &seen), "userspace and the naive reading: {seen:?}\n{set:?}");
            let captured = expected.0 == Verdict::Proxy as u32;
            assert_eq!(captures(&mut kernel, &seen, own), captured, "the kernel: {seen:?}\n{set:?}");
            kernel.forget(&parse(&frame).expect("a packet"));
            compared += 1;
            proxied += usize::from(captured);
        }
    }
    // Of both kinds many.
    assert!(proxied > compared / 5 && proxied < compared * 4 / 5, "{proxied} of {compared} are proxied");
}

/// Whether the kernel sends it to the proxy.
fn captures(kernel: &mut Kernel, seen: &Packet, own: bool) -> bool {
    let context = Context { mark: seen.mark, ..Context::default() };
    let (program, taken) = if own {
        (program::OWN, (REDIRECTED, "own_redirected"))
    } else {
        (program::CAPTURE, (STEERED, "assign_eopnotsupp"))
    };
    let set = if let Known::Is(set) = seen.domain { Some(set) } else { None };
    kernel.set_name(seen.destination, set, 3600);
    let outcome = kernel.run_with(program, &p::opening(seen), context);
    let captured = outcome.action != PASS;
    let expected = if captured { taken } else { (PASS, "pass_policy") };
    assert_eq!((outcome.action, outcome.only_counter()), expected, "{seen:?}");
    captured
}

/// A packet that opens a flow on the interface of a test run.
pub(crate) fn as_frame(mut seen: Packet) -> Packet {
    seen.protocol = if seen.protocol.is_multiple_of(2) { TCP } else { UDP };
    seen.interface = Some(IFINDEX);
    if !matches!(seen.ports, Known::Is(_)) {
        seen.ports = Known::Is((40_000, 443));
    }
    // What is not known of a name is asked for by the words of verdicts, of which there are none here.
    if seen.domain == Known::Unknown {
        seen.domain = Known::Absent;
    }
    // All frames have an address, and none of what arrives has a socket.
    seen.mac = seen.mac.or(Some(0));
    (seen.uid, seen.gid) = (None, None);
    seen.cgroups.clear();
    seen
}

/// The same of this host, sent by the socket that each test run has: one that belongs to
/// the kernel, and so to user 0 and to no group.
fn own_frame(seen: Packet) -> Packet {
    let mark = seen.mark & !with_own_traffic().own_mark;
    Packet { interface: None, mac: None, uid: Some(0), mark, ..as_frame(seen) }
}

fn new<S: Strategy>(runner: &mut TestRunner, strategy: &S) -> S::Value {
    strategy.new_tree(runner).expect("a value").current()
}

/// What has one of these values is proxied, and nothing else.
pub(crate) fn only(selector: Selector, values: (u128, u128)) -> RuleSet {
    let condition = Condition { selector, values: Arc::new(Ranges::new(vec![values])) };
    let rule = Rule { conditions: vec![condition], verdict: Verdict::Proxy as u32 };
    RuleSet { rules: vec![rule], otherwise: Verdict::Pass as u32 }
}

fn the_control_group_of_a_socket_is_known_at_its_depth() {
    let mut kernel = Kernel::new(&with_own_traffic());
    let group = Group::enter();
    let (source, destination) = (p::mapped(p::CLIENT_V4), p::mapped(p::SERVER_V4));
    let seen = own_frame(Packet { source, destination, ..Packet::EMPTY });
    let mut depths_of = |group: &Path| -> Vec<u32> {
        let id = fs::metadata(group).expect("a control group").ino();
        let is_at = |depth: &u32| {
            kernel.set_rules(&only(Selector::Cgroup { depth: *depth }, (id.into(), id.into())));
            let captured = captures(&mut kernel, &seen, true);
            kernel.forget(&parse(&p::opening(&seen)).expect("a packet"));
            captured
        };
        (0..20).filter(is_at).collect()
    };
    // How deep the outer one is depends on who runs the test.
    let outer = depths_of(&group.outer());
    let [outer] = outer[..] else { panic!("{outer:?}") };
    assert_eq!(depths_of(&group.inner()), [outer + 1]);
    assert!(depths_of(&group.sibling()).is_empty());
}

/// A control group that this process is in for a while, and one above it.
struct Group {
    hierarchy: Hierarchy,
}

impl Group {
    fn enter() -> Self {
        let group = Self { hierarchy: Hierarchy::mount() };
        fs::create_dir(group.outer()).expect("a group");
        fs::create_dir(group.inner()).expect("a group in it");
        fs::create_dir(group.sibling()).expect("another");
        move_to(&group.inner());
        group
    }

    fn outer(&self) -> PathBuf {
        self.hierarchy.root().join(format!("tproxy-golden-{}", std::process::id()))
    }

    fn inner(&self) -> PathBuf {
        self.outer().join("inner")
    }

    fn sibling(&self) -> PathBuf {
        self.outer().join("sibling")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        move_to(self.hierarchy.root());
        for group in [self.sibling(), self.inner(), self.outer()] {
            remove(&group);
        }
    }
}

/// Removes a group. Threads of other tests that end while the process moves stay behind, and
/// are gone in a moment.
fn remove(group: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome.expect("an empty group"),
        }
    }
}

/// Moves this process to a control group.
fn move_to(group: &Path) {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
        .expect("a group that one may enter");
}

//! Layout of maps and settings: the contract between kernel and userspace.
//!
//! Every struct is `repr(C)` with explicit padding and asserted size. A change
//! of any of them raises [`ABI_VERSION`], which userspace compares before it
//! reads maps that another version may have pinned.

mod decision;

pub use decision::{Decision, Verdict};

/// Version of everything in this module.
pub const ABI_VERSION: u32 = 7;

/// Most workers (listeners of one kind) that [`map::LISTENERS`] holds.
pub const MAX_WORKERS: u32 = 64;

/// Capacity of the flow table where the user sets none, in flows. The kernel gives a table the next
/// power of two of buckets: a little above one they are twice as many, and half as full.
pub const DEFAULT_MAX_FLOWS: u32 = 150_000;

/// Names of maps and programs, as in the object and under the pin directory.
pub mod map {
    /// LRU hash [`FlowKey`](super::FlowKey) → [`Flow`](super::Flow).
    pub const FLOWS: &str = "FLOWS";
    /// Per-CPU array of one [`Counters`](crate::counter::Counters).
    pub const COUNTERS: &str = "COUNTERS";
    /// Socket map: index [`listener_index`](super::listener_index) → listening socket.
    pub const LISTENERS: &str = "LISTENERS";
    /// LPM trie of this host's own addresses: [`LpmKey`](super::LpmKey) → 1.
    pub const LOCAL: &str = "LOCAL";
    /// Array of one map, the rules: [`Line`](crate::policy::Line) by number.
    pub const POLICY: &str = "POLICY";
    /// LRU hash [`FragmentKey`](super::FragmentKey) → [`FragmentInfo`](super::FragmentInfo).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// LRU hash [`HostPair`](super::HostPair) → 1: who asked whom over UDP.
    pub const HOST_PAIRS: &str = "HOST_PAIRS";
    /// LRU hash [`FlowKey`](super::FlowKey) → [`Endpoint`](super::Endpoint): what NAT made of
    /// the proxy's own packets. The key's client is the address and port that the server sees,
    /// the value those of the proxy's socket.
    pub const NAT: &str = "NAT";
    /// LRU hash [`Addr`](super::Addr) → [`Name`](super::Name): what addresses are called, as far
    /// as rules ask for it.
    pub const NAMES: &str = "NAMES";
    /// LRU hash [`FlowKey`](super::FlowKey) → [`Decided`](super::Decided): what the proxy has
    /// decided of flows that it was [asked](super::Verdict::Ask) about.
    pub const DECIDED: &str = "DECIDED";
    /// Storage of sockets → `u32`: the group of who made one. It goes with the program, and is not pinned.
    pub const GROUPS: &str = "GROUPS";
    /// All that are pinned.
    pub const ALL: [&str; 10] =
        [FLOWS, COUNTERS, LISTENERS, LOCAL, POLICY, FRAGMENTS, HOST_PAIRS, NAT, NAMES, DECIDED];
}

/// Program names, as in the object.
pub mod program {
    /// TC ingress of captured interfaces.
    pub const CAPTURE: &str = "tproxy_capture";
    /// TC ingress of upstream-facing interfaces: return traffic of `source = client`.
    pub const UPLINK: &str = "tproxy_uplink";
    /// TC egress of upstream-facing interfaces: notes what NAT made of the proxy's packets.
    pub const NAT: &str = "tproxy_nat";
    /// TC egress of captured interfaces (and of `lo` with own traffic): counts replies, notes requests from outside, and what [`NAT`] notes.
    pub const REPLY: &str = "tproxy_reply";
    /// TC egress of all interfaces with own traffic: does what [`REPLY`] does, turns the host's own flows back to `lo`.
    pub const OWN: &str = "tproxy_own";
    /// TC ingress of `lo` with own traffic.
    pub const LOOPBACK: &str = "tproxy_lo";
    /// TC ingress of the tun device of `--handshake faithful` (Linux 5.8).
    pub const ADMIT: &str = "tproxy_admit";
    /// Socket filter that chooses a queue of that device (Linux 4.16).
    pub const QUEUE: &str = "tproxy_queue";
    /// `sk_lookup` of the network namespace (Linux 5.9).
    pub const LOOKUP: &str = "tproxy_lookup";
    /// Socket creation in the root of the control groups: notes the group that makes a socket
    /// (Linux 5.9).
    pub const GROUP: &str = "tproxy_group";
}

/// Which kind of listener an entry of [`map::LISTENERS`] is.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// TCP over IPv4.
    Tcp4 = 0,
    /// TCP over IPv6.
    Tcp6 = 1,
    /// UDP over IPv4: datagrams that may be fragmented, and reassembled ones.
    Udp4 = 2,
    /// UDP over IPv6.
    Udp6 = 3,
    /// UDP over IPv4 with the DF bit, of which a socket tells nothing: so it has one of its own.
    Udp4Df = 4,
}

impl ListenerKind {
    /// All kinds, in index order.
    pub const ALL: [Self; 5] = [Self::Tcp4, Self::Tcp6, Self::Udp4, Self::Udp6, Self::Udp4Df];
}

/// Index of a worker's listener in [`map::LISTENERS`].
#[inline(always)]
#[must_use]
pub const fn listener_index(kind: ListenerKind, worker: u32) -> u32 {
    kind as u32 * MAX_WORKERS + worker
}

/// Capacity of [`map::LISTENERS`]: where the listeners of the last kind end.
pub const MAX_LISTENERS: u32 = listener_index(ListenerKind::Udp4Df, MAX_WORKERS);

/// An IPv4 or IPv6 address in network byte order; IPv4 is mapped (`::ffff:a.b.c.d`).
pub type Addr = [u8; 16];

/// The address family by its IP version number.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4 = 4,
    /// IPv6.
    V6 = 6,
}

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Maps an IPv4 address into the form that every map uses.
#[inline(always)]
#[must_use]
pub const fn mapped(v4: [u8; 4]) -> Addr {
    joined([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), u32::from_ne_bytes(v4)])
}

/// An address of four words, as they stand (network byte order).
#[inline(always)]
#[must_use]
pub const fn joined(words: [u32; 4]) -> Addr {
    let mut addr = [0; 16];
    let (quarters, _) = addr.as_chunks_mut::<4>();
    // Word by word: of single bytes eBPF would store each by itself.
    quarters[0] = words[0].to_ne_bytes();
    quarters[1] = words[1].to_ne_bytes();
    quarters[2] = words[2].to_ne_bytes();
    quarters[3] = words[3].to_ne_bytes();
    addr
}

/// Key of the flow table: what the client sent, whichever way a packet goes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The client's address.
    pub client: Addr,
    /// The address that the client sent to.
    pub destination: Addr,
    /// The client's port, host byte order.
    pub client_port: u16,
    /// The port that the client sent to, host byte order.
    pub destination_port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Where a flow came from.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It arrived on a captured interface.
    Captured = 0,
    /// This host itself sent it (`--own-traffic`).
    Own = 1,
    /// It was forwarded from outside to a host behind this one, or asked a service of this host.
    Uplink = 2,
}

/// Value of the flow table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Packets from the client, as on the wire (a GRO packet counts its segments).
    pub packets_up: u64,
    /// IP-layer bytes from the client, as on the wire.
    pub bytes_up: u64,
    /// Packets to the client.
    pub packets_down: u64,
    /// IP-layer bytes to the client.
    pub bytes_down: u64,
    /// First packet, nanoseconds of `CLOCK_MONOTONIC`; from Linux 5.11 on to the timer tick (1 to 10 ms).
    pub first_seen: u64,
    /// Latest packet of either direction, likewise.
    pub last_seen: u64,
    /// Interface that the flow arrived on (own traffic: leaves by).
    pub ifindex: u32,
    /// Number of the rule that decided; 0 where none did.
    pub rule: u16,
    /// A [`Verdict`].
    pub verdict: u8,
    /// An [`Origin`].
    pub origin: u8,
    /// [`tcp_seen`](crate::flow::tcp_seen) bits of the client's packets.
    pub seen_up: u8,
    /// [`tcp_seen`](crate::flow::tcp_seen) bits of the replies.
    pub seen_down: u8,
    /// Number of the target that it is diverted to.
    pub target: u16,
    /// The [`Verdict`] where the proxy is [asked](Verdict::Ask) and finds no name; else 0.
    pub fallback: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Key of an LPM trie over both families. IPv4 prefixes are 96 bits longer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LpmKey {
    /// Prefix length in bits of the mapped address, 0 to 128.
    pub prefix_len: u32,
    /// The address.
    pub addr: Addr,
}

/// Identifies the fragments of one datagram (RFC 791, RFC 8200).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Identification field (16 bits in IPv4, 32 in IPv6).
    pub id: u32,
    /// IP protocol of the datagram.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// What is known of a datagram that arrives in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentInfo {
    /// Fragments that were seen before the first one.
    pub pending_packets: u64,
    /// Their IP-layer bytes.
    pub pending_bytes: u64,
    /// Source port, host byte order; valid once `has_ports` is 1.
    pub source_port: u16,
    /// Destination port, host byte order; valid once `has_ports` is 1.
    pub destination_port: u16,
    /// 1 once the first fragment was seen.
    pub has_ports: u8,
    /// A [`Verdict`].
    pub verdict: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// A host that has asked another over UDP: a client and its destination, or a host
/// outside and a server behind this one.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostPair {
    /// The address of who asked.
    pub client: Addr,
    /// The address that was asked.
    pub destination: Addr,
}

/// What an address is called.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Name {
    /// Set of its names, by number: which rules they meet.
    pub set: u32,
    /// Zero.
    pub pad: u32,
    /// Until when that holds, nanoseconds of `CLOCK_MONOTONIC`.
    pub expires: u64,
}

/// What the proxy has decided of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// [`Flow::first_seen`] of that flow: another may have had the same addresses and ports.
    pub first_seen: u64,
    /// Number of the rule that decided; 0 where none did.
    pub rule: u16,
    /// Number of the target that it is diverted to.
    pub target: u16,
    /// A [`Verdict`].
    pub verdict: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// An address and port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub addr: Addr,
    /// The port, host byte order.
    pub port: u16,
    /// Zero.
    pub pad: [u8; 2],
}

/// Constants that userspace writes into the object before it is loaded; the
/// verifier sees them as known values and drops the branches that they exclude.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`ABI_VERSION`] of the loader.
    pub abi_version: u32,
    /// Steered packets get `mark = (mark & !mark_mask) | mark_value`.
    pub mark_value: u32,
    /// See `mark_value`.
    pub mark_mask: u32,
    /// Mark of the proxy's own sockets.
    pub own_mark: u32,
    /// Number of workers, 1 to [`MAX_WORKERS`].
    pub workers: u32,
    /// ifindex of the loopback device.
    pub lo_ifindex: u32,
    /// ifindex of the tun device that SYNs are set aside through; 0: none are.
    pub handshake_ifindex: u32,
    /// IPv4 address of the listeners, network byte order; for `listener_by_tuple`.
    pub listen_v4: [u8; 4],
    /// IPv6 address of the listeners; for `listener_by_tuple`.
    pub listen_v6: Addr,
    /// Nanoseconds after which a quiet UDP flow is decided over anew.
    pub udp_timeout: u64,
    /// 1: new flows pass while no proxy listens; 0: they are dropped.
    pub fail_open: u8,
    /// 1: [`map::LISTENERS`] cannot be read from TC (before Linux 5.8): find listeners by address and port.
    pub listener_by_tuple: u8,
    /// 1: a packet without a link-layer header can be given one (Linux 5.8).
    pub link_headers: u8,
    /// 1: the host's own traffic is captured.
    pub own_traffic: u8,
    /// 1: the `sk_lookup` program is attached, so reassembled fragments find their socket.
    pub sk_lookup: u8,
    /// 1: the proxy's sockets have the client's own port, so nothing tells its datagrams from the client's.
    pub client_port: u8,
    /// 1: the stack looks for the socket of an arriving TCP packet before the route (`tcp_early_demux`).
    pub early_demux: u8,
    /// 1: the clock of the timer tick, which costs a fraction, may be read (`bpf_ktime_get_coarse_ns`).
    pub coarse_clock: u8,
    /// Ports of the listeners, by [`listener_index`]; for `listener_by_tuple`.
    pub listener_ports: ListenerPorts,
}

/// Ports of all listeners, host byte order, by [`listener_index`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerPorts(pub [u16; MAX_LISTENERS as usize]);

impl Default for ListenerPorts {
    fn default() -> Self {
        Self([0; MAX_LISTENERS as usize])
    }
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 64);
    assert!(size_of::<LpmKey>() == 20);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentInfo>() == 24);
    assert!(size_of::<HostPair>() == 32);
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<Name>() == 16);
    assert!(size_of::<Decided>() == 16);
    assert!(size_of::<Settings>() == 28 + 20 + 8 + 8 + 2 * MAX_LISTENERS as usize);
};

/// Userspace copies these types in and out of maps.
#[cfg(feature = "user")]
mod pod {
    use super::{Decided, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair, Name, Settings};
    use crate::counter::Counters;

    macro_rules! pod {
        ($($type:ty),+) => {
            $(
                // SAFETY: `repr(C)`, integers only, without implicit padding
                // (sizes are asserted above), valid for every bit pattern.
                unsafe impl aya::Pod for $type {}
            )+
        };
    }
    pod!(Counters, Decided, Flow, FlowKey, FragmentInfo, FragmentKey, HostPair, Name, Settings);
}

//! The one list of counters: index, name and help text all come from here.

/// Declares the counters once: the struct that is the value of the `COUNTERS`
/// map (so that `bpftool map dump` prints names), the enum that indexes it and
/// the table that userspace prints.
macro_rules! counters {
    ($($(#[doc = $help:literal])+ $variant:ident => $name:ident,)+) => {
        /// The value of the per-CPU map `COUNTERS`; a field counts packets
        /// unless its text says otherwise.
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $help])+ pub $name: u64,)+
        }

        /// Names one field of [`Counters`].
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $($(#[doc = $help])+ $variant,)+
        }

        impl Counters {
            /// How many counters there are.
            pub const COUNT: usize = [$(stringify!($name)),+].len();

            /// Each counter as (name, value, help text), in map order.
            #[must_use]
            pub fn entries(&self) -> [(&'static str, u64, &'static str); Self::COUNT] {
                [$((stringify!($name), self.$name, concat!($($help),+).trim_ascii())),+]
            }

            /// Adds another CPU's values.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.wrapping_add(other.$name);)+
            }
        }
    };
}

counters! {
    /// Packets of TCP connections of the proxy, after the first. Where the stack finds the socket by itself (`tcp_early_demux`), late ones of clients are among them.
    SteeredEstablished => steered_established,
    /// TCP connection openings handed to the proxy's listener.
    SteeredTcpNew => steered_tcp_new,
    /// SYNs set aside until upstream has answered (`--handshake faithful`).
    SynSetAside => syn_set_aside,
    /// SYNs let in after that.
    SynAdmitted => syn_admitted,
    /// Dropped: a SYN to be let in whose flow the flow table had lost.
    SynNotAdmitted => syn_not_admitted,
    /// UDP datagrams handed to the proxy's listener.
    SteeredUdp => steered_udp,
    /// UDP replies of servers handed to the proxy's upstream socket.
    SteeredUdpReturn => steered_udp_return,
    /// Fragments marked for local reassembly; the `sk_lookup` program picks the socket.
    SteeredFragment => steered_fragment,
    /// ICMP errors about packets that the proxy had sent, delivered to this host.
    SteeredIcmp => steered_icmp,
    /// Late TCP packets of a proxied connection that has ended, answered with a reset instead of leaking to the server.
    SteeredLate => steered_late,
    /// Lookups by the stack itself that the `sk_lookup` program gave to the proxy's listener.
    LookupAssigned => lookup_assigned,
    /// The host's own packets turned back to the proxy.
    OwnRedirected => own_redirected,
    /// Dropped: a packet of the host's own, leaving by a device without link-layer header, that Linux before 5.8 (before 5.12: one as long as the MTU) cannot turn back.
    OwnNoHeader => own_no_header,
    /// Passed: not IPv4 or IPv6, or a protocol that is not captured.
    PassProtocol => pass_protocol,
    /// Passed: addressed to another host on the link, or link-layer broadcast or multicast.
    PassNotForUs => pass_not_for_us,
    /// Passed: a VLAN tag of a trunk; capture the VLAN device instead.
    PassVlan => pass_vlan,
    /// Passed: multicast, broadcast, link-local, loopback or unspecified address.
    PassSpecial => pass_special,
    /// Passed: the destination is an address of this host.
    PassLocal => pass_local,
    /// Passed: the rules say so.
    PassPolicy => pass_policy,
    /// Dropped: the rules say so.
    PolicyDropped => policy_dropped,
    /// Refused with a reset: the rules say so. Datagrams that they refuse go to the proxy, which sends the ICMP error.
    PolicyReset => policy_reset,
    /// Passed: the first packet seen belongs to a connection that is older than the proxy.
    PassMidstream => pass_midstream,
    /// Passed: a reply of a server behind this host to a client outside.
    PassReply => pass_reply,
    /// Passed on an upstream-facing interface: no socket of the proxy owns it.
    PassNoSocket => pass_no_socket,
    /// Passed: a packet that the proxy itself sent.
    PassOwnMark => pass_own_mark,
    /// Dropped: a datagram that the proxy itself had sent came back, because the route to its destination leads in again.
    LoopDropped => loop_dropped,
    /// Passed: no proxy was listening and `fail = open`.
    FailOpen => fail_open,
    /// Dropped: no proxy was listening and `fail = closed`.
    FailClosed => fail_closed,
    /// Passed: headers that are cut short.
    Truncated => truncated,
    /// Passed: headers that contradict themselves.
    Malformed => malformed,
    /// Fragments whose first fragment had not been seen.
    FragmentUnknown => fragment_unknown,
    /// `bpf_sk_assign` answered EINVAL.
    AssignInvalid => assign_einval,
    /// `bpf_sk_assign` answered ENOENT: the socket closed at that moment.
    AssignNoEntry => assign_enoent,
    /// `bpf_sk_assign` answered ENETUNREACH: the socket is in another network namespace.
    AssignNetUnreach => assign_enetunreach,
    /// `bpf_sk_assign` answered EOPNOTSUPP: not called at ingress.
    AssignNotSupported => assign_eopnotsupp,
    /// `bpf_sk_assign` answered ESOCKTNOSUPPORT: an `SO_REUSEPORT` socket before Linux 6.6.
    AssignSocketType => assign_esocktnosupport,
    /// `bpf_sk_assign` answered another error.
    AssignOther => assign_other,
    /// An entry of the flow table, or of the tables of fragments, host pairs and NAT, could not be made.
    FlowInsertFailed => flow_insert_failed,
    /// Flows entered in the flow table (flows, not packets).
    FlowsCreated => flows_created,
}

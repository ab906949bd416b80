//! A packet as rules see it, in userspace; and the image in memory.

use tproxy_common::abi::{Addr, Family};
use tproxy_common::policy::{self, Facts, Image, Known, Line, Work};

/// What is known of a packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The family of its addresses.
    pub family: Family,
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source and destination port.
    pub ports: Known<(u16, u16)>,
    /// Protocol number.
    pub protocol: u8,
    /// Index of the interface that it arrives on; none for own traffic.
    pub interface: Option<u32>,
    /// Link-layer address that it comes from, as a number.
    pub mac: Option<u64>,
    /// Differentiated services codepoint.
    pub dscp: u8,
    /// Its mark.
    pub mark: u32,
    /// User that owns the sending socket.
    pub uid: Option<u32>,
    /// Group of the process that made it.
    pub gid: Option<u32>,
    /// Control groups that the sending socket is in, from the root down.
    pub cgroups: Vec<u64>,
    /// Set of the name that it is for.
    pub domain: Known<u32>,
}

impl Packet {
    /// One of which nothing is known.
    pub const EMPTY: Self = Self {
        family: Family::V4,
        source: [0; 16],
        destination: [0; 16],
        ports: Known::Absent,
        protocol: 0,
        interface: None,
        mac: None,
        dscp: 0,
        mark: 0,
        uid: None,
        gid: None,
        cgroups: Vec::new(),
        domain: Known::Absent,
    };
}

impl Facts for Packet {
    fn family(&self) -> Family {
        self.family
    }

    fn source(&self) -> &Addr {
        &self.source
    }

    fn destination(&self) -> &Addr {
        &self.destination
    }

    fn ports(&self) -> Known<(u16, u16)> {
        self.ports
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn interface(&self) -> Option<u32> {
        self.interface
    }

    fn mac(&self) -> Option<u64> {
        self.mac
    }

    fn dscp(&self) -> u8 {
        self.dscp
    }

    fn mark(&self) -> u32 {
        self.mark
    }

    fn uid(&self) -> Option<u32> {
        self.uid
    }

    fn gid(&self) -> Option<u32> {
        self.gid
    }

    fn cgroup(&self, depth: u32) -> Option<u64> {
        self.cgroups.get(usize::try_from(depth).ok()?).copied()
    }

    fn domain(&self) -> Known<u32> {
        self.domain
    }
}

/// An image in memory.
#[derive(Clone, Debug)]
pub struct Memory(pub Vec<Line>);

impl Image for Memory {
    fn line(&self, index: u32) -> Option<&Line> {
        self.0.get(usize::try_from(index).ok()?)
    }

    fn hidden(&self, number: u32) -> u32 {
        number
    }

    fn opaque(&self, number: u64) -> u64 {
        number
    }
}

impl Memory {
    /// Verdict and rule, as the kernel decides.
    ///
    /// # Panics
    ///
    /// Where the image is none of [`compile`](super::compile::compile).
    #[must_use]
    pub fn decide(&self, packet: &Packet) -> (u32, u32) {
        policy::decide(self, packet, &mut Work::default()).expect("a compiled image is complete")
    }
}

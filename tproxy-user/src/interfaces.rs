//! What the host looks like: interfaces, addresses, routes. Needs no privilege.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

use crate::netlink::{self, Error, collect, family};
use crate::tun;

/// Index of the loopback device, the same in every network namespace
/// (`LOOPBACK_IFINDEX` in include/net/flow.h).
pub const LOOPBACK_INDEX: u32 = 1;

/// The table of the host's own addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;

/// Whether the interface of this index still has this name: indices of devices
/// that are gone may be given again.
#[must_use]
pub fn is_still(name: &str, index: u32) -> bool {
    if_nametoindex(name) == Ok(index)
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// ifindex.
    pub index: u32,
    /// Name.
    pub name: String,
    /// It is administratively up.
    pub up: bool,
    /// It is a loopback device.
    pub loopback: bool,
    /// Kind of a virtual device, such as `bridge` or `vrf`; empty for hardware.
    pub kind: String,
    /// ifindex of the bridge, bond, VRF … that it is enslaved to.
    pub master: Option<u32>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// A unicast route leads over it. Looked up only where it has no address.
    pub routed: bool,
}

/// A snapshot of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// All interfaces, by index.
    pub interfaces: Vec<Interface>,
    /// What is delivered to this host: local, broadcast and anycast routes of
    /// the local table, and all addresses (those of a VRF are in its own table).
    pub local: Vec<IpNet>,
    /// IPv6 is there and enabled on the loopback device.
    pub ipv6: bool,
}

impl Interface {
    /// A device that an instance of this program made for itself.
    #[must_use]
    pub fn is_made_by_tproxy(&self) -> bool {
        let number = self.name.strip_prefix(tun::PREFIX);
        self.kind == tun::KIND
            && number
                .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    }
}

impl Host {
    /// The interface with this index.
    #[must_use]
    pub fn by_index(&self, index: u32) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.index == index)
    }

    /// The device that owns the ports of which this interface is one; `None`
    /// for a slave of a VRF, which keeps its own addresses and routes.
    #[must_use]
    pub fn bridge_of(&self, interface: &Interface) -> Option<&Interface> {
        self.by_index(interface.master?).filter(|master| master.kind != "vrf")
    }
}

/// Looks at the network namespace of `handle`. `own_table` is the routing table
/// that does not count, being of our making.
///
/// # Errors
/// Where the kernel refuses a dump.
pub async fn snapshot(handle: &Handle, own_table: u32) -> Result<Host, Error> {
    let links = collect("list interfaces", handle.link().get().execute()).await?;
    let mut interfaces: Vec<_> = links.into_iter().map(interface).collect();
    interfaces.sort_by_key(|interface| interface.index);

    let mut addresses = HashMap::<u32, Vec<IpAddr>>::new();
    for message in collect("list addresses", handle.address().get().execute()).await? {
        // With a peer, IFA_ADDRESS is the peer's and IFA_LOCAL this host's.
        let own = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let any = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        addresses.entry(message.header.index).or_default().extend(own.or(any));
    }

    let mut local = Vec::new();
    for v6 in [false, true] {
        local.extend(routes(handle, v6, Some(TABLE_LOCAL), None).await?.iter().filter_map(local_prefix));
    }
    for interface in &mut interfaces {
        interface.addresses = addresses.remove(&interface.index).unwrap_or_default();
        local.extend(interface.addresses.iter().map(|address| IpNet::from(*address)));
        // A filtered dump for these few: the whole table of a router may have a million routes.
        if interface.up && !interface.loopback && interface.addresses.is_empty() {
            interface.routed = is_routed(handle, interface.index, own_table).await?;
        }
    }
    local.sort();
    local.dedup();
    Ok(Host { interfaces, local, ipv6: netlink::has_ipv6()? })
}

/// What `doctor` wants to know of an interface besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkDetail {
    /// ifindex.
    pub index: u32,
    /// ifindex of the device below it.
    pub parent: Option<u32>,
    /// It is a VLAN device.
    pub vlan: bool,
    /// It has an XDP program.
    pub xdp: bool,
}

/// The details of all interfaces.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn details(handle: &Handle) -> Result<Vec<LinkDetail>, Error> {
    let links = collect("list interfaces", handle.link().get().execute()).await?;
    Ok(links.iter().map(detail).collect())
}

fn detail(message: &LinkMessage) -> LinkDetail {
    let mut detail = LinkDetail { index: message.header.index, ..LinkDetail::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(parent) => detail.parent = Some(*parent),
            LinkAttribute::LinkInfo(infos) => detail.vlan = infos.contains(&LinkInfo::Kind(InfoKind::Vlan)),
            LinkAttribute::Xdp(parts) => {
                detail.xdp = parts.iter().any(|part| matches!(part, LinkXdp::ProgId(id) if *id != 0));
            }
            _ => {}
        }
    }
    detail
}

/// The networks of the addresses that interfaces have, but for link-local ones,
/// which are never captured.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn networks(handle: &Handle, interfaces: &[u32]) -> Result<Vec<IpNet>, Error> {
    let mut networks = Vec::new();
    for message in collect("list addresses", handle.address().get().execute()).await? {
        let length = message.header.prefix_len;
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        let is_link = message.header.scope == AddressScope::Link;
        if interfaces.contains(&message.header.index)
            && !is_link
            && let Some(Ok(network)) = address.map(|address| IpNet::new(address, length))
        {
            networks.push(network.trunc());
        }
    }
    Ok(networks)
}

fn interface(message: LinkMessage) -> Interface {
    let flags = message.header.flags;
    let mut interface = Interface {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        ..Interface::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Controller(master) => interface.master = Some(master),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        interface.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    interface
}

async fn is_routed(handle: &Handle, index: u32, own_table: u32) -> Result<bool, Error> {
    for v6 in [false, true] {
        let found = routes(handle, v6, None, Some(index)).await?;
        if found.iter().any(|route| route.header.kind == RouteType::Unicast && table_of(route) != own_table) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Routes of one family, filtered by table and outgoing interface.
pub(crate) async fn routes(
    handle: &Handle,
    v6: bool,
    table: Option<u32>,
    oif: Option<u32>,
) -> Result<Vec<RouteMessage>, Error> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = family(v6);
    filter.attributes.extend(table.map(RouteAttribute::Table));
    filter.attributes.extend(oif.map(RouteAttribute::Oif));
    let mut found = collect("list routes", handle.route().get(filter).execute()).await?;
    // A kernel without IPv6 answers for a family that it has; and a filter is
    // a wish (NLM_F_DUMP_FILTERED).
    found.retain(|route| {
        route.header.address_family == family(v6)
            && table.is_none_or(|table| table_of(route) == table)
            && oif.is_none_or(|oif| leads_over(route, oif))
    });
    Ok(found)
}

fn leads_over(route: &RouteMessage, oif: u32) -> bool {
    route.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Oif(index) => *index == oif,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.interface_index == oif),
        _ => false,
    })
}

/// The table that a route is in.
pub(crate) fn table_of(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|attribute| if let RouteAttribute::Table(table) = attribute { Some(*table) } else { None })
        .unwrap_or(route.header.table.into())
}

/// The destination of a route.
pub(crate) fn destination(route: &RouteMessage) -> Option<IpNet> {
    let v6 = route.header.address_family == family(true);
    let address = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        })
        .unwrap_or(if v6 { IpAddr::V6([0; 16].into()) } else { IpAddr::V4([0; 4].into()) });
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

fn local_prefix(route: &RouteMessage) -> Option<IpNet> {
    match route.header.kind {
        RouteType::Local | RouteType::Broadcast | RouteType::Anycast => destination(route),
        _ => None,
    }
}

//! Hand-made packets, sent by a raw socket.

use std::io;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header, PacketBuilder,
    PacketBuilderStep, TcpHeader, UdpHeader,
};
use socket2::{Domain, Protocol, Socket, Type};

use xtask::lab::Namespace;

const HOPS: u8 = 64;

/// What a TCP segment carries besides its addresses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Segment<'a> {
    /// Sequence number.
    pub(crate) sequence: u32,
    /// Acknowledgment number; `None` leaves the flag out.
    pub(crate) acknowledgment: Option<u32>,
    /// The SYN flag.
    pub(crate) syn: bool,
    /// The FIN flag.
    pub(crate) fin: bool,
    /// Data.
    pub(crate) data: &'a [u8],
}

/// Builds a TCP segment as one IP packet.
///
/// # Errors
/// Where the families differ or the data does not fit.
pub(crate) fn tcp(from: SocketAddr, to: SocketAddr, segment: &Segment) -> Result<Vec<u8>> {
    let mut header = TcpHeader::new(from.port(), to.port(), segment.sequence, 64_000);
    header.acknowledgment_number = segment.acknowledgment.unwrap_or(0);
    header.ack = segment.acknowledgment.is_some();
    header.syn = segment.syn;
    header.fin = segment.fin;
    header.psh = !segment.data.is_empty();
    let mut packet = Vec::new();
    ip(from.ip(), to.ip())?.tcp_header(header).write(&mut packet, segment.data)?;
    Ok(packet)
}

fn ip(from: IpAddr, to: IpAddr) -> Result<PacketBuilderStep<etherparse::IpHeaders>> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Ok(PacketBuilder::ipv4(from.octets(), to.octets(), HOPS)),
        (IpAddr::V6(from), IpAddr::V6(to)) => Ok(PacketBuilder::ipv6(from.octets(), to.octets(), HOPS)),
        _ => anyhow::bail!("{from} and {to} are of different families"),
    }
}

/// Builds one UDP datagram as IP fragments of at most `piece` bytes of payload
/// each (a multiple of 8), first one first.
///
/// # Errors
/// Where the families differ or the datagram is longer than IP allows.
pub(crate) fn udp_fragments(
    from: SocketAddr,
    to: SocketAddr,
    data: &[u8],
    piece: usize,
    id: u16,
) -> Result<Vec<Vec<u8>>> {
    let header = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => UdpHeader::with_ipv4_checksum(
            from.port(),
            to.port(),
            &ipv4(source.octets(), target.octets(), 0)?,
            data,
        )?,
        (IpAddr::V6(source), IpAddr::V6(target)) => UdpHeader::with_ipv6_checksum(
            from.port(),
            to.port(),
            &ipv6(source.octets(), target.octets(), IpNumber::UDP, 0),
            data,
        )?,
        _ => anyhow::bail!("{from} and {to} are of different families"),
    };
    let datagram = [header.to_bytes().as_slice(), data].concat();
    let pieces: Vec<&[u8]> = datagram.chunks(piece).collect();
    let mut packets = Vec::new();
    for (number, chunk) in pieces.iter().enumerate() {
        let more = number + 1 < pieces.len();
        let offset = IpFragOffset::try_new(u16::try_from(number * piece / 8)?)?;
        let mut packet = Vec::new();
        match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(target)) => {
                let mut header = ipv4(source.octets(), target.octets(), u16::try_from(chunk.len())?)?;
                (header.identification, header.more_fragments, header.fragment_offset) = (id, more, offset);
                header.header_checksum = header.calc_header_checksum();
                header.write(&mut packet)?;
            }
            (IpAddr::V6(source), IpAddr::V6(target)) => {
                let length = u16::try_from(chunk.len() + Ipv6FragmentHeader::LEN)?;
                ipv6(source.octets(), target.octets(), IpNumber::IPV6_FRAGMENTATION_HEADER, length)
                    .write(&mut packet)?;
                Ipv6FragmentHeader::new(IpNumber::UDP, offset, more, u32::from(id)).write(&mut packet)?;
            }
            _ => anyhow::bail!("{from} and {to} are of different families"),
        }
        packet.extend_from_slice(chunk);
        packets.push(packet);
    }
    Ok(packets)
}

/// An IPv6 extension header of 8 bytes: its protocol number, and itself but for
/// the number of what follows.
pub(crate) type Extension = (u8, [u8; 7]);

/// Builds a UDP datagram over IPv6 with extension headers, first one first.
///
/// # Errors
/// Where an address is not IPv6 or the data does not fit.
pub(crate) fn udp_with_extensions(
    from: SocketAddr,
    to: SocketAddr,
    extensions: &[Extension],
    data: &[u8],
) -> Result<Vec<u8>> {
    let (IpAddr::V6(source), IpAddr::V6(target)) = (from.ip(), to.ip()) else {
        anyhow::bail!("{from} or {to} is not IPv6");
    };
    let length = u16::try_from(extensions.len() * 8 + UdpHeader::LEN + data.len())?;
    let first = extensions.first().map_or(IpNumber::UDP, |(number, _)| IpNumber(*number));
    let header = ipv6(source.octets(), target.octets(), first, length);
    let udp = UdpHeader::with_ipv6_checksum(from.port(), to.port(), &header, data)?;
    let mut packet = Vec::new();
    header.write(&mut packet)?;
    for (position, (_, rest)) in extensions.iter().enumerate() {
        packet.push(extensions.get(position + 1).map_or(IpNumber::UDP.0, |(number, _)| *number));
        packet.extend_from_slice(rest);
    }
    packet.extend_from_slice(&udp.to_bytes());
    packet.extend_from_slice(data);
    Ok(packet)
}

/// Builds a packet of any protocol, without extension headers or options.
///
/// # Errors
/// Where the families differ or the data does not fit.
pub(crate) fn other(from: IpAddr, to: IpAddr, protocol: u8, data: &[u8]) -> Result<Vec<u8>> {
    let length = u16::try_from(data.len())?;
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = ipv4(from.octets(), to.octets(), length)?;
            header.protocol = IpNumber(protocol);
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut packet)?;
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            ipv6(from.octets(), to.octets(), IpNumber(protocol), length).write(&mut packet)?;
        }
        _ => anyhow::bail!("{from} and {to} are of different families"),
    }
    packet.extend_from_slice(data);
    Ok(packet)
}

fn ipv4(source: [u8; 4], target: [u8; 4], payload: u16) -> Result<Ipv4Header> {
    Ok(Ipv4Header { dont_fragment: false, ..Ipv4Header::new(payload, HOPS, IpNumber::UDP, source, target)? })
}

fn ipv6(source: [u8; 16], target: [u8; 16], next: IpNumber, payload: u16) -> Ipv6Header {
    Ipv6Header {
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: payload,
        next_header: next,
        hop_limit: HOPS,
        source,
        destination: target,
        ..Ipv6Header::default()
    }
}

/// Sends finished IP packets, in this order, from a namespace.
///
/// # Errors
/// Where the kernel refuses one.
pub(crate) fn send(namespace: &Namespace, to: IpAddr, packets: &[Vec<u8>]) -> Result<()> {
    namespace.try_enter(|| {
        // IPPROTO_RAW implies IP_HDRINCL, raw(7).
        let socket =
            Socket::new(Domain::for_address(SocketAddr::new(to, 0)), Type::RAW, Some(Protocol::from(RAW)))?;
        for packet in packets {
            socket.send_to(packet, &SocketAddr::new(to, 0).into())?;
        }
        Ok(())
    })
}

/// `IPPROTO_RAW`.
const RAW: i32 = 255;

/// A raw socket that gets what arrives in a namespace for one protocol.
///
/// # Errors
/// Where there is no raw socket to be had.
pub(crate) fn receiver(
    namespace: &Namespace,
    to: IpAddr,
    protocol: u8,
    patience: std::time::Duration,
) -> Result<Socket> {
    let made: Result<Socket> = namespace.try_enter(|| -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::for_address(SocketAddr::new(to, 0)),
            Type::RAW,
            Some(Protocol::from(i32::from(protocol))),
        )?;
        socket.set_read_timeout(Some(patience))?;
        Ok(socket)
    });
    made.with_context(|| format!("cannot receive protocol {protocol}"))
}

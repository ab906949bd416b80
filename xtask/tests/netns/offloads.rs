//! Segmentation, merging and checksums, by the devices or by the kernel (H13):
//! every byte arrives, and the counters are those of the wire.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::lab::kernel::Version;
use xtask::lab::peer::{self, TcpServer, UdpServer};
use xtask::lab::{Family, Lab};

use crate::account::expect_equal;
use crate::capture::Capture;
use crate::common::{Scenarios, at, start_proxy};
use crate::sockopt;

pub(crate) const SCENARIOS: Scenarios = &[("H13_offloads_on_and_off", combinations)];

/// What ethtool(8) sets on every device of the way.
const COMBINATIONS: [(&str, &str); 6] = [
    ("everything", "tx on rx on sg on tso on gso on gro on tx-udp-segmentation on"),
    ("no merging", "tx on rx on sg on tso on gso on gro off tx-udp-segmentation on"),
    ("merging alone", "tx on rx on tso off gso off gro on tx-udp-segmentation off"),
    ("merging of datagrams too", "tso off gso off gro on rx-udp-gro-forwarding on tx-udp-segmentation off"),
    ("checksums by the kernel", "tx off gro on rx-udp-gro-forwarding off"),
    ("nothing", "tx off rx off sg off tso off gso off gro off tx-udp-segmentation off"),
];

const MERGE_ON: &str = "rx-udp-gro-forwarding on";
const MERGE_OFF: &str = "rx-udp-gro-forwarding off";
const UDP_GRO_FORWARDING: Version = Version(5, 12);
/// Before that a device without checksums refuses datagrams to be segmented (EIO).
const SEGMENTS_WITHOUT_CHECKSUMS: Version = Version(6, 11);
/// Before that a packet socket loses such datagrams (`virtio_net_hdr_from_skb`).
const CAPTURES_UNSEGMENTED: Version = Version(6, 2);

const PORT: u16 = 5900;
/// Bytes over TCP, each way.
const BULK: usize = 3 << 20;

fn combinations(lab: &Lab, family: Family) -> Result<()> {
    let tcp = at(family.anywhere(1), PORT);
    let udp = at(family.anywhere(2), PORT);
    let _tcp = TcpServer::echo(&lab.server, tcp)?;
    let _udp = UdpServer::echo(&lab.server, udp)?;
    let proxy = start_proxy(lab, "--iface lan")?;
    let capture = Capture::start(&lab.router, "lan")?;
    // Before that the kernel merges no datagrams that it forwards, and ethtool knows no such word.
    let merges_datagrams = Version::running()? >= UDP_GRO_FORWARDING;
    let known = COMBINATIONS.iter().filter(|(_, settings)| merges_datagrams || !settings.contains(MERGE_ON));
    for (position, (name, settings)) in known.enumerate() {
        let settings = if merges_datagrams { settings.to_string() } else { settings.replace(MERGE_OFF, "") };
        for (namespace, device) in
            [(&lab.client, "eth0"), (&lab.router, "lan"), (&lab.router, "wan"), (&lab.server, "eth0")]
        {
            namespace.sh(&format!("ethtool --features {device} {settings}"))?;
        }
        bulk(lab, tcp).with_context(|| format!("TCP with offloads: {name}"))?;
        let segmented = Version::running()?
            >= if settings.contains("tx off") { SEGMENTS_WITHOUT_CHECKSUMS } else { CAPTURES_UNSEGMENTED };
        datagrams(lab, family, udp, segmented).with_context(|| format!("UDP with offloads: {name}"))?;
        expect_equal(&proxy, &capture, 2 * (position + 1))
            .with_context(|| format!("with offloads: {name}"))?;
    }
    Ok(())
}

fn bulk(lab: &Lab, to: SocketAddr) -> Result<()> {
    let content = peer::pattern(BULK);
    let stream = peer::connect(&lab.client, None, to, Duration::from_secs(5))?;
    let mut back = Vec::with_capacity(BULK);
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| {
            (&stream).write_all(&content)?;
            stream.shutdown(Shutdown::Write)
        });
        (&stream).read_to_end(&mut back)?;
        sent.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    ensure!(back == content, "{BULK} bytes came back as {}, or they differ", back.len());
    Ok(())
}

/// Datagrams that the client's kernel makes of one call, all of a size but the last
/// (udp(7), `UDP_SEGMENT`): they may travel as one packet as far as the proxy. One by one
/// where they are not `segmented`.
fn datagrams(lab: &Lab, family: Family, to: SocketAddr, segmented: bool) -> Result<()> {
    const SIZE: libc::c_int = 1100;
    let socket = peer::udp(&lab.client, at(family.client(), 0))?;
    let (echo, _) = peer::exchange(&socket, to, &peer::pattern(1300))?;
    ensure!(echo.len() == 1300, "1,300 bytes came back as {}", echo.len());
    let content = peer::pattern(11_500);
    let pieces: Vec<&[u8]> = content.chunks(usize::try_from(SIZE)?).collect();
    if segmented {
        sockopt::set(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, SIZE)?;
        socket.send_to(&content, to)?;
    } else {
        pieces.iter().try_for_each(|piece| socket.send_to(piece, to).map(drop))?;
    }
    let mut buffer = [0; 2000];
    for (number, piece) in pieces.iter().enumerate() {
        let (length, from) = peer::receive(&socket, &mut buffer)
            .with_context(|| format!("datagram {} of {} did not come back", number + 1, pieces.len()))?;
        ensure!(from == to, "an answer came from {from}");
        ensure!(buffer[..length] == **piece, "datagram {} came back changed, {length} bytes", number + 1);
    }
    Ok(())
}

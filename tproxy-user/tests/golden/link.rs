//! Frames that arrive on a link. The stack takes the outer VLAN tag off before
//! a program sees the packet, and a test run cannot say that there was one.

use std::mem::MaybeUninit;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use socket2::{Domain, SockAddr, Socket, Type};
use tproxy_common::abi::program;

use crate::kernel::{Kernel, usual};
use crate::packets as p;

tests![a_vlan_of_a_trunk_passes, a_tag_that_carries_a_priority_alone_is_no_vlan];

const CVLAN: u16 = 0x8100;
const SVLAN: u16 = 0x88a8;
const PRIORITY: u16 = 0xe000;

fn a_vlan_of_a_trunk_passes() {
    expect(&p::tagged(&p::syn_v4(), &[(CVLAN, 5)]), "pass_vlan");
    expect(&p::tagged(&p::udp_v6(9), &[(SVLAN, 5), (CVLAN, 6)]), "pass_vlan");
}

fn a_tag_that_carries_a_priority_alone_is_no_vlan() {
    expect(&p::tagged(&p::syn_v4(), &[(CVLAN, PRIORITY)]), "steered_tcp_new");
    // The inner tag is still in the frame.
    expect(&p::tagged(&p::syn_v4(), &[(CVLAN, PRIORITY), (CVLAN, 6)]), "pass_protocol");
}

/// Lets a frame arrive on a captured interface, where this counter must rise.
fn expect(frame: &[u8], counter: &str) {
    const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 1];
    let mut kernel = Kernel::new(&usual());
    let made = Command::new("ip")
        .args(["link", "add", "in", "address", "02:00:00:00:00:01", "type", "veth", "peer", "name", "out"])
        .status();
    assert!(made.is_ok_and(|status| status.success()), "no veth pair");
    for interface in ["in", "out"] {
        let name = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        std::fs::write(name, "1").expect("a quiet link");
        let up = Command::new("ip").args(["link", "set", interface, "up"]).status();
        assert!(up.is_ok_and(|status| status.success()), "{interface} stays down");
    }
    kernel.attach(program::CAPTURE, "in");
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&ADDRESS);
    send(&frame, "out");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !kernel.counted().contains(&(counter, 1)) {
        assert!(Instant::now() < deadline, "{counter} is not in {:?}", kernel.counted());
        sleep(Duration::from_millis(5));
    }
}

/// Sends a frame, see packet(7).
fn send(frame: &[u8], interface: &str) {
    let index = if_nametoindex(interface).expect("an interface");
    // SAFETY: `sockaddr_ll` is written as a whole, fits the storage, and its length is given.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let mut link: libc::sockaddr_ll = MaybeUninit::zeroed().assume_init();
            link.sll_family = u16::try_from(libc::AF_PACKET).expect("a small number");
            link.sll_ifindex = index.cast_signed();
            storage.cast::<libc::sockaddr_ll>().write(link);
            *length = u32::try_from(size_of::<libc::sockaddr_ll>()).expect("a small size");
            Ok(())
        })
    }
    .expect("an address");
    let socket = Socket::new(Domain::PACKET, Type::RAW, None).expect("a packet socket");
    assert_eq!(socket.send_to(frame, &address).expect("sent"), frame.len());
}

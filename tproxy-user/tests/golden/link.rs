//! Frames on a link, which a test run cannot show: the stack has taken the outer VLAN tag
//! off, a device has no Ethernet header, or a program's socket has sent the packet.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use aya::programs::TcAttachType;
use nix::net::if_::if_nametoindex;
use nix::unistd::{Uid, setfsuid};
use socket2::{Domain, SockAddr, Socket, Type};
use tproxy_common::abi::program;
use tproxy_user::policy::compile::Selector;

use crate::hierarchy::Hierarchy;
use crate::kernel::{Kernel, usual};
use crate::packets as p;
use crate::rules::{only, with_own_traffic};

tests![
    a_vlan_of_a_trunk_passes,
    a_tag_that_carries_a_priority_alone_is_no_vlan,
    a_packet_without_an_ethernet_header_has_no_link_layer_address,
    a_socket_belongs_to_the_user_that_made_it,
    a_socket_belongs_to_the_group_that_made_it,
    a_socket_that_was_there_before_has_no_group,
];

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

fn a_packet_without_an_ethernet_header_has_no_link_layer_address() {
    let mut kernel = Kernel::new(&usual());
    kernel.set_rules(&only(Selector::Mac, (0, (1 << 48) - 1)));
    let mut device = tun("in");
    set_up("in");
    kernel.attach(program::CAPTURE, "in", TcAttachType::Ingress);
    // By its source, 8.0.0.2, it looks as if an Ethernet header were before it.
    let mut packet = p::udp_v4(20).split_off(p::ETHERNET);
    packet[12..16].copy_from_slice(&[8, 0, 0, 2]);
    device.write_all(&packet).expect("a packet that arrives");
    wait_for(&mut kernel, "pass_policy");
}

fn a_socket_belongs_to_the_user_that_made_it() {
    const USER: u32 = 4711;
    let mut kernel = sending(Selector::Uid, USER);
    for (user, counter) in [(USER, "own_redirected"), (0, "pass_policy")] {
        // Of this thread alone.
        setfsuid(Uid::from_raw(user));
        let socket = UdpSocket::bind("192.0.2.1:0");
        setfsuid(Uid::from_raw(0));
        ask(&socket.expect("a port"));
        wait_for(&mut kernel, counter);
    }
}

fn a_socket_belongs_to_the_group_that_made_it() {
    const GROUP: u32 = 4711;
    let mut kernel = sending(Selector::Gid, GROUP);
    let hierarchy = Hierarchy::mount();
    kernel.note_groups(hierarchy.root());
    for (group, counter) in [(GROUP, "own_redirected"), (0, "pass_policy")] {
        set_group(group);
        let socket = UdpSocket::bind("192.0.2.1:0");
        set_group(0);
        ask(&socket.expect("a port"));
        wait_for(&mut kernel, counter);
    }
}

fn a_socket_that_was_there_before_has_no_group() {
    let mut kernel = sending(Selector::Gid, 0);
    let before = UdpSocket::bind("192.0.2.1:0").expect("a port");
    let hierarchy = Hierarchy::mount();
    kernel.note_groups(hierarchy.root());
    ask(&before);
    wait_for(&mut kernel, "pass_policy");
    ask(&UdpSocket::bind("192.0.2.1:0").expect("a port"));
    wait_for(&mut kernel, "own_redirected");
}

/// What this host sends by an interface is proxied where its socket has this number.
fn sending(selector: Selector, number: u32) -> Kernel {
    let mut kernel = Kernel::new(&with_own_traffic());
    kernel.set_rules(&only(selector, (number.into(), number.into())));
    make_pair();
    ip("addr add 192.0.2.1/24 dev out");
    ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:01 dev out");
    ip("route add default via 192.0.2.2");
    kernel.attach(program::OWN, "out", TcAttachType::Egress);
    kernel
}

fn ask(socket: &UdpSocket) {
    socket.send_to(b"?", "203.0.113.7:443").expect("sent");
}

/// The real group of this thread alone: glibc's call would change all.
fn set_group(group: u32) {
    const AS_IT_IS: libc::gid_t = libc::gid_t::MAX;
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_setresgid, group, AS_IT_IS, AS_IT_IS) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Lets a frame arrive on a captured interface, where this counter must rise.
fn expect(frame: &[u8], counter: &'static str) {
    const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 1];
    let mut kernel = Kernel::new(&usual());
    make_pair();
    kernel.attach(program::CAPTURE, "in", TcAttachType::Ingress);
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&ADDRESS);
    send(&frame, "out");
    wait_for(&mut kernel, counter);
}

/// A counter must rise to one.
fn wait_for(kernel: &mut Kernel, counter: &'static str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !kernel.counted().contains(&(counter, 1)) {
        assert!(Instant::now() < deadline, "{counter} is not in {:?}", kernel.counted());
        sleep(Duration::from_millis(5));
    }
}

/// What is sent on `out` arrives on `in`.
fn make_pair() {
    ip("link add in address 02:00:00:00:00:01 type veth peer name out");
    for interface in ["in", "out"] {
        set_up(interface);
    }
}

/// Sets an interface up on which nobody else sends.
fn set_up(interface: &str) {
    let name = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    std::fs::write(name, "1").expect("a quiet link");
    ip(&format!("link set {interface} up"));
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status();
    assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
}

/// A tun device: what is written to it arrives, and without any link-layer header.
fn tun(name: &str) -> File {
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("the tun driver");
    // SAFETY: an ifreq of zeros is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).expect("16 bits");
    // SAFETY: the request reads and writes one ifreq.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    device
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

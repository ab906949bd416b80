//! New UDP flows as a program relays them that does nothing else: about what bounds every relay
//! with a socket for each, as one takes whose servers see the client's address.
//!
//! Each flow has a socket of its own, bound to the client's address, and replies go by a raw socket, as
//! tproxy sends them. Threads with a listener and an epoll instance each. There are no limits, no
//! counters and no time-outs: of many flows the oldest goes. A bound, and nothing to use.

use std::collections::{HashMap, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::thread;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvfrom, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

/// Events that one call takes, and datagrams that are taken in a row.
const EVENTS: usize = 64;

/// Flows of a thread.
const FLOWS: usize = 4 << 10;

/// The longest datagram.
const LONGEST: usize = 2048;

/// Length of a UDP header.
const HEADER: u16 = 8;

/// The listener's key.
const LISTENER: u64 = u64::MAX;

/// Relays for ever, with so many threads.
pub(crate) fn run(port: u16, threads: usize) -> Result<()> {
    let all = (0..threads).map(|_| Relay::new(port)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let all: Vec<_> = all.into_iter().map(|relay| scope.spawn(move || relay.run())).collect();
        println!("0.0.0.0:{port}");
        all.into_iter().try_for_each(|one| one.join().expect("a thread does not panic"))
    })
}

struct Relay {
    listener: Socket,
    replies: Socket,
    epoll: Epoll,
    by_client: HashMap<SocketAddrV4, u64>,
    flows: HashMap<u64, (SocketAddrV4, Socket)>,
    oldest: VecDeque<u64>,
    begun: u64,
}

impl Relay {
    fn new(port: u16) -> Result<Self> {
        let listener = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), None)?;
        listener.set_reuse_port(true)?;
        listener.set_ip_transparent_v4(true).context("IP_TRANSPARENT")?;
        setsockopt(&listener, sockopt::Ipv4OrigDstAddr, &true)?;
        listener.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
        let replies = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::UDP))?;
        replies.set_ip_transparent_v4(true)?;
        // To which nothing is sent, so that it receives nothing.
        replies.bind(&SocketAddr::from((Ipv4Addr::new(127, 255, 255, 254), 0)).into())?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let (by_client, flows, oldest) = Default::default();
        Ok(Self { listener, replies, epoll, by_client, flows, oldest, begun: 0 })
    }

    fn run(mut self) -> Result<()> {
        let mut room = [EpollEvent::empty(); EVENTS];
        loop {
            let count = match self.epoll.wait(&mut room, EpollTimeout::NONE) {
                Err(Errno::EINTR) => 0,
                count => count.context("epoll_wait")?,
            };
            for event in &room[..count] {
                let done = if event.data() == LISTENER { self.take() } else { self.reply(event.data()) };
                if let Err(error) = done {
                    eprintln!("tproxy-experiments: {error:#}");
                }
            }
        }
    }

    /// Sends on what has come to the listener.
    fn take(&mut self) -> Result<()> {
        let mut buffer = [0; LONGEST];
        for _ in 0..EVENTS {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let mut control = nix::cmsg_space!(libc::sockaddr_in);
            let fd = self.listener.as_raw_fd();
            let come = match recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut control), MsgFlags::empty()) {
                Err(Errno::EAGAIN) => return Ok(()),
                come => come?,
            };
            let to = come.cmsgs()?.find_map(|message| match message {
                ControlMessageOwned::Ipv4OrigDstAddr(to) => Some(SocketAddrV4::from(SockaddrIn::from(to))),
                _ => None,
            });
            let (from, length) = (come.address.map(SocketAddrV4::from), come.bytes);
            let (from, to) = (from.context("no source")?, to.context("no destination")?);
            let key = match self.by_client.get(&from) {
                Some(key) => *key,
                None => self.open(from)?,
            };
            if let Some((_, socket)) = self.flows.get(&key) {
                socket.send_to(&buffer[..length], &SocketAddr::from(to).into())?;
            }
        }
        Ok(())
    }

    fn open(&mut self, from: SocketAddrV4) -> Result<u64> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking().cloexec(), None)?;
        socket.set_ip_transparent_v4(true)?;
        // A port of the kernel's choice, as tproxy has it and nginx.
        socket.bind(&SocketAddr::from((*from.ip(), 0)).into())?;
        let key = self.begun;
        self.begun += 1;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
        self.by_client.insert(from, key);
        self.flows.insert(key, (from, socket));
        self.oldest.push_back(key);
        if self.oldest.len() > FLOWS
            && let Some((client, _)) = self.oldest.pop_front().and_then(|key| self.flows.remove(&key))
        {
            self.by_client.remove(&client);
        }
        Ok(key)
    }

    /// Sends back what has come to a flow's socket.
    fn reply(&self, key: u64) -> Result<()> {
        let Some((client, socket)) = self.flows.get(&key) else { return Ok(()) };
        let mut buffer = [0; LONGEST];
        // One: where there are more, that is another event.
        let (length, from) = recvfrom::<SockaddrIn>(socket.as_raw_fd(), &mut buffer)?;
        let from = from.map(SocketAddrV4::from).context("no source")?;
        // Without a checksum, which is allowed (RFC 768).
        let fields = [from.port(), client.port(), HEADER + u16::try_from(length)?, 0];
        let header = fields.map(u16::to_be_bytes);
        let source = libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.ip().octets()) },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        let parts = [IoSlice::new(header.as_flattened()), IoSlice::new(&buffer[..length])];
        let to = SockaddrIn::from(SocketAddrV4::new(*client.ip(), 0));
        let control = [ControlMessage::Ipv4PacketInfo(&source)];
        sendmsg(self.replies.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))?;
        Ok(())
    }
}

//! read(2), and send(2) with `MSG_ZEROCOPY`: the second copy is saved, and each buffer has to wait
//! until the kernel tells that it needs it no longer
//! (`Documentation/networking/msg_zerocopy.rst` of the kernel).
//!
//! What another socket of the same host receives, over loopback or veth, is copied all the same, on
//! its way in (`skb_orphan_frags_rx`): how much was, each direction tells at its end.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _};
use std::mem::size_of_val;
use std::ops::{Range, RangeInclusive};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use socket2::Socket;

use crate::CHUNK;
use crate::events::Mover;

/// Buffers of a direction: what may be with the kernel at one time.
const BUFFERS: usize = 32;

// linux/errqueue.h.
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

pub(crate) struct Zerocopy {
    free: Vec<Vec<u8>>,
    /// What was read last, and what of it is to be sent.
    held: Option<(Buffer, Range<usize>)>,
    /// With the kernel.
    lent: VecDeque<Buffer>,
    /// Number of the next send: the kernel counts them, from 0, modulo 2³².
    next: u32,
    started: bool,
    ended: bool,
    /// Sends that the kernel has copied all the same.
    copied: u32,
    /// Room for what the kernel tells.
    control: Vec<u8>,
}

struct Buffer {
    bytes: Vec<u8>,
    /// Number of the first send from it.
    first: u32,
    sends: u32,
    /// How many of these the kernel is done with.
    done: u32,
}

impl Zerocopy {
    pub(crate) fn new() -> Self {
        Self {
            free: (0..BUFFERS).map(|_| vec![0; CHUNK]).collect(),
            held: None,
            lent: VecDeque::new(),
            next: 0,
            started: false,
            ended: false,
            copied: 0,
            control: nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in),
        }
    }

    /// Takes back what the kernel is done with.
    fn take_back(&mut self, to: &Socket) -> io::Result<()> {
        loop {
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let message = match recvmsg::<()>(to.as_raw_fd(), &mut [], Some(&mut self.control), flags) {
                Err(Errno::EAGAIN) => return Ok(()),
                message => message?,
            };
            for told in message.cmsgs()? {
                let ControlMessageOwned::Ipv4RecvErr(told, _) = told else { continue };
                if told.ee_origin != SO_EE_ORIGIN_ZEROCOPY {
                    continue;
                }
                let sends = told.ee_info..=told.ee_data;
                if told.ee_code == SO_EE_CODE_ZEROCOPY_COPIED {
                    self.copied += length(&sends);
                }
                for buffer in &mut self.lent {
                    buffer.done += buffer.shared_with(&sends);
                }
            }
            while self.lent.front().is_some_and(|buffer| buffer.done == buffer.sends) {
                self.free.extend(self.lent.pop_front().map(|buffer| buffer.bytes));
            }
        }
    }

    fn read(&mut self, mut from: &Socket, to: &Socket) -> io::Result<()> {
        if self.free.is_empty() {
            self.take_back(to)?;
        }
        let Some(bytes) = self.free.last_mut() else { return Err(ErrorKind::WouldBlock.into()) };
        let read = from.read(bytes)?;
        self.ended = read == 0;
        if !self.ended {
            let bytes = self.free.pop().unwrap_or_default();
            self.held = Some((Buffer { bytes, first: self.next, sends: 0, done: 0 }, 0..read));
        }
        Ok(())
    }
}

impl Mover for Zerocopy {
    fn step(&mut self, from: &Socket, to: &Socket) -> io::Result<bool> {
        if !self.started {
            allow_zerocopy(to)?;
            self.started = true;
        }
        if self.held.is_none() && !self.ended {
            self.read(from, to)?;
        }
        let Some((buffer, range)) = &mut self.held else {
            // A buffer that the kernel still reads must not be given to anybody else.
            self.take_back(to)?;
            return if self.lent.is_empty() { Ok(false) } else { Err(ErrorKind::WouldBlock.into()) };
        };
        let flags = libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL;
        range.start += to.send_with_flags(&buffer.bytes[range.clone()], flags)?;
        buffer.sends += 1;
        self.next = self.next.wrapping_add(1);
        if range.start == range.end {
            self.lent.extend(self.held.take().map(|(buffer, _)| buffer));
        }
        Ok(true)
    }
}

impl Drop for Zerocopy {
    fn drop(&mut self) {
        if self.next > 0 {
            eprintln!("MSG_ZEROCOPY: the kernel copied {} of {} sends", self.copied, self.next);
        }
    }
}

impl Buffer {
    /// How many of its sends are among these.
    fn shared_with(&self, sends: &RangeInclusive<u32>) -> u32 {
        let numbers = (0..self.sends).map(|send| self.first.wrapping_add(send));
        let among = |number: &u32| number.wrapping_sub(*sends.start()) < length(sends);
        numbers.filter(among).map(|_| 1).sum()
    }
}

fn length(sends: &RangeInclusive<u32>) -> u32 {
    sends.end().wrapping_sub(*sends.start()).wrapping_add(1)
}

/// `SO_ZEROCOPY`.
fn allow_zerocopy(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    let size = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    let value = (&raw const on).cast();
    // SAFETY: the value is a c_int, of that size, and outlives the call.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, value, size) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

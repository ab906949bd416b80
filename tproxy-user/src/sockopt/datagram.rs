//! What datagrams are sent and received with.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::c_int;
use socket2::Socket;

use super::{Call, SocketError, set_int};

/// Receive buffer of a UDP listener and send buffer of the reply sockets, in
/// bytes: one socket serves all clients of a worker, and a burst of them must
/// fit while the worker is busy.
pub(super) const SHARED_BUFFER: usize = 4 << 20;

/// Whether datagrams of a socket over IPv4 may be fragmented (`IP_MTU_DISCOVER`, ip(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragments {
    /// They may, here and by routers (`IP_PMTUDISC_DONT`).
    Allowed,
    /// They must not: they have the DF bit, and the learned path MTU does not matter, as in a
    /// router (`IP_PMTUDISC_PROBE`, Linux 2.6.22). What the device cannot take is `EMSGSIZE`.
    Forbidden,
    /// They may again (`IP_PMTUDISC_OMIT`, Linux 3.14): here by the MTU of the device alone. Under
    /// `IP_PMTUDISC_DONT` the kernel would not tell that an earlier one was too long (`__udp4_lib_err`).
    AllowedAgain,
}

impl Fragments {
    /// What the next datagram needs.
    #[must_use]
    pub const fn next(self, dont_fragment: bool) -> Self {
        match (dont_fragment, self) {
            (true, _) => Self::Forbidden,
            (false, Self::Allowed) => Self::Allowed,
            (false, Self::Forbidden | Self::AllowedAgain) => Self::AllowedAgain,
        }
    }

    const fn option(self) -> c_int {
        match self {
            Self::Allowed => libc::IP_PMTUDISC_DONT,
            Self::Forbidden => libc::IP_PMTUDISC_PROBE,
            Self::AllowedAgain => libc::IP_PMTUDISC_OMIT,
        }
    }
}

/// Allows or forbids fragments of what a UDP socket over IPv4 sends from now on.
///
/// # Errors
/// [`SocketError`] of `setsockopt`.
pub fn set_fragments(socket: BorrowedFd<'_>, fragments: Fragments) -> Result<(), SocketError> {
    set_int(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, fragments.option())
        .call("setsockopt IP_MTU_DISCOVER")
}

/// No path MTU discovery: large datagrams leave in fragments instead of failing with `EMSGSIZE`.
pub(super) fn allow_fragments(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option, value) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    };
    set_int(socket, level, option, value).call("setsockopt IP_MTU_DISCOVER")
}

/// DSCP and ECN of each datagram are told (`IP_RECVTOS`, Linux 2.2; `IPV6_RECVTCLASS`, Linux 2.6.14).
pub(super) fn tell_class(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS) } else { (libc::IPPROTO_IP, libc::IP_RECVTOS) };
    set_int(socket, level, option, 1).call("setsockopt IP_RECVTOS")
}

/// Datagrams that this kernel or their sender's has merged are received as one, with the length of each
/// (`UDP_GRO`, Linux 5.0). Without it the kernel cuts them first.
///
/// # Errors
/// [`SocketError`] of `setsockopt`.
pub fn take_segments(socket: &impl AsRawFd) -> Result<(), SocketError> {
    set_int(socket, libc::SOL_UDP, libc::UDP_GRO, 1).call("setsockopt UDP_GRO")
}

/// ICMP errors about what was sent are queued with the datagram that they are about
/// (`IP_RECVERR`, Linux 2.2), also on a socket that is not connected.
pub(super) fn queue_errors(socket: &Socket, v6: bool) -> Result<(), SocketError> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVERR) } else { (libc::IPPROTO_IP, libc::IP_RECVERR) };
    set_int(socket, level, option, 1).call("setsockopt IP_RECVERR")
}

#[cfg(test)]
mod tests {
    use super::Fragments;

    #[test]
    fn errors_about_datagrams_with_df_are_told_ever_after() {
        let after = |flags: &[bool]| flags.iter().fold(Fragments::Allowed, |now, df| now.next(*df));
        assert_eq!(after(&[false, false]), Fragments::Allowed);
        assert_eq!(after(&[false, true]), Fragments::Forbidden);
        assert_eq!(after(&[true, false, false]), Fragments::AllowedAgain);
        assert_eq!(after(&[true, false, true]), Fragments::Forbidden);
    }
}

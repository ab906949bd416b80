//! Socket options that are in no crate.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use xtask::lab::Family;

/// Sets an option that takes an int, setsockopt(2).
pub(crate) fn set(
    socket: BorrowedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_bytes(socket, level, option, &value.to_ne_bytes())
}

/// Sets an option that takes bytes, setsockopt(2).
pub(crate) fn set_bytes(
    socket: BorrowedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the option's value outlives the call, and its size is given.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets a socket use addresses that are not its host's, ip(7) `IP_TRANSPARENT`.
pub(crate) fn set_transparent(socket: BorrowedFd, family: Family) -> io::Result<()> {
    let (level, option) =
        family.pick((libc::SOL_IP, libc::IP_TRANSPARENT), (libc::SOL_IPV6, libc::IPV6_TRANSPARENT));
    set(socket, level, option, 1)
}

/// Sets the DF bit of what a socket sends (IPv6: refuses to fragment), or clears
/// it, ip(7) `IP_MTU_DISCOVER`.
pub(crate) fn set_dont_fragment(socket: BorrowedFd, family: Family, forbidden: bool) -> io::Result<()> {
    let (level, option) =
        family.pick((libc::SOL_IP, libc::IP_MTU_DISCOVER), (libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER));
    let value = if forbidden { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
    set(socket, level, option, value)
}

/// Sets DSCP and ECN of what a socket sends, ip(7) `IP_TOS`.
pub(crate) fn set_traffic_class(socket: BorrowedFd, family: Family, class: u8) -> io::Result<()> {
    let (level, option) = family.pick((libc::SOL_IP, libc::IP_TOS), (libc::SOL_IPV6, libc::IPV6_TCLASS));
    set(socket, level, option, class.into())
}

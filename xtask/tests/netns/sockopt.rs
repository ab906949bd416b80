//! Socket options that are in no crate; all of them take an int.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use xtask::lab::Family;

const INT_SIZE: libc::socklen_t = 4;
const _: () = assert!(size_of::<libc::c_int>() == INT_SIZE as usize);

/// Sets an option, setsockopt(2).
pub(crate) fn set(
    socket: BorrowedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option's value is an int that outlives the call, and its size is given.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), INT_SIZE) };
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

//! The one place that speaks to `/dev/net/tun`: a wire between two namespaces
//! that carries bare IP packets, as a tunnel or a PPP line does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use xtask::lab::Namespace;

/// A TUN device in each of two namespaces, and threads that carry packets from
/// one to the other; gone when dropped.
#[derive(Debug)]
pub(crate) struct Wire {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Wire {
    /// Makes a device of the given name at each end. They have no address yet
    /// and are down.
    ///
    /// # Errors
    /// Where the kernel makes no such device.
    pub(crate) fn lay(one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<Self> {
        let (one, other) = (Arc::new(device(one.0, one.1)?), Arc::new(device(other.0, other.1)?));
        let stop = Arc::new(AtomicBool::new(false));
        let threads = [(one.clone(), other.clone()), (other, one)].map(|(from, to)| {
            let stopped = stop.clone();
            std::thread::spawn(move || carry(&from, &to, &stopped))
        });
        Ok(Self { stop, threads: threads.into() })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A device is as old as its file: it goes when that is closed.
fn device(namespace: &Namespace, name: &str) -> Result<File> {
    namespace.try_enter(|| open(name)).with_context(|| format!("no TUN device {name}"))
}

fn open(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let bytes = name.as_bytes();
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).map_err(io::Error::other)?;
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

fn carry(from: &File, to: &File, stop: &AtomicBool) {
    let mut packet = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let mut wanted = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        if !nix::poll::poll(&mut wanted, PollTimeout::from(50_u8)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        // A device that is down gives and takes nothing: lost, as on any wire.
        if let Ok(length) = (&mut &*from).read(&mut packet) {
            let _ = (&mut &*to).write(&packet[..length]);
        }
    }
}

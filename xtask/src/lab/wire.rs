//! A point-to-point link without link-layer headers, as of PPP or a tunnel.

use std::fmt::Write as _;

use anyhow::Result;

use super::daemon::Daemon;
use super::{Family, Lab, Namespace};

/// Two TUN devices and a socat that carries packets between them; both vanish
/// with it.
#[derive(Debug)]
pub struct Wire {
    _carrier: Daemon,
}

/// An end of a wire: a namespace, and the name of the device that it gets.
pub type End<'a> = (&'a Namespace, &'a str);

impl Wire {
    /// Lays a wire between two namespaces. Its devices are up and have
    /// [`near`]'s and [`far`]'s addresses.
    ///
    /// # Errors
    /// Where there are no TUN devices, or no socat.
    pub fn lay(lab: &Lab, near_end: End<'_>, far_end: End<'_>) -> Result<Self> {
        let ((here, near_name), (there, far_name)) = (near_end, far_end);
        // Both devices are made in one namespace; the program keeps hold of
        // the one that moves on to the other.
        let tun = |name: &str| format!("TUN,tun-name={name},tun-type=tun,iff-no-pi");
        let command = here.cmd("socat").args(["-d", "-d", "-b", "65536"]).arg(tun(near_name)).arg(tun("far"));
        let mut carrier = Daemon::start(lab, "wire", &command)?;
        carrier.wait_ready("it had made its TUN devices (/dev/net/tun)", |carrier| {
            Ok(carrier.log().contains("starting data transfer loop"))
        })?;
        // It ends where a packet meets a device that is down: neither may send
        // one of its own accord (RFC 4861, RFC 3810) before both are up.
        here.ip_batch(&format!(
            "link set {near_name} addrgenmode none\n\
             link set far addrgenmode none\n\
             link set far netns {} name {far_name}\n",
            there.name()
        ))?;
        for (namespace, device) in [near_end, far_end] {
            namespace.ip_batch(&format!("link set {device} up\n"))?;
        }
        for (namespace, device, own, peer) in
            [(here, near_name, near as fn(Family) -> _, far as fn(Family) -> _), (there, far_name, far, near)]
        {
            let mut lines = String::new();
            for family in Family::ALL {
                let nodad = family.pick("", "nodad");
                writeln!(lines, "addr add {} peer {} dev {device} {nodad}", own(family), peer(family))?;
            }
            namespace.ip_batch(&lines)?;
        }
        Ok(Self { _carrier: carrier })
    }
}

/// The address of the first end.
#[must_use]
pub const fn near(family: Family) -> std::net::IpAddr {
    family.pick(super::v4(203, 0, 114, 1), super::v6(4, 1))
}

/// The address of the other end.
#[must_use]
pub const fn far(family: Family) -> std::net::IpAddr {
    family.pick(super::v4(203, 0, 114, 2), super::v6(4, 2))
}

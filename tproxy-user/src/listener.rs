//! The listeners that steered packets arrive at.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use tproxy_common::abi::ListenerKind;

use crate::config::{Config, Steer};
use crate::failure::Failure;
use crate::sockopt::{self, ListenerOptions, OwnMark, SocketError};

/// A listener and the address it is bound to.
#[derive(Debug)]
pub struct Bound<T> {
    /// The socket.
    pub socket: T,
    /// Its address; the port is known even where the kernel chose it.
    pub addr: SocketAddr,
}

/// The listeners of one worker; a kind that is not captured has none.
#[derive(Debug, Default)]
pub struct WorkerListeners {
    /// TCP over IPv4.
    pub tcp4: Option<Bound<TcpListener>>,
    /// TCP over IPv6.
    pub tcp6: Option<Bound<TcpListener>>,
    /// UDP over IPv4.
    pub udp4: Option<Bound<UdpSocket>>,
    /// UDP over IPv4 with the DF bit; only with eBPF steering, which alone can tell them apart.
    pub udp4_df: Option<Bound<UdpSocket>>,
    /// UDP over IPv6.
    pub udp6: Option<Bound<UdpSocket>>,
}

/// One listener as the datapath and the loop protection need it.
#[derive(Clone, Copy, Debug)]
pub struct Listener<'a> {
    /// What it takes.
    pub kind: ListenerKind,
    /// Its address.
    pub addr: SocketAddr,
    /// Its descriptor.
    pub fd: BorrowedFd<'a>,
}

impl WorkerListeners {
    /// All listeners of the worker.
    pub fn iter(&self) -> impl Iterator<Item = Listener<'_>> {
        fn entry<T: AsFd>(kind: ListenerKind, bound: Option<&Bound<T>>) -> Option<Listener<'_>> {
            bound.map(|bound| Listener { kind, addr: bound.addr, fd: bound.socket.as_fd() })
        }
        [
            entry(ListenerKind::Tcp4, self.tcp4.as_ref()),
            entry(ListenerKind::Tcp6, self.tcp6.as_ref()),
            entry(ListenerKind::Udp4, self.udp4.as_ref()),
            entry(ListenerKind::Udp6, self.udp6.as_ref()),
            entry(ListenerKind::Udp4Df, self.udp4_df.as_ref()),
        ]
        .into_iter()
        .flatten()
    }
}

/// A listener that could not be made. The source is a [`Failure`] where the exit
/// code is to be another than 1.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket has the address.
    #[error("cannot listen on {protocol} {addr}")]
    Taken {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// The address.
        addr: SocketAddr,
        /// [`Failure::Conflict`].
        source: Failure,
    },
    /// `CAP_NET_ADMIN` is missing.
    #[error("cannot listen on {protocol} {addr}")]
    Privilege {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// The address.
        addr: SocketAddr,
        /// [`Failure::Unsupported`].
        source: Failure,
    },
    /// Anything else.
    #[error("cannot listen on {protocol} {addr}")]
    Socket {
        /// `TCP` or `UDP`.
        protocol: &'static str,
        /// The address.
        addr: SocketAddr,
        /// What failed.
        source: SocketError,
    },
}

/// Binds all listeners of all workers.
///
/// With eBPF steering only the first worker's are on the port of the configuration,
/// one a protocol and family: the program hands packets to a socket whatever its port,
/// so the others take free ones and none needs `SO_REUSEPORT`, which `bpf_sk_assign`
/// refuses before Linux 6.6. Rules of the user's own know one port, which all workers share.
///
/// A host without IPv6 gets IPv4 listeners alone and a line in the log.
///
/// # Errors
/// [`BindError`], with the address.
pub fn bind(config: &Config) -> Result<Vec<WorkerListeners>, BindError> {
    (0..config.workers).map(|index| bind_worker(config, index)).collect()
}

fn bind_worker(config: &Config, index: u32) -> Result<WorkerListeners, BindError> {
    let (capture, steering) = (&config.capture, &config.steering);
    let shared_port = steering.by == Steer::None;
    let options = ListenerOptions { mark: OwnMark(steering.own_mark), reuse_port: shared_port };
    let port = if shared_port || index == 0 { steering.on_port } else { 0 };
    let v4 = SocketAddr::new(steering.on_ip(false), port);
    let v6 = SocketAddr::new(steering.on_ip(true), port);

    let tcp = |addr| bound("TCP", addr, |addr| sockopt::tcp_listener(addr, options), TcpListener::local_addr);
    let udp = |addr| bound("UDP", addr, |addr| sockopt::udp_listener(addr, options), UdpSocket::local_addr);
    let quiet = index > 0;
    Ok(WorkerListeners {
        tcp4: (capture.scope.tcp && capture.scope.v4).then(|| tcp(v4)).transpose()?,
        udp4: (capture.scope.udp && capture.scope.v4).then(|| udp(v4)).transpose()?,
        udp4_df: (capture.scope.udp && capture.scope.v4 && !shared_port)
            .then(|| udp(SocketAddr::new(v4.ip(), 0)))
            .transpose()?,
        tcp6: optional((capture.scope.tcp && capture.scope.v6).then(|| tcp(v6)), capture.scope.v4, quiet)?,
        udp6: optional((capture.scope.udp && capture.scope.v6).then(|| udp(v6)), capture.scope.v4, quiet)?,
    })
}

fn bound<T>(
    protocol: &'static str,
    addr: SocketAddr,
    make: impl FnOnce(SocketAddr) -> Result<T, SocketError>,
    local_addr: impl FnOnce(&T) -> std::io::Result<SocketAddr>,
) -> Result<Bound<T>, BindError> {
    make(addr)
        .and_then(|socket| {
            let addr = local_addr(&socket).map_err(|source| SocketError { call: "getsockname", source })?;
            Ok(Bound { socket, addr })
        })
        .map_err(|error| describe(protocol, addr, error))
}

fn describe(protocol: &'static str, addr: SocketAddr, source: SocketError) -> BindError {
    match source.errno() {
        Some(libc::EADDRINUSE) if addr.port() == 0 => BindError::Taken {
            protocol,
            addr,
            source: Failure::conflict(
                "no port is free; give more in net.ipv4.ip_local_port_range, or have fewer --workers",
            ),
        },
        Some(libc::EADDRINUSE) => BindError::Taken {
            protocol,
            addr,
            source: Failure::conflict(format_args!(
                "port {} is taken; choose another with --on-port",
                addr.port()
            )),
        },
        Some(libc::EPERM | libc::EACCES) => BindError::Privilege {
            protocol,
            addr,
            source: Failure::unsupported(format_args!("{source}: CAP_NET_ADMIN is needed; run as root")),
        },
        _ => BindError::Socket { protocol, addr, source },
    }
}

/// Does without IPv6 where the host has none and IPv4 is captured as well.
fn optional<T>(
    result: Option<Result<T, BindError>>,
    dispensable: bool,
    quiet: bool,
) -> Result<Option<T>, BindError> {
    match result.transpose() {
        Err(BindError::Socket { protocol, addr, source })
            if dispensable && source.errno() == Some(libc::EAFNOSUPPORT) =>
        {
            if !quiet {
                tracing::warn!("this host has no IPv6 ({source}): no {protocol} listener on {addr}");
            }
            Ok(None)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: i32) -> BindError {
        error_at(15001, errno)
    }

    fn error_at(port: u16, errno: i32) -> BindError {
        let source = SocketError { call: "bind", source: std::io::Error::from_raw_os_error(errno) };
        describe("TCP", ([127, 0, 0, 1], port).into(), source)
    }

    fn exit_code(error: BindError) -> Option<u8> {
        let error = anyhow::Error::from(error);
        error.chain().find_map(|cause| cause.downcast_ref::<Failure>()).map(Failure::exit_code)
    }

    #[test]
    fn failures_name_the_address_and_carry_the_exit_code() {
        assert_eq!(exit_code(error(libc::EADDRINUSE)), Some(5));
        assert_eq!(exit_code(error(libc::EPERM)), Some(4));
        assert_eq!(exit_code(error(libc::EINVAL)), None);
        let text = format!("{:#}", anyhow::Error::from(error(libc::EADDRINUSE)));
        assert_eq!(
            text,
            "cannot listen on TCP 127.0.0.1:15001: port 15001 is taken; choose another with --on-port"
        );
        let text = format!("{:#}", anyhow::Error::from(error_at(0, libc::EADDRINUSE)));
        assert_eq!(
            text,
            "cannot listen on TCP 127.0.0.1:0: no port is free; give more in \
             net.ipv4.ip_local_port_range, or have fewer --workers"
        );
    }

    #[test]
    fn missing_ipv6_is_tolerated_beside_ipv4_only() {
        let missing = || Some(Err::<(), _>(error(libc::EAFNOSUPPORT)));
        assert!(matches!(optional(missing(), true, true), Ok(None)));
        assert!(optional(missing(), false, true).is_err());
        assert!(optional(Some(Err::<(), _>(error(libc::EADDRINUSE))), true, true).is_err());
    }
}

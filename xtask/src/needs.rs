//! Programs that the tasks run besides the compiler, and why.

use crate::packages::Need;

const IP: Need = Need::new("ip", "iproute2", "network namespaces, routes and rules");
const BPFTOOL: Need = Need::new("bpftool", "bpftool", "showing the pinned maps");
const CURL: Need = Need::new("curl", "curl", "web requests, the TCP client");
const NGINX: Need = Need::new("nginx", "nginx-light", "the web server, which tells whose address it sees")
    .service("nginx.service");
const DIG: Need = Need::new("dig", "bind9-dnsutils", "DNS questions, the UDP client");
const DNSMASQ: Need = Need::new("dnsmasq", "dnsmasq-base", "the DNS server, which logs who asks");
const NFT: Need = Need::new("nft", "nftables", "showing that there is no packet filter rule");
const IPTABLES: Need =
    Need::new("iptables", "iptables", "the packet filter rules to live with, and to compare with");
const ETHTOOL: Need = Need::new("ethtool", "ethtool", "switching segmentation offload off");
const SHADOWSOCKS: Need = Need::new("ss-local", "shadowsocks-libev", "a SOCKS5 server, over TCP and UDP")
    .service("shadowsocks-libev.service");
const V2RAY: Need = Need::new("v2ray", "v2ray", "a SOCKS5 server, over TCP and UDP").service("v2ray.service");
const HAPROXY: Need =
    Need::new("haproxy", "haproxy", "a server that is told of the client").service("haproxy.service");

/// What the demo runs.
pub(crate) const DEMO: &[Need] = &[IP, BPFTOOL, CURL, NGINX, DIG, DNSMASQ, NFT];

/// What the end-to-end tests run.
pub(crate) const NETNS: &[Need] = &[
    IP,
    BPFTOOL,
    CURL,
    NGINX,
    DIG,
    DNSMASQ,
    NFT,
    IPTABLES,
    Need::new("nc", "netcat-openbsd", "connections that are half closed, datagrams from a shell"),
    Need::new("socat", "socat", "small servers, over TCP and UDP"),
    Need::new("openssl", "openssl", "the certificate of a TLS server"),
    Need::new("iperf3", "iperf3", "bulk transfers"),
    Need::new("ping", "iputils-ping", "ICMP"),
    ETHTOOL,
    Need::new("sysctl", "procps", "comparing sysctls before and after"),
    Need::new("danted", "dante-server", "a SOCKS5 server, over TCP and UDP").service("danted.service"),
    Need::new("microsocks", "microsocks", "a SOCKS5 server with a password").service("microsocks.service"),
    Need::new("tinyproxy", "tinyproxy-bin", "an HTTP proxy server with a password"),
    Need::new("squid", "squid", "an HTTP proxy server").service("squid.service"),
    SHADOWSOCKS,
    V2RAY,
    HAPROXY,
    Need::new("setpriv", "util-linux", "running without root"),
];

/// What every comparison runs.
pub(crate) const BENCH: &[Need] = &[IP, ETHTOOL];

/// What the quick checks run.
pub(crate) const QUICK: &[Need] =
    &[IP, Need::new("strace", "strace", "counting the system calls of the proxy")];

/// What each candidate of the comparisons runs.
pub(crate) const BENCH_IPTABLES: &[Need] = &[IPTABLES];
/// `HAProxy`, behind iptables TPROXY.
pub(crate) const BENCH_HAPROXY: &[Need] = &[IPTABLES, HAPROXY];
/// nginx, behind iptables TPROXY.
pub(crate) const BENCH_NGINX: &[Need] = &[
    IPTABLES,
    NGINX,
    Need::new(
        "/usr/lib/nginx/modules/ngx_stream_module.so",
        "libnginx-mod-stream",
        "nginx as a proxy of TCP and UDP, to compare with",
    ),
];
/// redsocks, behind iptables REDIRECT.
pub(crate) const BENCH_REDSOCKS: &[Need] = &[
    IPTABLES,
    V2RAY,
    Need::new("redsocks", "redsocks", "a proxy to compare with").service("redsocks.service"),
];
/// v2ray, behind iptables TPROXY.
pub(crate) const BENCH_V2RAY: &[Need] = &[IPTABLES, V2RAY];
/// shadowsocks-libev, behind iptables.
pub(crate) const BENCH_SHADOWSOCKS: &[Need] = &[IPTABLES, SHADOWSOCKS];

/// What other kernels run in.
pub(crate) const QEMU: Need = Need::new("qemu-system-x86_64", "qemu-system-x86", "running other kernels");

/// What makes guests of other kernels.
pub(crate) const VM: &[Need] = &[
    Need::new("busybox", "busybox-static", "the small tools in a guest"),
    Need::new("dash", "dash", "the shell in a guest"),
    Need::new("depmod", "kmod", "finding the modules of a kernel"),
    Need::new("xz", "xz-utils", "unpacking the modules of a kernel"),
    Need::new(
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
        "checking where the packages of other kernels come from",
    ),
];

//! The kernel modules of a guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::archive::Archive;
use super::debian::Unpacked;

/// What the programs, the scenarios and the proxy's own requests need. In a
/// guest nothing is loaded on demand.
const MODULES: &[&str] = &[
    // Devices.
    "8021q",
    "bonding",
    "bridge",
    "br_netfilter",
    "dummy",
    "ifb",
    "macvlan",
    "tun",
    "veth",
    "vrf",
    "wireguard",
    // Traffic control.
    "act_bpf",
    "act_gact",
    "act_mirred",
    "cls_bpf",
    "cls_matchall",
    "cls_u32",
    "sch_fq",
    "sch_ingress",
    "sch_netem",
    "sch_tbf",
    // Packet filters and NAT.
    "nf_conntrack",
    "nf_nat",
    "nf_tables",
    "nft_chain_nat",
    "nft_compat",
    "nft_ct",
    "nft_fib_inet",
    "nft_limit",
    "nft_log",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
    "nft_socket",
    "nft_tproxy",
    "ip6_tables",
    "ip6t_REJECT",
    "ip6t_rt",
    "ip_tables",
    "ipt_REJECT",
    "xt_addrtype",
    "xt_conntrack",
    "xt_LOG",
    "xt_MASQUERADE",
    "xt_comment",
    "xt_TPROXY",
    "xt_hl",
    "xt_limit",
    "xt_mark",
    "xt_multiport",
    "xt_nat",
    "xt_socket",
    "xt_tcpudp",
    // Sockets and their list.
    "inet_diag",
    "sctp",
    "tcp_diag",
    "udp_diag",
];

/// Modules that newer kernels no longer have: what is in them has moved.
const OLDER: &[&str] = &["nft_counter"];

/// Where the guest's `init` finds them, in the order of their names.
pub(crate) const PLACE: &str = "/modules";

/// Adds the modules and those that they depend on.
pub(crate) fn add(archive: &mut Archive, kernel: &Unpacked) -> Result<()> {
    let index = kernel.base.join("lib/modules").join(&kernel.release).join("modules.dep");
    let index = fs::read_to_string(&index).with_context(|| format!("cannot read {}", index.display()))?;
    let older = OLDER.iter().filter(|name| index.contains(&format!("/{name}.ko")));
    let output = Command::new("/sbin/modprobe")
        .arg("-d")
        .arg(&kernel.base)
        .args(["-S", &kernel.release, "--all", "--show-depends"])
        .args(MODULES)
        .args(older)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run modprobe")?;
    if !output.status.success() {
        bail!("Linux {}: {}", kernel.release, String::from_utf8_lossy(&output.stderr).trim());
    }
    for (number, path) in files(&String::from_utf8_lossy(&output.stdout)).iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let plain = name.trim_end_matches(".xz");
        let guest = Path::new(PLACE).join(format!("{number:03}-{plain}"));
        archive.file(&guest, &contents(path)?)?;
    }
    Ok(())
}

/// The files that `modprobe --show-depends` would load, each once.
fn files(listing: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in listing.lines() {
        let Some(path) = line.strip_prefix("insmod ").and_then(|rest| rest.split_whitespace().next()) else {
            continue;
        };
        let path = PathBuf::from(path);
        if !files.contains(&path) {
            files.push(path);
        }
    }
    files
}

/// A module without its compression, which not every kernel undoes itself.
fn contents(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => fs::read(path).with_context(|| format!("cannot read {}", path.display())),
        Some("xz") => {
            let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot run xz")?;
            if !output.status.success() {
                bail!("cannot unpack {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
            }
            Ok(output.stdout)
        }
        _ => bail!("{} is compressed in a way that is not known here", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_is_loaded_once_after_what_it_needs() {
        let listing = "insmod /m/x_tables.ko.xz \nbuiltin ipv6\ninsmod /m/xt_mark.ko.xz a=1\ninsmod /m/x_tables.ko.xz \n";
        assert_eq!(files(listing), ["/m/x_tables.ko.xz", "/m/xt_mark.ko.xz"].map(PathBuf::from));
    }
}

//! Puts the eBPF objects where `include_bytes_aligned!` finds them.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=TPROXY_BPF_DIR");
    let directory = env::var_os("TPROXY_BPF_DIR").map_or_else(
        || {
            let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
            manifest.with_file_name("target").join("bpf")
        },
        PathBuf::from,
    );
    for name in ["tproxy.o", "tproxy-log.o"] {
        let object = directory.join(name);
        println!("cargo::rerun-if-changed={}", object.display());
        let copy = PathBuf::from(variable("OUT_DIR")).join(name);
        if let Err(error) = fs::copy(&object, &copy) {
            println!(
                "cargo::error=cannot embed the eBPF object {}: {error}; run `cargo xtask build-ebpf` first",
                object.display()
            );
        }
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

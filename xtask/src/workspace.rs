//! Where things lie in the checkout, and how the workspace's own cargo is called.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    // The alias in .cargo/config.toml builds xtask from the checkout it serves.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// The directory of what the set-up makes: objects, tools, logs. It does not
/// follow `CARGO_TARGET_DIR`, so that `tproxy-user/build.rs` can find it.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// Where the eBPF objects are put: `tproxy.o` and `tproxy-log.o`.
pub(crate) fn bpf_dir() -> PathBuf {
    target().join("bpf")
}

/// The cargo that runs this task, on the workspace.
pub(crate) fn cargo(subcommand: &str) -> Command {
    let program = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.arg(subcommand).current_dir(root());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_outer_run) {
            command.env_remove(name);
        }
    }
    command
}

/// Whether `cargo run` sets this variable for the program it runs. Handed on to
/// another cargo, they make crates that watch them build again each time.
pub(crate) fn is_of_outer_run(name: &str) -> bool {
    const NAMES: [&str; 7] = [
        "CARGO",
        "CARGO_BIN_NAME",
        "CARGO_CRATE_NAME",
        "CARGO_PRIMARY_PACKAGE",
        "LD_LIBRARY_PATH",
        "OUT_DIR",
        "RUST_RECURSION_COUNT",
    ];
    NAMES.contains(&name) || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace_manifest() {
        assert!(root().join("tproxy-ebpf/Cargo.toml").is_file());
    }

    #[test]
    fn settings_of_the_user_reach_the_inner_cargo() {
        for name in ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_NET_OFFLINE"] {
            assert!(!is_of_outer_run(name), "{name}");
        }
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO"] {
            assert!(is_of_outer_run(name), "{name}");
        }
    }
}

//! The program from its start to its end, and what it leaves.

use std::path::Path;
use std::process::{Command, Stdio};

use tproxy_user::datapath::bpffs;

use super::world::{Outcome, Test, ensure, expect_as_before, picture, sh};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("pins_of_others_stay", pins_of_others_stay),
    ("a_pin_directory_elsewhere_leaves_nothing", a_pin_directory_elsewhere_leaves_nothing),
];

const PROGRAM: &str = env!("CARGO_BIN_EXE_tproxy-user");

fn run(args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().expect("program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

/// A directory that others share loses what is ours, and nothing else.
fn pins_of_others_stay() -> Outcome {
    let pin = Path::new("/sys/fs/bpf/plumbing-shared");
    bpffs::create(pin).map_err(|error| error.to_string())?;
    let others = [pin.join("others"), pin.join("links/others")];
    // The one thing that can be made on this file system without a program or map.
    let ours = [pin.join("FLOWS"), pin.join("links/2_tproxy_capture"), pin.join("links/tproxy_lookup")];
    for path in others.iter().chain(&ours) {
        std::os::unix::fs::symlink("nowhere", path).expect("made");
    }
    let (exit, text) = run(&["cleanup", "--pin=/sys/fs/bpf/plumbing-shared"]);
    let is_there = |path: &std::path::PathBuf| path.symlink_metadata().is_ok();
    let (stayed, left) = (others.iter().all(is_there), ours.iter().any(is_there));
    for path in &others {
        // Gone already where the test fails.
        drop(std::fs::remove_file(path));
    }
    let (again, _) = run(&["cleanup", "--pin=/sys/fs/bpf/plumbing-shared"]);
    ensure!(exit == Some(0) && stayed && !left, "exit {exit:?}, others {stayed}, ours {left}: {text}");
    ensure!(again == Some(0) && !pin.exists(), "the empty directory stayed");
    Ok(())
}

fn a_pin_directory_elsewhere_leaves_nothing() -> Outcome {
    sh("ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.1.0.1/24 dev lan0");
    let before = picture();
    let dir = tempfile::tempdir().expect("directory");
    let pin = dir.path().join("some/plumbing-elsewhere");
    let flag = format!("--pin={}", pin.display());
    // The second run must not stumble over the first.
    for _ in 0..2 {
        let (exit, text) = run(&["-i", "lan0", &flag]);
        let told = text.contains("not on a BPF file system") && !text.contains("killed run");
        ensure!(exit == Some(2) && told, "exit {exit:?}: {text}");
        ensure!(std::fs::read_dir(dir.path()).map_or(1, Iterator::count) == 0, "directories stayed");
        ensure!(!Path::new("/run/tproxy/plumbing-elsewhere").exists(), "state stayed");
    }
    // Files of others in such a directory are none of its business.
    std::fs::create_dir_all(&pin).expect("made");
    std::fs::write(pin.join("FLOWS"), "mine").expect("written");
    let (exit, text) = run(&["-i", "lan0", &flag]);
    ensure!(exit == Some(2) && pin.join("FLOWS").exists(), "exit {exit:?}: {text}");
    let (exit, text) = run(&["cleanup", &flag]);
    ensure!(exit == Some(0) && pin.join("FLOWS").exists(), "exit {exit:?}: {text}");
    expect_as_before(&before)
}

//! The program itself: exit codes, output, clean-up.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use super::world::{Outcome, Test, ensure, expect_as_before, picture, sh};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("usage_errors_are_one_line", usage_errors_are_one_line),
    ("check_prints_the_plan", check_prints_the_plan),
    ("check_finds_conflicts", check_finds_conflicts),
    ("nothing_running", nothing_running),
    ("cleanup_twice", cleanup_twice),
    ("privileges_are_named", privileges_are_named),
    ("old_kernels_are_named", old_kernels_are_named),
    ("a_closed_pipe_is_no_error", a_closed_pipe_is_no_error),
    ("pages_and_completions", pages_and_completions),
];

const PROGRAM: &str = env!("CARGO_BIN_EXE_tproxy-user");
const PIN: &str = "--pin=/sys/fs/bpf/plumbing-commands";

/// Exit code, standard output, standard error.
fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().expect("program");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn expect_error(args: &[&str], code: i32, words: &[&str]) -> Outcome {
    let (exit, _, stderr) = run(args);
    let one_line = stderr.lines().filter(|line| !line.contains("warning:")).count() == 1;
    ensure!(exit == Some(code) && one_line, "{args:?}: exit {exit:?}: {stderr}");
    ensure!(words.iter().all(|word| stderr.contains(word)), "{args:?}: {words:?} not in {stderr}");
    Ok(())
}

fn usage_errors_are_one_line() -> Outcome {
    expect_error(&[], 2, &["--iface"])?;
    expect_error(&["--iface", "lo0/"], 2, &["lo0/", "--iface"])?;
    expect_error(&["-i", "e", "--to", "10.0.0.1/8"], 2, &["--to", "10.0.0.1/8", "10.0.0.0/8"])?;
    expect_error(&["-i", "e", "--udp-timeout", "5"], 2, &["--udp-timeout", "'5'", "300s"])?;
    expect_error(&["-i", "e", "--dport", "53,99999"], 2, &["--dport", "99999"])?;
    expect_error(&["-i", "e", "--own-mark", "1"], 2, &["--own-mark", "--tproxy-mark"])?;
    expect_error(&["-i", "e", "--source", "clinet"], 2, &["clinet", "client-port"])?;
    expect_error(&["--ifcae", "e"], 2, &["--ifcae", "--iface"])?;
    expect_error(&["check", "--table", "main"], 2, &["--table", "main"])?;
    expect_error(&["cleanup", "--pin", "x"], 2, &["--pin", "absolute"])
}

fn check_prints_the_plan() -> Outcome {
    sh("ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.1.0.1/24 dev lan0");
    let before = picture();
    let (exit, stdout, stderr) =
        run(&["check", "-i", "lan0", "--dport", "53", "--not-to", "10.0.0.0/8", PIN]);
    ensure!(exit == Some(0) && stderr.is_empty(), "exit {exit:?}: {stderr}");
    for part in
        ["lan0 (index 2): capture", "iif lan0 fwmark 0x1/0x1 lookup 100", "not to: 10.0.0.0/8", "dport: 53\n"]
    {
        ensure!(stdout.contains(part), "{part} not in {stdout}");
    }
    let (exit, stdout, _) = run(&["check", "-i", "lan0", "--json", PIN]);
    let json: serde_json::Value = serde_json::from_str(&stdout).map_err(|error| error.to_string())?;
    ensure!(exit == Some(0) && json["interfaces"][0]["name"] == "lan0", "{stdout}");
    // As nobody, too.
    let output = Command::new(PROGRAM)
        .args(["check", "-i", "lan0", PIN])
        .uid(65534)
        .gid(65534)
        .output()
        .expect("program");
    ensure!(output.status.success(), "as nobody: {output:?}");
    expect_as_before(&before)?;
    expect_error(&["check", "-i", "eth9", PIN], 2, &["eth9", "lan0"])?;
    expect_error(&["check", "-i", "lo", PIN], 2, &["--own-traffic"])?;
    let (exit, _, stderr) = run(&["check", "-i", "ppp*", PIN]);
    ensure!(exit == Some(0) && stderr.contains("'ppp*'"), "exit {exit:?}: {stderr}");
    Ok(())
}

fn check_finds_conflicts() -> Outcome {
    sh("ip link add lan0 type bridge; ip link set lan0 up; ip rule add fwmark 1 lookup 100");
    expect_error(&["check", "-i", "lan0", PIN], 5, &["fwmark 0x1 lookup 100", "ip rule del pref"])?;
    let (exit, ..) = run(&["check", "-i", "lan0", "--table", "101", "--tproxy-mark", "0x10/0x10", PIN]);
    ensure!(exit == Some(0), "exit {exit:?}");
    Ok(())
}

fn nothing_running() -> Outcome {
    expect_error(&["flows", PIN], 3, &["no proxy is running", "plumbing-commands"])?;
    expect_error(&["status", PIN], 3, &["no proxy is running"])?;
    let (exit, stdout, _) = run(&["status", "--json", PIN]);
    ensure!(exit == Some(3) && stdout.contains("\"running\": false"), "exit {exit:?}: {stdout}");
    Ok(())
}

fn cleanup_twice() -> Outcome {
    let before = picture();
    for _ in 0..2 {
        let (exit, stdout, stderr) = run(&["cleanup", PIN]);
        ensure!(
            exit == Some(0) && stdout == "nothing to clean up\n" && stderr.is_empty(),
            "{stdout}{stderr}"
        );
    }
    expect_as_before(&before)?;
    ensure!(!std::path::Path::new("/run/tproxy/plumbing-commands").exists(), "files stayed");
    Ok(())
}

fn privileges_are_named() -> Outcome {
    for (args, word) in [(&["-i", "lo9", PIN][..], "CAP_NET_ADMIN"), (&["cleanup", PIN], "CAP_NET_ADMIN")] {
        let output = Command::new(PROGRAM).args(args).uid(65534).gid(65534).output().expect("program");
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(4) && stderr.contains(word), "{args:?}: {output:?}");
    }
    Ok(())
}

fn old_kernels_are_named() -> Outcome {
    expect_error(&["-i", "lan0", "--assume-kernel", "5.4", PIN], 4, &["5.4", "5.7"])
}

fn a_closed_pipe_is_no_error() -> Outcome {
    let full = std::fs::File::create("/dev/full").expect("/dev/full");
    let status =
        Command::new(PROGRAM).args(["completions", "bash"]).stdout(full).stderr(Stdio::null()).status();
    ensure!(status.expect("program").code() == Some(1), "a full disk is an error");
    let mut child = Command::new(PROGRAM)
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("program");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ended");
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Ok(())
}

fn pages_and_completions() -> Outcome {
    let dir = tempfile::tempdir().expect("directory");
    let (exit, _, stderr) = run(&["man", &dir.path().to_string_lossy()]);
    ensure!(exit == Some(0), "{stderr}");
    let mut pages: Vec<_> =
        std::fs::read_dir(dir.path()).expect("pages").flatten().map(|page| page.file_name()).collect();
    pages.sort();
    let commands =
        ["check", "cleanup", "completions", "doctor", "flows", "import", "reload", "run", "schema", "status"];
    let mut expected: Vec<_> = commands.iter().map(|name| format!("tproxy-user-{name}.8")).collect();
    expected.push("tproxy-user.8".to_owned());
    expected.sort();
    ensure!(pages == expected.iter().map(std::ffi::OsString::from).collect::<Vec<_>>(), "{pages:?}");
    for shell in ["bash", "zsh", "fish"] {
        let (exit, stdout, _) = run(&["completions", shell]);
        ensure!(exit == Some(0) && stdout.contains("own-traffic"), "{shell}: {stdout}");
    }
    Ok(())
}

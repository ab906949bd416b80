use super::*;
use crate::cli::{Cli, resolve};
use clap::Parser as _;

fn config(flags: &str) -> Config {
    let argv = ["tproxy-user", "--iface", "eth0"].into_iter().chain(flags.split_whitespace());
    resolve::config(&Cli::try_parse_from(argv).expect("flags").run).expect("valid")
}

fn conflict(error: &Error) -> String {
    match error {
        Error::Running(failure) => {
            assert_eq!(failure.exit_code(), 5);
            failure.to_string()
        }
        other => panic!("no conflict: {other}"),
    }
}

#[test]
fn one_at_a_time_and_nothing_stays() {
    let base = tempfile::tempdir().expect("directory");
    let run = base.path().join("run");
    let config = config("");
    let first = Instance::acquire_in(&run, &config).expect("first");
    let paths = first.paths().clone();
    let own_pid = i32::try_from(std::process::id()).expect("pid");
    assert_eq!(paths.running().expect("lock"), Some(own_pid));
    let error = Instance::acquire_in(&run, &config).expect_err("second");
    assert!(conflict(&error).contains(&format!("pid {own_pid}")));
    let error = Instance::acquire_leftover(paths.clone()).expect_err("it runs");
    assert!(conflict(&error).contains("is running as pid"));
    first.finish().expect("finish");
    assert_eq!(paths.running().expect("lock"), None);
    assert!(!run.exists());
}

#[test]
fn the_journal_of_a_killed_run_is_kept_until_undone() {
    let base = tempfile::tempdir().expect("directory");
    let config = config("");
    let mut killed = Instance::acquire_in(base.path(), &config).expect("first");
    killed.claim_routing(100, config.steering.mark).expect("claim");
    let journal = killed.state().journal.clone();
    drop(killed);
    // Killed again before it could undo anything.
    drop(Instance::acquire_in(base.path(), &config).expect("second"));
    let mut third = Instance::acquire_in(base.path(), &config).expect("third");
    assert_eq!(third.leftover().map(|state| &state.journal), Some(&journal));
    third.forget_leftover(None).expect("write");
    drop(third);
    let paths = Paths::under(base.path(), &config.pin);
    assert_eq!(paths.read_state().expect("state").map(|state| state.journal), Some(Journal::default()));
    let leftover = Instance::acquire_leftover(paths.clone()).expect("cleanup").expect("something");
    leftover.finish().expect("finish");
    assert!(Instance::acquire_leftover(paths).expect("cleanup").is_none());
}

#[test]
fn instances_do_not_share_table_or_mark() {
    let base = tempfile::tempdir().expect("directory");
    let mut first = Instance::acquire_in(base.path(), &config("")).expect("first");
    first.claim_routing(100, Mark { value: 1, mask: 1 }).expect("claim");
    let mut second = Instance::acquire_in(base.path(), &config("--pin /sys/fs/bpf/second")).expect("second");
    let same_table = second.claim_routing(100, Mark { value: 4, mask: 4 }).expect_err("table");
    assert!(conflict(&same_table).contains("table 100 is used by instance 'tproxy'"));
    let same_mark = second.claim_routing(101, Mark { value: 3, mask: 3 }).expect_err("mark");
    assert!(conflict(&same_mark).contains("overlaps mark 0x1/0x1"));
    second.claim_routing(101, Mark { value: 4, mask: 4 }).expect("free");
    drop(first);
    // A killed instance claims nothing; its rules are in the way by themselves.
    second.claim_routing(100, Mark { value: 1, mask: 1 }).expect("free");
}

#[test]
fn damaged_state_is_said() {
    let base = tempfile::tempdir().expect("directory");
    let paths = Paths::under(base.path(), Path::new("/sys/fs/bpf/x"));
    fs::create_dir_all(paths.dir()).expect("directory");
    fs::write(paths.state(), "{").expect("write");
    assert!(matches!(paths.read_state(), Err(Error::Damaged { .. })));
}

#[test]
fn control_socket_answers_root_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let base = tempfile::tempdir().expect("directory");
    let path = base.path().join("control.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let listener = runtime.block_on(async { control::bind(&path) }).expect("bind");
    assert_eq!(fs::metadata(&path).expect("socket").permissions().mode() & 0o777, 0o600);
    let client = std::thread::spawn({
        let path = path.clone();
        move || {
            let mut garbage = std::os::unix::net::UnixStream::connect(&path).expect("connect");
            io::Write::write_all(&mut garbage, b"{}\n").expect("write");
            let mut error = String::new();
            io::Read::read_to_string(&mut garbage, &mut error).expect("read");
            (error, control::ask(&path, control::Request::Status).expect("answer"))
        }
    });
    let answered = async {
        let serve = control::serve(listener, |request| async move { serde_json::json!({"asked": request}) });
        tokio::select! {
            () = serve => {}
            () = async { while !client.is_finished() { tokio::time::sleep(std::time::Duration::from_millis(5)).await } } => {}
        }
    };
    runtime.block_on(answered);
    let (error, answer) = client.join().expect("client");
    assert!(error.contains("not a request"), "{error}");
    assert_eq!(answer["asked"]["command"], "status");
}

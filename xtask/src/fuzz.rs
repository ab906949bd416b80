//! `cargo xtask fuzz`: the fuzz targets of `tproxy-common/fuzz` and `tproxy-user/fuzz`.
//!
//! cargo-fuzz instruments them with the coverage passes that every LLVM has, so
//! that the compiler of the workspace will do, and no nightly is needed. There
//! is no address sanitizer: the code under test has no `unsafe`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    build, compiler, packages,
    term::{self, Step},
    workspace,
};

/// Flags of `cargo xtask fuzz`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Targets to run [default: all]
    #[arg(value_name = "TARGET")]
    targets: Vec<Target>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Run one target on one input alone, as the report of a crash gives it
    #[arg(long, value_name = "HEX", requires = "targets", value_parser = parse_hex)]
    input: Option<Bytes>,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask fuzz                          every target for a minute
  cargo xtask fuzz parse --seconds 3600     one target for an hour
  cargo xtask fuzz parse --input 4500001c   one input again

Inputs that reach new code are kept in target/fuzz/corpus and tried first the next time.";

/// A fuzz target: what the bytes that the fuzzer makes are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// A packet, parsed by the real parser and a naive one
    Parse,
    /// A recipe of a nearly valid packet, which is then parsed by both
    Generate,
    /// Addresses, ports and a policy, classified by the real code and a naive model
    Classify,
    /// Lengths and counts of a merged (GRO) packet, and what it is on the wire
    Segments,
    /// The first bytes of a TCP connection, and the name that they tell
    Stream,
    /// The first message of TLS, which tells the same in records and in QUIC datagrams
    Hello,
    /// A client's QUIC datagrams, and what protected ones carry
    Initials,
    /// A DNS answer
    Answer,
    /// What a SOCKS5 server says in a handshake
    Socks5,
    /// A datagram that a SOCKS5 server brings
    Datagram,
    /// What an HTTP proxy server answers
    Http,
}

/// A crate of targets, which is built by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Common,
    /// Not part of the tests: what it depends on takes a minute to build. The properties that it
    /// looks after are among the unit tests too.
    User,
}

impl Home {
    const ALL: [Self; 2] = [Self::Common, Self::User];

    const fn directory(self) -> &'static str {
        match self {
            Self::Common => "tproxy-common/fuzz",
            Self::User => "tproxy-user/fuzz",
        }
    }

    /// The longest input. A name is found behind most of a message, but a header is short: longer
    /// than all that are read, but for absurd ones.
    const fn most_bytes(self) -> u32 {
        match self {
            Self::Common => 512,
            Self::User => 2048,
        }
    }
}

/// An input, told from a list of arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bytes(Vec<u8>);

/// The version that was tried with these targets.
const CARGO_FUZZ: &str = "0.13.2";

const COMPILER: packages::Need = packages::Need::new("c++", "g++", "compiling libFuzzer");

impl Target {
    /// Those that are tests too.
    pub(crate) fn tests() -> impl Iterator<Item = Self> {
        Self::value_variants().iter().copied().filter(|target| target.home() == Home::Common)
    }

    const fn home(self) -> Home {
        match self {
            Self::Parse | Self::Generate | Self::Classify | Self::Segments => Home::Common,
            Self::Stream
            | Self::Hello
            | Self::Initials
            | Self::Answer
            | Self::Socks5
            | Self::Datagram
            | Self::Http => Home::User,
        }
    }

    /// Its name on the command line, and of its program.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Generate => "generate",
            Self::Classify => "classify",
            Self::Segments => "segments",
            Self::Stream => "stream",
            Self::Hello => "hello",
            Self::Initials => "initials",
            Self::Answer => "answer",
            Self::Socks5 => "socks5",
            Self::Datagram => "datagram",
            Self::Http => "http",
        }
    }
}

/// Runs the task: every target, also after one that fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    let targets = if args.targets.is_empty() { Target::value_variants() } else { &args.targets };
    let fuzzers = Fuzzers::build(targets)?;
    if let Some(input) = &args.input {
        let [target] = targets else { bail!("--input is for one target") };
        fuzzers.reproduce(*target, &input.0)?;
        println!("fuzz: {}: nothing wrong with this input", target.name());
        return Ok(());
    }
    let mut failed = Vec::new();
    for target in targets {
        match fuzzers.fuzz(*target, Duration::from_secs(args.seconds)) {
            Ok(inputs) => println!("fuzz: {}: passed: {inputs} inputs in {} s", target.name(), args.seconds),
            Err(error) => {
                println!("fuzz: {}: FAILED: {error:#}", target.name());
                failed.push(target.name());
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("fuzz: {} failed: {}", failed.len(), failed.join(", "))
}

/// The targets, built.
pub(crate) struct Fuzzers {
    programs: PathBuf,
}

impl Fuzzers {
    /// Builds the targets, with those beside them, and before that cargo-fuzz where it is not there.
    ///
    /// # Errors
    /// No C++ compiler and none can be installed, no network to the crate
    /// registry, or a target does not compile.
    pub(crate) fn build(targets: &[Target]) -> Result<Self> {
        let _lock = build::lock()?;
        packages::ensure(&[COMPILER])?;
        let tools = cargo_fuzz()?;
        for home in Home::ALL {
            if targets.iter().any(|target| target.home() == home) {
                build_targets(home, &tools)?;
            }
        }
        let rustc = compiler::output(Command::new("rustc").arg("-vV").current_dir(workspace::root()))
            .map_err(anyhow::Error::msg)?;
        let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).context("no host triple")?;
        Ok(Self { programs: directory().join(host).join("release") })
    }

    /// Runs a target for some time; how many inputs it has tried.
    ///
    /// # Errors
    /// An input makes it fail: printed in hex, with the command that runs it again.
    pub(crate) fn fuzz(&self, target: Target, time: Duration) -> Result<u64> {
        let corpus = directory().join("corpus").join(target.name());
        fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
        let culprit = directory().join(format!("crash-{}", target.name()));
        remove_old(&culprit)?;
        let mut exact = std::ffi::OsString::from("-exact_artifact_path=");
        exact.push(&culprit);
        let label = format!("fuzzing {}", target.name());
        let home = target.home();
        let seeds = workspace::root().join(home.directory()).join("seeds").join(target.name());
        let done = Step::new(&label, &log_name(target)).run(
            self.program(target)
                // What it finds goes into the first.
                .arg(&corpus)
                .args(seeds.is_dir().then_some(seeds))
                .arg(exact)
                .arg(format!("-max_total_time={}", time.as_secs()))
                .arg(format!("-max_len={}", home.most_bytes()))
                .args(["-timeout=10", "-print_final_stats=1"]),
        );
        match done {
            Ok(log) => executed(&fs::read_to_string(log)?).context("the fuzzer has not said what it did"),
            Err(error) => match fs::read(&culprit) {
                Ok(input) => Err(error.context(format!(
                    "an input of {} bytes; to run it again: cargo xtask fuzz {} --input {}",
                    input.len(),
                    target.name(),
                    hex(&input)
                ))),
                Err(_) => Err(error),
            },
        }
    }

    /// Runs a target on one input.
    fn reproduce(&self, target: Target, input: &[u8]) -> Result<()> {
        let file = directory().join("input");
        fs::write(&file, input).with_context(|| format!("cannot write {}", file.display()))?;
        Step::new("running one input", &log_name(target)).run(self.program(target).arg(&file)).map(drop)
    }

    /// The program of a target. A backtrace would push what is wrong out of the end of the log.
    fn program(&self, target: Target) -> Command {
        let mut command = Command::new(self.programs.join(target.name()));
        command.env("RUST_BACKTRACE", "0");
        command
    }
}

fn build_targets(home: Home, tools: &Path) -> Result<()> {
    let mut cargo = workspace::cargo("fuzz");
    let toolchain = Path::new(cargo.get_program()).parent().unwrap_or(Path::new("")).to_owned();
    let path = env::var_os("PATH").unwrap_or_default();
    // cargo-fuzz calls `cargo`: it is to be the one of this task.
    let path = env::join_paths([tools.to_owned(), toolchain].into_iter().chain(env::split_paths(&path)))?;
    let label = format!("building the targets of {}", home.directory());
    let arguments = ["build", "--fuzz-dir", home.directory(), "--sanitizer", "none"];
    Step::new(&label, "fuzz-build")
        .run(
            cargo
                .args(arguments)
                .arg("--target-dir")
                .arg(directory())
                .env("PATH", path)
                // They would take the place of cargo-fuzz's own.
                .env_remove("CARGO_ENCODED_RUSTFLAGS"),
        )
        .map(drop)
}

/// Where everything of the fuzzers lies.
fn directory() -> PathBuf {
    workspace::target().join("fuzz")
}

fn log_name(target: Target) -> String {
    format!("fuzz-{}", target.name())
}

/// Finds or builds cargo-fuzz; the directory of the program.
fn cargo_fuzz() -> Result<PathBuf> {
    let root = workspace::target().join("tools").join(format!("cargo-fuzz-{CARGO_FUZZ}"));
    let bin = root.join("bin");
    if bin.join("cargo-fuzz").is_file() {
        return Ok(bin);
    }
    term::say(&format!(
        "building cargo-fuzz {CARGO_FUZZ}, which builds the fuzz targets (once, about a minute)"
    ));
    Step::new("building cargo-fuzz", "cargo-fuzz").run(
        workspace::cargo("install")
            .args(["cargo-fuzz", "--version", CARGO_FUZZ, "--locked", "--force", "--debug"])
            .arg("--root")
            .arg(&root)
            .arg("--target-dir")
            .arg(workspace::target().join("tools/build")),
    )?;
    Ok(bin)
}

fn remove_old(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Reads from a fuzzer's output how many inputs it has tried.
fn executed(log: &str) -> Option<u64> {
    log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?.trim().parse().ok()
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

fn parse_hex(text: &str) -> Result<Bytes, String> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("expected pairs of hexadecimal digits".to_owned());
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).map_err(|error| error.to_string()))
        .collect::<Result<_, _>>()
        .map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_survives_its_report() {
        let input = vec![0x00, 0x7f, 0x80, 0xff];
        assert_eq!(hex(&input), "007f80ff");
        assert_eq!(parse_hex(&hex(&input)), Ok(Bytes(input)));
        assert!(parse_hex("0").is_err());
        assert!(parse_hex("0x").is_err());
    }

    #[test]
    fn the_number_of_inputs_is_read() {
        let log = "Done 5 runs in 1 second(s)\nstat::number_of_executed_units: 1234\nstat::x: 5\n";
        assert_eq!(executed(log), Some(1234));
        assert_eq!(executed("nothing"), None);
    }
}

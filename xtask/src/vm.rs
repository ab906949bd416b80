//! The kernel matrix: the tests of parts `golden` and `netns` on Debian's
//! kernels, each in a virtual machine that needs no root and no acceleration.

mod archive;
mod debian;
mod guest;
mod kernel;
mod modules;
mod qemu;
mod results;
mod root;
mod table;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use xtask::lab::{NOTE, selection};

use self::archive::Archive;
use self::debian::Unpacked;
use self::guest::{Ended, Guest, Size};
pub(crate) use self::kernel::Kernel;
use self::qemu::Qemu;
use self::results::Results;
pub(crate) use self::root::Test;
use crate::recap::Recap;
use crate::term::{Progress, say};
use crate::totals::Totals;
use crate::{needs, packages, workspace};

/// Guests with their share of the matrix, with everything, with 100,000 connections, and one that
/// counts instructions. A second processor costs a third more of the machine's time: emulated ones
/// wait for each other.
const SHARE: Size = Size { limit: Duration::from_mins(30), processors: 1, memory: 2048, counted: false };
const EVERYTHING: Size = Size { limit: Duration::from_hours(1), processors: 2, ..SHARE };
const IDLE: Size = Size { memory: 5120, ..EVERYTHING };
const COUNTED: Size = Size { limit: Duration::from_mins(5), processors: 1, memory: 1024, counted: true };

/// What is to be run, and where.
pub(crate) struct Matrix<'a> {
    /// The kernels, each with every scenario; none: all of them, each with its share.
    pub(crate) kernels: &'a [Kernel],
    /// The test executables.
    pub(crate) tests: &'a [Test],
    /// The `tproxy-user` that the scenarios start.
    pub(crate) proxy: &'a Path,
    /// Arguments of the executables.
    pub(crate) filters: &'a [String],
}

impl Matrix<'_> {
    /// Runs it, prints what came of it and writes `target/vm/results.json`; what failed is
    /// left to `recap`.
    ///
    /// # Errors
    /// Where no guest can be made at all.
    pub(crate) fn run(&self, recap: &mut Recap) -> Result<Totals> {
        if cfg!(not(target_arch = "x86_64")) {
            println!("vm: skipped: the kernels are fetched for x86-64 only");
            return Ok(Totals { skipped: 1, ..Totals::default() });
        }
        let qemu = Qemu::ensure()?;
        packages::ensure(needs::VM)?;
        println!("\nvm: golden and netns on other kernels");
        let mut totals = Totals::default();
        let mut ready = Vec::new();
        let kernels = if self.kernels.is_empty() { &Kernel::LONGEST_FIRST } else { self.kernels };
        for kernel in kernels {
            match debian::fetch(*kernel) {
                Ok(unpacked) => ready.push((*kernel, unpacked)),
                Err(error) => {
                    println!("Linux {}: skipped: cannot be had: {error:#}", kernel.name());
                    totals.skipped += 1;
                }
            }
        }
        let archive = root::common(self.tests, self.proxy)?;
        let done = self.run_guests(&qemu, &archive, ready)?;
        let columns: Vec<_> =
            done.iter().map(|(kernel, _, results)| (self.heading(*kernel), results)).collect();
        if !columns.is_empty() {
            println!("\n{}", table::render(&columns));
        }
        for (_, release, results) in &done {
            results.failures().for_each(|failure| recap.note(format!("vm: Linux {release}: {failure}")));
        }
        record(&done)?;
        for (_, _, results) in &done {
            totals.add(results.totals());
        }
        Ok(totals)
    }

    fn heading(&self, kernel: Kernel) -> String {
        if self.kernels.is_empty() {
            return format!("{} {}", kernel.name(), kernel.selection().family.name());
        }
        kernel.name().to_owned()
    }

    /// As many at a time as the machine has cores and memory for.
    fn run_guests(
        &self,
        qemu: &Qemu,
        archive: &Archive,
        ready: Vec<(Kernel, Unpacked)>,
    ) -> Result<Vec<(Kernel, String, Results)>> {
        let started = Instant::now();
        let places = places(self.size())?;
        let label = format!("{} kernels, {places} at a time", ready.len());
        let mut progress = Progress::new(&label);
        let (mut waiting, mut running, mut done) = (ready.into_iter(), Vec::new(), Vec::new());
        loop {
            while running.len() < places {
                let Some((kernel, unpacked)) = waiting.next() else { break };
                running.push((self.boot(qemu, archive.clone(), kernel, &unpacked)?, unpacked.release));
            }
            if running.is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(200));
            progress.tick(started.elapsed(), || {
                let state = |(guest, _): &(Guest, String)| {
                    let output = guest.output();
                    let tests = output.lines().filter(|line| line.starts_with("test ")).count();
                    let note = notes(&output).last().map_or_else(String::new, |note| format!(", {note}"));
                    format!("{}: {tests} tests{note}", guest.kernel.name())
                };
                running.iter().map(state).collect::<Vec<_>>().join(", ")
            });
            for (mut guest, release) in std::mem::take(&mut running) {
                match guest.ended()? {
                    None => running.push((guest, release)),
                    Some(ended) => {
                        let results = self.judge(&release, &ended);
                        println!(
                            "Linux {release}: {} in {} s",
                            results.totals().line(),
                            ended.elapsed.as_secs()
                        );
                        notes(&ended.output).for_each(|note| println!("  {note}"));
                        results.faults.iter().for_each(|fault| println!("  FAILED: {fault}"));
                        done.push((guest.kernel, release, results));
                    }
                }
            }
        }
        progress.finish(started.elapsed(), true);
        done.sort_by_key(|(kernel, ..)| *kernel);
        Ok(done)
    }

    fn boot(&self, qemu: &Qemu, mut archive: Archive, kernel: Kernel, unpacked: &Unpacked) -> Result<Guest> {
        let all = self.kernels.is_empty();
        modules::add(&mut archive, unpacked)?;
        root::add_run(&mut archive, self.tests, self.filters, all.then(|| kernel.selection()))?;
        let dir = workspace::target().join("vm").join(kernel.suite()).join("run");
        Guest::boot(qemu.command(), kernel, unpacked, &archive.finish()?, dir, self.size())
    }

    fn size(&self) -> Size {
        if self.kernels.is_empty() {
            SHARE
        } else if self.filters.iter().any(|filter| filter == selection::IDLE) {
            IDLE
        } else {
            EVERYTHING
        }
    }

    fn judge(&self, release: &str, ended: &Ended) -> Results {
        let expected: Vec<&str> = self.tests.iter().map(|test| test.name.as_str()).collect();
        let mut results = Results::parse(&ended.output, release, &expected);
        results.faults.extend(ended.crash.clone());
        results
    }
}

/// What a program prints in a guest of this kernel in which a nanosecond is an instruction; `script`
/// runs it, by its file name.
///
/// # Errors
/// The guest cannot be made, or crashes.
pub(crate) fn run_counted(kernel: Kernel, program: &Path, script: &str) -> Result<String> {
    let qemu = Qemu::ensure()?;
    packages::ensure(needs::VM)?;
    let unpacked = debian::fetch(kernel)?;
    let archive = root::of_program(program, script)?.finish()?;
    let dir = workspace::target().join("vm").join(kernel.suite()).join("counted");
    let started = Instant::now();
    let label = format!("counting instructions on Linux {}", unpacked.release);
    let mut progress = Progress::new(&label);
    let mut guest = Guest::boot(qemu.command(), kernel, &unpacked, &archive, dir, COUNTED)?;
    let ended = loop {
        if let Some(ended) = guest.ended()? {
            break ended;
        }
        thread::sleep(Duration::from_millis(200));
        progress.tick(started.elapsed(), String::new);
    };
    progress.finish(started.elapsed(), ended.crash.is_none());
    match ended.crash {
        Some(crash) => bail!("the guest: {crash}"),
        None => Ok(ended.output),
    }
}

/// As many guests run as there are cores, where the memory is there.
fn places(size: Size) -> Result<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let available =
        meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    let mib: u64 = available.context("no MemAvailable")?.parse::<u64>()? / 1024;
    let memory = usize::try_from(mib / (size.memory * 3 / 2))?;
    Ok(thread::available_parallelism()?.get().min(memory).max(1))
}

/// What the scenarios of a guest have told.
fn notes(output: &str) -> impl DoubleEndedIterator<Item = &str> {
    output.lines().filter_map(|line| line.strip_prefix(NOTE))
}

/// Writes the results for other programs.
fn record(done: &[(Kernel, String, Results)]) -> Result<()> {
    let path = workspace::target().join("vm/results.json");
    let kernels: Vec<_> = done
        .iter()
        .map(|(kernel, release, results)| json!({ "kernel": kernel.name(), "release": release, "results": results }))
        .collect();
    fs::write(&path, serde_json::to_vec_pretty(&kernels)?)?;
    say(&format!("results: {}", path.display()));
    Ok(())
}

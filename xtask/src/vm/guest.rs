//! One virtual machine: QEMU without acceleration, from its start to its end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use xtask::lab::reclaim;

use super::debian::Unpacked;
use super::kernel::Kernel;

/// How many of the console's last lines tell of a crash.
const TAIL: usize = 30;

/// What a guest has, and how long it may run.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) limit: Duration,
    pub(crate) processors: usize,
    /// In MiB. The initramfs is in it twice while it is unpacked.
    pub(crate) memory: u64,
    /// Its clocks tick once for each instruction, and so does its processor's counter: what takes
    /// a nanosecond there is one instruction, on every machine.
    pub(crate) counted: bool,
}

/// A running guest; killed when dropped.
pub(crate) struct Guest {
    pub(crate) kernel: Kernel,
    child: Child,
    _signals: reclaim::Supervised,
    started: Instant,
    limit: Duration,
    dir: PathBuf,
}

/// How a guest has ended.
pub(crate) struct Ended {
    /// What the tests have printed.
    pub(crate) output: String,
    /// Why it counts as crashed, with the end of the console; `None`: it did not.
    pub(crate) crash: Option<String>,
    pub(crate) elapsed: Duration,
}

impl Guest {
    /// Boots a kernel; `dir` gets the initramfs and what the ports print.
    pub(crate) fn boot(
        mut qemu: Command,
        kernel: Kernel,
        unpacked: &Unpacked,
        initramfs: &[u8],
        dir: PathBuf,
        size: Size,
    ) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let initrd = dir.join("initramfs");
        fs::write(&initrd, initramfs)?;
        // Never KVM: inside another virtual machine it may open, and abort later.
        // la57=off: cheaper page walks. cx16=off: QEMU 7.2 returns wrong flags from
        // cmpxchg16b, so that guests crash at random. erms, fsrm: with them the kernel
        // copies byte by byte what is emulated step by step; without, the verifier
        // needs two thirds of the time. Without the rest a change of tasks or into the
        // kernel is emulated in fewer steps, a sixth of all time; AVX has to go with
        // xsave, or Linux 7.2 dies of its PCLMULQDQ code, which takes it for given.
        if size.counted {
            qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi"]);
        }
        qemu.args(["-M", "pc"])
            .args([
                "-cpu",
                "max,la57=off,cx16=off,erms=off,fsrm=off,smap=off,smep=off,umip=off,pku=off,\
                 xsave=off,avx=off,avx2=off,fma=off,f16c=off,pclmulqdq=off",
            ])
            .args(["-smp", &size.processors.to_string(), "-m", &size.memory.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&unpacked.image)
            .arg("-initrd")
            .arg(&initrd)
            .arg("-append")
            .arg(
                // no_timer_check: on a busy machine the emulated timer may tick too late
                // for the check at boot, and the kernel panics. slab_debug: without cx16 Linux has
                // no memory for notes at sockets since 6.19, but from caches that are checked; older
                // kernels know it by another name, and do not need it.
                "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off \
                 random.trust_cpu=on tsc=reliable no_timer_check slab_debug=F,kmalloc-*",
            );
        for port in ["console", "output", "marker"] {
            fs::write(dir.join(port), "")?;
            qemu.arg("-serial").arg(format!("file:{}", dir.join(port).display()));
        }
        let log = File::create(dir.join("qemu"))?;
        qemu.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = qemu.spawn().context("cannot run QEMU")?;
        let signals = reclaim::supervise(child.id());
        Ok(Self { kernel, child, _signals: signals, started: Instant::now(), limit: size.limit, dir })
    }

    /// What the tests have printed so far.
    pub(crate) fn output(&self) -> String {
        read(&self.dir.join("output"))
    }

    /// How it has ended, once it has; it is stopped when its time is over.
    pub(crate) fn ended(&mut self) -> Result<Option<Ended>> {
        let late = self.started.elapsed() >= self.limit;
        if self.child.try_wait()?.is_none() {
            if !late {
                return Ok(None);
            }
            self.child.kill()?;
            self.child.wait()?;
        }
        // QEMU exits with 0 after a panic of the guest too.
        let marked = read(&self.dir.join("marker")).lines().any(|line| line.starts_with("exit "));
        let crash = (!marked).then(|| {
            let why = if late {
                format!("not done within {} s", self.limit.as_secs())
            } else {
                "it ended before its tests did".to_owned()
            };
            let last = ["qemu", "console"].map(|file| tail(&read(&self.dir.join(file)))).concat();
            format!("{why}; the end of its console ({}):\n{last}", self.dir.join("console").display())
        });
        fs::remove_file(self.dir.join("initramfs"))?;
        Ok(Some(Ended { output: self.output(), crash, elapsed: self.started.elapsed() }))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It has ended, in most cases.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).replace('\r', "")
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL)..];
    last.iter().flat_map(|line| ["    ", line, "\n"]).collect()
}

//! What the processes of a candidate use.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// The processes of some process groups: each program is started in one of its own.
pub(crate) struct Processes(Vec<u32>);

impl Processes {
    /// Those that there are now.
    pub(crate) fn of(groups: &[u32]) -> Result<Self> {
        let numbers =
            fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let found: Vec<u32> =
            numbers.filter(|pid| group(*pid).is_some_and(|of| groups.contains(&of))).collect();
        ensure!(!found.is_empty(), "it has ended");
        Ok(Self(found))
    }

    /// Processor time that they have used so far, in seconds.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        // proc(5): utime and stime are fields 14 and 15, in ticks of 1/100 s.
        let ticks = |pid: &u32| -> u32 {
            let fields = stat(*pid).unwrap_or_default();
            fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum()
        };
        f64::from(self.0.iter().map(ticks).sum::<u32>()) / 100.0
    }

    /// Bytes of memory that they occupy: their resident sets.
    pub(crate) fn memory(&self) -> Result<u64> {
        let resident = |pid: &u32| -> Result<u64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).context("it has ended")?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
        };
        self.0.iter().map(resident).sum()
    }

    /// Inodes of the sockets that they have open.
    pub(crate) fn sockets(&self) -> BTreeSet<u64> {
        let open = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let inode = |path: &Path| {
            let target = fs::read_link(path).ok()?;
            target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        };
        self.0.iter().flat_map(open).filter_map(|file| inode(&file.ok()?.path())).collect()
    }
}

/// Time of all processors so far, in ticks: all of it, and what was spent on something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Processors {
    all: f64,
    busy: f64,
}

impl Processors {
    pub(crate) fn now() -> Result<Self> {
        Self::of(&fs::read_to_string("/proc/stat")?).context("/proc/stat has no line of all processors")
    }

    /// The first line of `proc_stat(5)`: user (a guest's among it), nice, system, idle, iowait, irq,
    /// softirq, steal.
    fn of(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<f64> = fields.take(8).map(|field| field.parse().ok()).collect::<Option<_>>()?;
        let all = ticks.iter().sum::<f64>();
        Some(Self { all, busy: all - ticks.iter().skip(3).take(2).sum::<f64>() })
    }

    /// What share they were busy since then.
    pub(crate) fn busy_since(self, before: Self) -> f64 {
        (self.busy - before.busy) / (self.all - before.all).max(1.0)
    }
}

/// Bytes of the kernel's objects, such as sockets, whoever has them made; `None`: it does not tell.
pub(crate) fn kernel_memory() -> Option<u64> {
    fs::read_to_string("/proc/slabinfo").ok().map(|table| bytes_of_objects(&table))
}

/// Of lines as in slabinfo(5): name, objects in use, all objects, bytes of one, and more.
fn bytes_of_objects(table: &str) -> u64 {
    let bytes = |line: &str| -> Option<u64> {
        let mut fields = line.split_whitespace().skip(1);
        Some(fields.next()?.parse::<u64>().ok()? * fields.nth(1)?.parse::<u64>().ok()?)
    };
    table.lines().filter_map(bytes).sum()
}

/// The fields of `/proc/PID/stat` from the third on: the second is in parentheses and may hold blanks.
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit(')').next()?.split_whitespace().map(str::to_owned).collect())
}

fn group(pid: u32) -> Option<u32> {
    stat(pid)?.get(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn objects_of_the_kernel_are_summed_up() {
        let table = "\
slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit>
TCP                   53    104   2368   13    8 : tunables    0    0    0 : slabdata      8      8      0
filp                 506    651    192   21    1 : tunables    0    0    0 : slabdata     31     31      0
";
        assert_eq!(bytes_of_objects(table), 53 * 2368 + 506 * 192);
    }

    #[test]
    fn processors_are_busy_with_all_but_waiting() {
        let then = Processors::of("cpu  10 20 30 400 50 6 7 8 0 0\ncpu0 1 2 3 4\n").expect("processors");
        assert_eq!(then, Processors { all: 531.0, busy: 81.0 });
        let now = Processors::of("cpu  40 20 60 430 60 6 7 8 0 0\n").expect("processors");
        assert!((now.busy_since(then) - 0.6).abs() < 1e-9);
        assert_eq!(Processors::of("cpu  10 x\n"), None);
        assert_eq!(Processors::of("intr 10\n"), None);
    }

    #[test]
    fn this_process_is_one_of_its_group() {
        let own = Processes::of(&[group(std::process::id()).expect("a group")]).expect("processes");
        assert!(own.0.contains(&std::process::id()));
        assert!(own.memory().expect("memory") > 100_000);
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).expect("a link");
        let inode =
            link.to_string_lossy().replace(|c: char| !c.is_ascii_digit(), "").parse().expect("a number");
        assert!(own.sockets().contains(&inode));
    }
}

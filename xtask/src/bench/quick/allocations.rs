//! Allocations of a process: calls of the C library's allocator, counted by the kernel
//! (uprobes of `perf_event_open`, `CONFIG_UPROBE_EVENTS`, Linux 4.17).

use std::ffi::{CStr, CString};
use std::fs;

use anyhow::{Context as _, Result, ensure};
use perf_event_open::config::{Cpu, Opts, Proc};
use perf_event_open::count::Counter;
use perf_event_open::event::dp::Uprobe;

/// Counters of a process: one for each function and thread.
pub(super) struct Allocations(Vec<Counter>);

impl Allocations {
    /// Counts from now on what the threads allocate that a process has.
    pub(super) fn attach(pid: u32) -> Result<Self> {
        let allocator: [(&str, usize); 5] = [
            ("malloc", libc::malloc as *const () as usize),
            ("calloc", libc::calloc as *const () as usize),
            ("realloc", libc::realloc as *const () as usize),
            ("posix_memalign", libc::posix_memalign as *const () as usize),
            ("aligned_alloc", libc::aligned_alloc as *const () as usize),
        ];
        let own_maps = fs::read_to_string("/proc/self/maps")?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("it has ended")?;
        let mut counters = Vec::new();
        for (name, address) in allocator {
            let (library, offset) = place(&own_maps, address).context("no C library is loaded")?;
            ensure!(
                maps.contains(&library),
                "the proxy does not use {library}: what it allocates is not seen"
            );
            // The event wants a path that stays: here a few dozen bytes a run.
            let path: &'static CStr = Box::leak(CString::new(library)?.into_boxed_c_str());
            for thread in fs::read_dir(format!("/proc/{pid}/task")).context("it has ended")? {
                let thread = thread?.file_name().to_string_lossy().parse()?;
                let counter =
                    Counter::new(Uprobe { path, offset }, (Proc(thread), Cpu::ALL), Opts::default())
                        .with_context(|| format!("cannot count calls of {name} (perf_event_open, uprobe)"))?;
                counter.enable()?;
                counters.push(counter);
            }
        }
        Ok(Self(counters))
    }

    /// How many there were until now.
    pub(super) fn count(&self) -> Result<u64> {
        self.0.iter().map(|counter| Ok(counter.stat()?.count)).sum()
    }
}

/// The file that is mapped at an address, and where in it the address is.
fn place(maps: &str, address: usize) -> Option<(String, u64)> {
    maps.lines().find_map(|line| {
        // begin-end, permissions, offset, device, inode, path.
        let words: Vec<_> = line.split_whitespace().collect();
        let (begin, end) = words.first()?.split_once('-')?;
        let hexadecimal = |word: &str| u64::from_str_radix(word, 16).ok();
        let address = address as u64;
        let (begin, end, offset) = (hexadecimal(begin)?, hexadecimal(end)?, hexadecimal(words.get(2)?)?);
        let path = words.get(5)?;
        (begin..end).contains(&address).then(|| ((*path).to_owned(), offset + address - begin))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_in_the_file_that_is_mapped_there() {
        let maps = "\
7f00-7f10 r--p 00000000 fd:00 12 /lib/libc.so.6
7f10-7f40 r-xp 00000010 fd:00 12 /lib/libc.so.6
7f50-7f60 rw-p 00000000 00:00 0
";
        assert_eq!(place(maps, 0x7f18), Some(("/lib/libc.so.6".to_owned(), 0x18)));
        assert_eq!(place(maps, 0x7f40), None);
        assert_eq!(place(maps, 0x7f58), None);
    }

    #[test]
    fn the_allocator_is_in_the_c_library() {
        let maps = fs::read_to_string("/proc/self/maps").expect("maps");
        let (library, _) = place(&maps, libc::malloc as *const () as usize).expect("the library");
        assert!(library.contains("libc"), "{library}");
    }
}

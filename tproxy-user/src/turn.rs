//! Turns of a busy worker on its processor.
//!
//! Workers have epoll instances and connections of their own. Where two that always have something
//! to do share a processor, the scheduler lets each run until a tick after its slice is over, 4 ms
//! at 250 Hz, and all connections of the other wait. So a worker that has run for a [`LENGTH`]
//! without a pause lets others run. For that it gives up what is left of its slice, and more
//! than its share where that is long: so it asks for slices that are as short as its turns
//! (`sched_attr.sched_runtime`, kernel/sched/syscalls.c; Linux 6.12). Older kernels have none, and
//! nothing is changed there.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use nix::sched::sched_yield;
use nix::sys::resource::{UsageWho, getrusage};

/// How long a worker runs before others have their turn. Linux takes 0.1 to 100 ms.
const LENGTH: Duration = Duration::from_micros(100);

/// Who waits for longer than this has slept. Taking many events takes less; and whether a shorter
/// wait was a sleep takes a system call to tell, which at this rate matters little.
const PAUSE: Duration = Duration::from_micros(50);

thread_local! {
    static TURN: Turn = Turn::begin();
}

/// Lets others run that wait for the processor of this thread, if it has not slept for a while.
/// To be called before it waits for something to do.
pub(crate) fn give_way() {
    TURN.with(Turn::give_way);
}

/// To be called when it has waited.
pub(crate) fn go_on() {
    TURN.with(Turn::go_on);
}

/// The turn of a thread.
struct Turn {
    ends: Cell<Instant>,
    /// When what it waits has become a pause.
    pauses_at: Cell<Instant>,
    /// The ends of turns, the next among them, before which a [`PAUSE`] was a short while ago. They
    /// need not be asked about.
    rested: Cell<u8>,
    /// How often it had slept when it was last looked at.
    sleeps: Cell<i64>,
    slices: Cell<Slices>,
}

/// The slices of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slices {
    /// The scheduler's own. A thread that sleeps often keeps them: with shorter ones it would
    /// interrupt who wakes it.
    Usual,
    /// As long as a turn.
    Short,
    /// There are no others.
    Fixed,
}

impl Turn {
    fn begin() -> Self {
        let now = Instant::now();
        Self {
            ends: Cell::new(now + LENGTH),
            pauses_at: Cell::new(now + PAUSE),
            rested: Cell::new(0),
            sleeps: Cell::new(sleeps()),
            slices: Cell::new(Slices::Usual),
        }
    }

    fn give_way(&self) {
        if self.slices.get() == Slices::Fixed {
            return;
        }
        let mut now = Instant::now();
        if now >= self.ends.get() {
            if self.end() {
                now = Instant::now();
            }
            self.ends.set(now + LENGTH);
        }
        self.pauses_at.set(now + PAUSE);
    }

    fn go_on(&self) {
        if self.slices.get() == Slices::Fixed {
            return;
        }
        let now = Instant::now();
        if now > self.pauses_at.get() {
            self.rested.set(3);
            // Short slices are given back at the end of a turn, so that one is not put off.
            if self.slices.get() == Slices::Usual {
                self.ends.set(now + LENGTH);
            }
        }
    }

    /// Whether others had their turn.
    fn end(&self) -> bool {
        let rested = self.rested.get();
        self.rested.set(rested.saturating_sub(1));
        let slept = rested > 0 || {
            let sleeps = sleeps();
            self.sleeps.replace(sleeps) != sleeps
        };
        let wanted = if slept { Slices::Usual } else { Slices::Short };
        if self.slices.get() != wanted {
            self.slices.set(ask_for(wanted));
        }
        let gives_way = self.slices.get() == Slices::Short;
        if gives_way {
            // It cannot fail (sched_yield(2)).
            let _ = sched_yield();
        }
        gives_way
    }
}

/// How often this thread has slept.
fn sleeps() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// Asks the scheduler for slices; tells which there are now.
fn ask_for(slices: Slices) -> Slices {
    let length = if slices == Slices::Short { LENGTH.as_nanos() } else { 0 };
    match u64::try_from(length).map_err(io::Error::other).and_then(set_slice) {
        Ok(true) => slices,
        Ok(false) => Slices::Fixed,
        Err(error) => {
            tracing::debug!(%error, "no short turns for busy workers");
            Slices::Fixed
        }
    }
}

/// Sets the slice of this thread in nanoseconds, zero for the usual; false where the kernel or the
/// policy of the thread has none.
fn set_slice(length: u64) -> io::Result<bool> {
    let mut attributes = attributes()?;
    // To others a run time means something else.
    if !matches!(i32::try_from(attributes.sched_policy), Ok(libc::SCHED_OTHER | libc::SCHED_BATCH)) {
        return Ok(false);
    }
    attributes.sched_runtime = length;
    // SAFETY: it reads the structure, which says how long it is.
    let answer = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length == 0 || self::attributes()?.sched_runtime == length)
}

/// How this thread is scheduled.
fn attributes() -> io::Result<libc::sched_attr> {
    #[expect(clippy::cast_possible_truncation, reason = "48 bytes")]
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    let mut attributes = libc::sched_attr {
        size: SIZE,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: it writes no more than `SIZE` bytes.
    let answer = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) };
    if answer == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;

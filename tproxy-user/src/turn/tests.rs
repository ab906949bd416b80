use std::sync::Barrier;
use std::thread;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::time::TimeValLike as _;
use nix::unistd::Pid;

use super::*;

/// What a thread that always has something to do runs at a time, on average, beside another on the
/// same processor.
fn run_at_a_time(between: fn()) -> Duration {
    let myself = Pid::from_raw(0);
    let allowed = sched_getaffinity(myself).expect("processors");
    let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).expect("a bit")).expect("a processor");
    let start = Barrier::new(2);
    let busy = || {
        let mut cpu = CpuSet::new();
        cpu.set(first).expect("a bit");
        sched_setaffinity(myself, &cpu).expect("one of ours");
        start.wait();
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            between();
        }
        let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("our usage");
        let ran = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        let turns = usage.involuntary_context_switches().max(1);
        Duration::from_micros(u64::try_from(ran / turns).expect("no time runs back"))
    };
    thread::scope(|scope| {
        let other = scope.spawn(busy);
        let one = scope.spawn(busy).join().expect("it ends");
        one.max(other.join().expect("it ends"))
    })
}

fn has_slices() -> bool {
    thread::spawn(|| ask_for(Slices::Short) == Slices::Short).join().expect("it ends")
}

#[test]
fn the_busy_take_short_turns_where_the_kernel_has_slices() {
    let (with, without) = (run_at_a_time(give_way), run_at_a_time(|| ()));
    assert!(with < 4 * LENGTH || !has_slices(), "{with:?} at a time, without giving way {without:?}");
}

/// The slice of a thread before it is busy, when it has been until its slice is another or for this
/// long, and after it has waited in this way.
fn slices_around(limit: Duration, wait: fn(&Turn)) -> [u64; 3] {
    let slice = || attributes().expect("our own").sched_runtime;
    let thread = thread::spawn(move || {
        let before = slice();
        let (until, turn) = (Instant::now() + limit, Turn::begin());
        // Where much else runs, what interrupts the wait counts as a pause, for some turns.
        while slice() == before && Instant::now() < until {
            turn.give_way();
            turn.go_on();
        }
        let busy = slice();
        wait(&turn);
        [before, busy, slice()]
    });
    thread.join().expect("it ends")
}

#[test]
fn slices_are_short_while_a_thread_is_busy() {
    // As a wait for longer than a pause, and as one of which it knows nothing.
    let long: fn(&Turn) = |turn| {
        turn.give_way();
        thread::sleep(Duration::from_millis(1));
        turn.go_on();
        thread::sleep(LENGTH);
        turn.give_way();
    };
    let short: fn(&Turn) = |turn| {
        thread::sleep(LENGTH);
        turn.give_way();
    };
    let limit = if has_slices() { Duration::from_secs(10) } else { Duration::from_millis(20) };
    for wait in [long, short] {
        let [before, busy, slept] = slices_around(limit, wait);
        let expected =
            if has_slices() { u64::try_from(LENGTH.as_nanos()).expect("it is short") } else { before };
        assert_eq!((busy, slept), (expected, before));
    }
}

#[test]
fn what_else_is_set_of_a_thread_stays() {
    let nice = |step| {
        // SAFETY: it changes how nice this thread is, no memory.
        unsafe { libc::nice(step) }
    };
    let (before, after) = thread::spawn(move || {
        nice(3);
        let before = attributes().expect("our own");
        ask_for(Slices::Short);
        (before, attributes().expect("our own"))
    })
    .join()
    .expect("it ends");
    // Nicer than it was started, however that was.
    assert!(before.sched_nice > 0, "{}", before.sched_nice);
    assert_eq!((after.sched_nice, after.sched_policy), (before.sched_nice, before.sched_policy));
}

#[test]
fn those_of_other_policies_are_left_alone() {
    let slices = thread::spawn(|| {
        let idle = libc::sched_param { sched_priority: 0 };
        // SAFETY: it reads the structure.
        assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) }, 0);
        let slices = ask_for(Slices::Short);
        (slices, attributes().expect("our own").sched_policy)
    });
    assert_eq!(slices.join().expect("it ends"), (Slices::Fixed, 5));
}

//! The end of a run: drain, then stop.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No end in sight.
    Running,
    /// Nothing new is taken; what is there may finish.
    Draining,
    /// Everything ends now.
    Stopped,
}

/// A channel that tells all workers how far the end has come.
#[must_use]
pub fn channel() -> (Controller, Shutdown) {
    let (sender, receiver) = watch::channel(Phase::Running);
    (Controller(sender), Shutdown(receiver))
}

/// The side that decides. Dropping it stops everything.
#[derive(Debug)]
pub struct Controller(watch::Sender<Phase>);

impl Controller {
    /// Begins to drain.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// Ends everything at once.
    pub fn stop(&self) {
        self.advance(Phase::Stopped);
    }

    /// Drains for at most `deadline`, until `done` is ready or another signal comes; then stops.
    pub async fn drain_then_stop(
        &self,
        deadline: Duration,
        signals: &mut Signals,
        done: impl Future<Output = ()>,
    ) {
        self.drain();
        tokio::select! {
            () = done => {}
            () = tokio::time::sleep(deadline) => {
                tracing::info!("drain time-out of {deadline:?} is over: cutting what is left");
            }
            name = signals.end(true) => tracing::info!("{name} again: stopping at once"),
        }
        self.stop();
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let later = to > *phase;
            *phase = to.max(*phase);
            later
        });
    }
}

/// The side that is told.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<Phase>);

impl Shutdown {
    /// How far the end has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.0.has_changed().is_err() { Phase::Stopped } else { *self.0.borrow() }
    }

    /// Waits until `phase` is reached or passed.
    pub async fn reached(&mut self, phase: Phase) {
        // An error means that the controller is gone: everything ends.
        if self.0.wait_for(|now| *now >= phase).await.is_err() {
            tracing::debug!("the run ended without a word");
        }
    }
}

/// SIGTERM, SIGINT, and SIGHUP, which asks for a reload, or tells that the terminal was
/// closed: that must not leave programs and rules behind.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// None where it was ignored from the start, as `nohup` has it.
    hangup: Option<Signal>,
    has_terminal: bool,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The end, by a signal of this name.
    End(&'static str),
    /// A reload.
    Reload,
}

impl Signals {
    /// Begins to catch them; they no longer end the process by themselves.
    ///
    /// # Errors
    /// What `sigaction(2)` answers. Must be called within a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let hangup = (!is_ignored(libc::SIGHUP)).then(|| signal(SignalKind::hangup())).transpose()?;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup,
            has_terminal: has_terminal(),
        })
    }

    /// Waits for one that asks for the end, and names it.
    pub async fn end(&mut self, reload: bool) -> &'static str {
        loop {
            if let Asked::End(name) = self.next(reload).await {
                return name;
            }
        }
    }

    /// Waits for the next one where there is something to `reload`.
    pub async fn next(&mut self, reload: bool) -> Asked {
        match self.recv().await {
            "SIGHUP" if reload && has_terminal() == self.has_terminal => Asked::Reload,
            name => Asked::End(name),
        }
    }

    /// Waits for the next one and names it.
    async fn recv(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = hangup => "SIGHUP",
        }
    }
}

/// Whether this process has a terminal, which ends with its session.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

/// Whether this process ignores a signal; where there is no `/proc`, it does not.
fn is_ignored(signal: libc::c_int) -> bool {
    procfs::process::Process::myself()
        .and_then(|process| process.status())
        .is_ok_and(|status| status.sigign >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_advance() {
        let (controller, mut shutdown) = channel();
        assert_eq!(shutdown.phase(), Phase::Running);
        controller.stop();
        controller.drain();
        assert_eq!(shutdown.phase(), Phase::Stopped);
        shutdown.reached(Phase::Draining).await;
    }

    #[tokio::test]
    async fn lost_controller_stops() {
        let (controller, mut shutdown) = channel();
        drop(controller);
        shutdown.reached(Phase::Stopped).await;
        assert_eq!(shutdown.phase(), Phase::Stopped);
    }

    #[tokio::test(start_paused = true)]
    async fn drain_ends_at_its_deadline() {
        let (controller, shutdown) = channel();
        let mut signals = Signals::new().expect("signals can be caught");
        let begun = tokio::time::Instant::now();
        controller.drain_then_stop(Duration::from_secs(7), &mut signals, std::future::pending()).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(7));
        assert_eq!(shutdown.phase(), Phase::Stopped);
    }
}

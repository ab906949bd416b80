//! Rounds: each measures every candidate once.

use std::time::Instant;

use anyhow::{Context as _, Result};

use super::arena::{Arena, Programs};
use super::cases::{Case, Measure};
use super::measure::{self, Load};
use super::peers::Peer;
use super::series::{Figures, Role, Series, figure};
use super::statistics::Spread;
use crate::term;

/// Seconds that a measurement takes besides its own, and those that a candidate takes to be started.
const OVERHEAD: f64 = 0.5;
const START: f64 = 1.5;

/// Measures case after case.
pub(crate) struct Comparison {
    pub(crate) rounds: u32,
    pub(crate) seconds: u64,
    pub(crate) programs: Programs,
    clock: Clock,
}

/// How long it still takes: by what was planned for what is done, and what that took.
struct Clock {
    begun: Instant,
    planned: f64,
    done: f64,
}

/// One candidate in one measure.
struct Entrant {
    peer: Peer,
    rounds: Vec<Vec<Option<f64>>>,
    failure: Option<String>,
}

impl Comparison {
    pub(crate) fn new(
        rounds: u32,
        seconds: u64,
        programs: Programs,
        plan: &[(Case, Vec<Peer>)],
    ) -> Result<Self> {
        let clock = Clock { begun: Instant::now(), planned: 0.0, done: 0.0 };
        let mut run = Self { rounds, seconds, programs, clock };
        let mut planned = 0.0;
        for (case, peers) in plan {
            for measure in case.measures()? {
                let peers = peers.iter().filter(|peer| measure.is_for(**peer)).map(|_| 1.0).sum::<f64>();
                planned += peers * f64::from(rounds) * run.expected(&measure);
            }
        }
        run.clock.planned = planned;
        Ok(run)
    }

    fn seconds(&self, measure: &Measure) -> u64 {
        if measure.brief { (self.seconds / 3).max(1) } else { self.seconds }
    }

    #[expect(clippy::cast_precision_loss, reason = "an estimate of seconds")]
    fn expected(&self, measure: &Measure) -> f64 {
        match measure.load {
            Load::Idle { connections } => START + 12.0 + connections as f64 / 4000.0,
            Load::Start => START,
            _ => self.seconds(measure) as f64 + OVERHEAD,
        }
    }

    /// Measures one case.
    pub(crate) fn run(&mut self, case: Case, peers: &[Peer]) -> Result<Vec<Series>> {
        let mut all = Vec::new();
        let mut arenas: Vec<(Peer, Arena)> = Vec::new();
        let mut half = 0;
        for measure in case.measures()? {
            if matches!(measure.load, Load::UdpHalf { .. }) && half == 0 {
                term::say(&format!("{}: left out, for there is no direct rate", measure.title));
                continue;
            }
            let entrants = self.measure(case, &measure, peers, &mut arenas, half)?;
            half = half_of_direct(&entrants).unwrap_or(half);
            all.extend(series(case, &measure, &entrants));
        }
        Ok(all)
    }

    fn measure(
        &mut self,
        case: Case,
        measure: &Measure,
        peers: &[Peer],
        arenas: &mut Vec<(Peer, Arena)>,
        half: u64,
    ) -> Result<Vec<Entrant>> {
        let mut entrants: Vec<Entrant> = peers
            .iter()
            .filter(|peer| measure.is_for(**peer))
            .map(|peer| Entrant { peer: *peer, rounds: Vec::new(), failure: None })
            .collect();
        for round in 1..=self.rounds {
            // There and back: what one leaves behind is not always paid by the same other.
            let mut order: Vec<_> = entrants.iter_mut().collect();
            if round % 2 == 0 {
                order.reverse();
            }
            for entrant in order.into_iter().filter(|entrant| entrant.failure.is_none()) {
                let result = self.one(case, measure, entrant.peer, arenas, half)?;
                self.clock.done += self.expected(measure);
                match result {
                    Ok(values) => entrant.rounds.push(values),
                    // Of others it is told; what is ours, or compared with, has to work.
                    Err(error) if entrant.peer.role() == Role::Peer => {
                        let what = format!("{error:#}").lines().next().unwrap_or_default().to_owned();
                        entrant.failure = Some(what);
                        arenas.retain(|(peer, _)| *peer != entrant.peer);
                    }
                    Err(error) => {
                        let what = format!("{}, round {round}, {}", measure.title, entrant.peer.name());
                        return Err(error.context(what));
                    }
                }
            }
            term::say(&self.progress(measure, round, &entrants));
        }
        Ok(entrants)
    }

    /// Measures one candidate once. The outer error: it cannot be started, or does not do its work.
    fn one(
        &self,
        case: Case,
        measure: &Measure,
        peer: Peer,
        arenas: &mut Vec<(Peer, Arena)>,
        half: u64,
    ) -> Result<Result<Vec<Option<f64>>>> {
        let fresh = || Arena::new(peer, &self.programs, case.protocols());
        match measure.load {
            Load::Start => return Ok(measure::start(&self.programs)),
            Load::Idle { connections } => return Ok(measure::memory(&fresh()?, connections)),
            _ => {}
        }
        if !arenas.iter().any(|(other, _)| *other == peer) {
            arenas.push((peer, fresh()?));
        }
        let arena = arenas.iter_mut().find(|(other, _)| *other == peer);
        let (_, arena) = arena.context("no lab")?;
        Ok(measure.load.measure(arena, self.seconds(measure), half))
    }

    fn progress(&self, measure: &Measure, round: u32, entrants: &[Entrant]) -> String {
        let figures: Vec<String> = entrants
            .iter()
            .map(|entrant| {
                let first = entrant.rounds.last().and_then(|values| *values.first()?);
                let shown = first.map_or_else(|| "-".to_owned(), figure);
                let shown = if entrant.failure.is_some() { "failed".to_owned() } else { shown };
                format!("{} {shown}", entrant.peer.key())
            })
            .collect();
        let unit = measure.metrics.first().map_or("", |metric| metric.unit);
        format!(
            "{}, round {round} of {}: {} {unit} ({} left)",
            measure.title,
            self.rounds,
            figures.join(", "),
            self.clock.left()
        )
    }
}

impl Clock {
    fn left(&self) -> String {
        let left = (self.planned - self.done).max(0.0) * self.begun.elapsed().as_secs_f64() / self.done;
        if left < 90.0 { format!("{left:.0} s") } else { format!("{:.0} min", left / 60.0) }
    }
}

/// Half of the rate at which datagrams arrive without a proxy.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of datagrams")]
fn half_of_direct(entrants: &[Entrant]) -> Option<u64> {
    let direct = entrants.iter().find(|entrant| entrant.peer == Peer::Direct)?;
    let rates: Vec<f64> = direct.rounds.iter().filter_map(|values| *values.first()?).collect();
    Some((Spread::of(&rates)?.median / 2.0) as u64)
}

fn series(case: Case, measure: &Measure, entrants: &[Entrant]) -> Vec<Series> {
    let of = |index: usize| {
        let figures = entrants.iter().filter_map(|entrant| {
            let rounds: Vec<f64> = entrant.rounds.iter().filter_map(|values| values[index]).collect();
            // Plain forwarding has no processor time of its own.
            (!rounds.is_empty() || entrant.failure.is_some()).then(|| Figures {
                key: entrant.peer.key().into(),
                name: entrant.peer.name().into(),
                role: entrant.peer.role(),
                rounds,
                failure: entrant.failure.clone(),
            })
        });
        figures.collect()
    };
    let metrics = measure.metrics.iter().enumerate();
    metrics
        .map(|(index, metric)| Series {
            case: case.key(),
            title: measure.title.clone(),
            metric: *metric,
            figures: of(index),
        })
        .collect()
}

//! What was measured, and whether it is good enough.

use serde_json::{Value, json};

use super::statistics::{Spread, ratio};

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

/// What a figure is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// The candidate of this key.
    Candidate(&'static str),
    /// The best of other people's proxies.
    BestPeer,
}

/// Plain forwarding: the limit.
pub(crate) const DIRECT: Of = Of::Candidate("direct");
/// iptables TPROXY with the same relay.
pub(crate) const IPTABLES: Of = Of::Candidate("iptables");

/// How good a figure has to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// At least so many times another's.
    AtLeast(f64, Of),
    /// At most so many times another's.
    AtMost(f64, Of),
    /// At most so much more than another's.
    AtMostAbove(f64, Of),
    /// At most so much.
    Within(f64),
}

/// One thing that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) targets: &'static [Target],
    /// The plot that shows it.
    pub(crate) plot: Option<Plot>,
}

/// The plots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plot {
    Bulk,
    Connections,
    Latency,
    Udp,
}

/// What a candidate is to the targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The targets are for it.
    Ours,
    /// Somebody else's proxy.
    Peer,
    /// To compare with.
    Reference,
}

/// One candidate's figures.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    pub(crate) key: String,
    pub(crate) name: String,
    pub(crate) role: Role,
    /// One a round, in their order.
    pub(crate) rounds: Vec<f64>,
    /// Why there are no more.
    pub(crate) failure: Option<String>,
}

impl Figures {
    /// Of those rounds that there were, unless one failed.
    pub(crate) fn spread(&self) -> Option<Spread> {
        if self.failure.is_some() { None } else { Spread::of(&self.rounds) }
    }
}

/// One metric of all candidates.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) case: &'static str,
    pub(crate) title: String,
    pub(crate) metric: Metric,
    pub(crate) figures: Vec<Figures>,
}

/// A target, held against what was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) target: String,
    pub(crate) measured: String,
    /// `None`: there is nothing to compare with.
    pub(crate) reached: Option<bool>,
}

impl Series {
    /// The candidate that others are compared with.
    fn other(&self, of: Of) -> Option<&Figures> {
        let done = |figures: &&Figures| figures.spread().is_some();
        match of {
            Of::Candidate(key) => self.figures.iter().filter(done).find(|figures| figures.key == key),
            Of::BestPeer => {
                let median = |figures: &Figures| figures.spread().map_or(0.0, |spread| spread.median);
                let peers = self.figures.iter().filter(done).filter(|figures| figures.role == Role::Peer);
                match self.metric.better {
                    Better::More => peers.max_by(|a, b| median(a).total_cmp(&median(b))),
                    Better::Less => peers.min_by(|a, b| median(a).total_cmp(&median(b))),
                }
            }
        }
    }

    /// `direct`, `best peer (HAProxy)`.
    fn name(&self, of: Of) -> String {
        match (of, self.other(of)) {
            (Of::Candidate(key), _) => key.to_owned(),
            (Of::BestPeer, None) => "best peer".to_owned(),
            (Of::BestPeer, Some(peer)) => format!("best peer ({})", peer.name),
        }
    }

    /// What these figures are in terms of another's.
    pub(crate) fn ratio(&self, figures: &Figures, of: Of) -> Option<f64> {
        figures.spread()?;
        ratio(&figures.rounds, &self.other(of)?.rounds)
    }

    /// Every target that is for this candidate.
    pub(crate) fn judge(&self, figures: &Figures) -> Vec<Judgement> {
        if figures.role != Role::Ours {
            return Vec::new();
        }
        self.metric.targets.iter().map(|target| self.hold(figures, target)).collect()
    }

    fn hold(&self, figures: &Figures, target: &Target) -> Judgement {
        let own = figures.spread().map(|spread| spread.median);
        let unit = self.metric.unit;
        let (text, measured, reached) = match *target {
            Target::AtLeast(bound, of) => {
                let ratio = self.ratio(figures, of);
                (format!("≥ {bound} of {}", self.name(of)), ratio, ratio.map(|ratio| ratio >= bound))
            }
            Target::AtMost(bound, of) => {
                let ratio = self.ratio(figures, of);
                (format!("≤ {bound} of {}", self.name(of)), ratio, ratio.map(|ratio| ratio <= bound))
            }
            Target::AtMostAbove(extra, of) => {
                let other = self.other(of).and_then(Figures::spread).map(|spread| spread.median);
                let above = own.zip(other).map(|(own, other)| own - other);
                (format!("≤ {} + {extra} {unit}", self.name(of)), above, above.map(|above| above <= extra))
            }
            Target::Within(most) => (format!("≤ {} {unit}", figure(most)), own, own.map(|own| own <= most)),
        };
        let measured = measured.map_or_else(|| "-".to_owned(), figure);
        // A candidate that failed has missed whatever it was to reach.
        let reached = if figures.failure.is_some() { Some(false) } else { reached };
        Judgement { target: text, measured, reached }
    }

    /// All rounds, as JSON.
    pub(crate) fn json(&self) -> Value {
        let candidates: Vec<Value> = self
            .figures
            .iter()
            .map(|figures| {
                let targets: Vec<Value> = self
                    .judge(figures)
                    .into_iter()
                    .map(|judgement| {
                        json!({ "target": judgement.target, "measured": judgement.measured, "reached": judgement.reached })
                    })
                    .collect();
                json!({
                    "candidate": figures.key,
                    "rounds": figures.rounds,
                    "spread": figures.spread(),
                    "of_direct": self.ratio(figures, DIRECT),
                    "of_iptables": self.ratio(figures, IPTABLES),
                    "of_best_peer": self.ratio(figures, Of::BestPeer),
                    "failure": figures.failure,
                    "targets": targets,
                })
            })
            .collect();
        json!({
            "case": self.case,
            "title": self.title,
            "metric": self.metric.name,
            "unit": self.metric.unit,
            "best_peer": self.other(Of::BestPeer).map(|peer| &peer.key),
            "candidates": candidates,
        })
    }
}

/// A number with about three digits that count, and blanks for none.
pub(crate) fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.1 || size == 0.0 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), ""), |(whole, rest)| (whole, rest));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let point = if rest.is_empty() { "" } else { "." };
    format!("{sign}{grouped}{point}{rest}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn figures(key: &str, role: Role, rounds: &[f64]) -> Figures {
        Figures { key: key.into(), name: key.into(), role, rounds: rounds.into(), failure: None }
    }

    /// Three rounds of four candidates.
    pub(crate) fn series(better: Better, targets: &'static [Target]) -> Series {
        let metric = Metric { name: "rate", unit: "1/s", better, targets, plot: None };
        let figures = vec![
            figures("direct", Role::Reference, &[1000.0, 2000.0, 1500.0]),
            figures("ebpf", Role::Ours, &[900.0, 1800.0, 1200.0]),
            figures("slow", Role::Peer, &[200.0, 300.0, 250.0]),
            figures("fast", Role::Peer, &[600.0, 1200.0, 900.0]),
        ];
        Series { case: "case", title: "a case".into(), metric, figures }
    }

    fn judged(better: Better, targets: &'static [Target]) -> Vec<(String, Option<bool>)> {
        let series = series(better, targets);
        series.judge(&series.figures[1]).into_iter().map(|judged| (judged.measured, judged.reached)).collect()
    }

    #[test]
    fn targets_are_held_against_ratios() {
        let more = judged(
            Better::More,
            &[
                Target::AtLeast(0.9, DIRECT),
                Target::AtLeast(0.95, DIRECT),
                Target::AtLeast(1.5, Of::BestPeer),
                Target::AtLeast(1.0, IPTABLES),
            ],
        );
        let expected = [("0.90", Some(true)), ("0.90", Some(false)), ("1.50", Some(true)), ("-", None)];
        assert_eq!(more, expected.map(|(measured, reached)| (measured.to_owned(), reached)));
    }

    #[test]
    fn where_less_is_better_the_least_is_the_best_peer() {
        let less =
            judged(Better::Less, &[Target::AtMost(4.0, Of::BestPeer), Target::AtMost(5.0, Of::BestPeer)]);
        assert_eq!(less, [("4.80".to_owned(), Some(false)), ("4.80".to_owned(), Some(true))]);
    }

    #[test]
    fn bounds_of_their_own() {
        let own = judged(Better::Less, &[Target::Within(1200.0), Target::AtMostAbove(-301.0, DIRECT)]);
        assert_eq!(own, [("1,200".to_owned(), Some(true)), ("-300".to_owned(), Some(false))]);
    }

    #[test]
    fn peers_have_no_targets_and_failures_reach_none() {
        let mut series = series(Better::More, &[Target::AtLeast(0.1, DIRECT)]);
        assert_eq!(series.judge(&series.figures[2]), []);
        series.figures[1].failure = Some("it ended".into());
        assert_eq!(series.judge(&series.figures[1])[0].reached, Some(false));
        series.figures[3].failure = Some("it ended".into());
        assert_eq!(series.name(Of::BestPeer), "best peer (slow)");
    }

    #[test]
    fn numbers_are_short() {
        let shown = [1_234_567.8, 15374.0, 99.97, 24.13, 1.234, 0.5, 0.012_34, 0.0, -3.0].map(figure);
        let expected = ["1,234,568", "15,374", "100", "24.1", "1.23", "0.50", "0.0123", "0.00", "-3.00"];
        assert_eq!(shown, expected);
    }
}

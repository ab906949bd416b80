//! The rules by which the kernel decides: compiled beside what goes on, exchanged by one write.

use std::sync::Arc;

use crate::config::Scope;
use crate::config::rule::{Action, Rule};
use crate::config::upstream::Upstream;
use crate::datapath::features::Features;
use crate::datapath::policy::Image;
use crate::failure::Failure;
use crate::plan::Plan;
use crate::policy::asked::NamedRules;
use crate::policy::compile::compile;
use crate::policy::names::Names;
use crate::policy::rules::{Written, rule_set};
use crate::policy::targets::Targets;

use super::Steering;

/// What rules are made of: of the same come the same.
#[derive(Debug, PartialEq)]
struct Sources {
    scope: Scope,
    upstream: Upstream,
    rules: Arc<[Rule]>,
    names: Names,
    /// Whether they ask for the group of who made a socket.
    notes_groups: bool,
}

impl Sources {
    fn of(plan: &Plan) -> Self {
        let names = Names::new(&plan.names, &plan.policy);
        let (scope, upstream) = (plan.scope.clone(), plan.upstream.clone());
        let rules = Arc::clone(&plan.policy);
        Self { scope, upstream, rules, names, notes_groups: plan.notes_groups }
    }
}

/// The rules that hold.
#[derive(Debug)]
pub(super) struct Held {
    sources: Sources,
    /// Bytes that their image takes in the kernel.
    pub(super) bytes: usize,
}

/// Rules that are in the kernel, and do not hold yet.
pub(super) struct Compiled {
    sources: Sources,
    image: Image,
    asking: Option<NamedRules>,
}

impl Compiled {
    fn new(sources: Sources, targets: &Targets, features: Features) -> anyhow::Result<Self> {
        let Sources { scope, upstream, rules, names, .. } = &sources;
        let set = rule_set(Written { scope, upstream, rules }, names, targets)?;
        let lines = compile(&set).map_err(Failure::usage)?;
        let asking = NamedRules::of(&set, rules).map_err(Failure::usage)?;
        let image = Image::new(features, &lines)?;
        Ok(Self { sources, image, asking })
    }
}

impl Steering {
    /// Compiles the rules of a plan, which may have a million networks, and puts them into the
    /// kernel; `None` where they hold already.
    ///
    /// # Errors
    ///
    /// [`Failure::Usage`] where there are too many, or what failed.
    pub(super) async fn compile(&self, plan: &Plan) -> anyhow::Result<Option<Compiled>> {
        let sources = Sources::of(plan);
        if self.policy.as_ref().is_some_and(|held| held.sources == sources) {
            return Ok(None);
        }
        let (targets, features) = (self.rulebook.targets.clone(), self.datapath.features());
        let compiled = tokio::task::spawn_blocking(move || Compiled::new(sources, &targets, features));
        compiled.await?.map(Some)
    }

    /// Has the kernel decide by them, by one write.
    pub(super) fn switch(&mut self, compiled: Compiled) -> anyhow::Result<()> {
        let Compiled { sources, image, asking } = compiled;
        if sources.notes_groups {
            // First: no socket that is made once the rules hold is to be without its note.
            self.keep_groups(true)?;
        }
        if !sources.rules.is_empty() {
            let binds = |rule: &Rule| {
                matches!(rule.action, Action::Divert(_) | Action::Reject | Action::Proxy(Some(_)))
                    || !rule.conditions.domains.is_empty()
            };
            self.rulebook.targets.ask_for(sources.rules.iter().any(binds));
        }
        let bytes = image.bytes();
        self.rulebook.replace(asking, || self.datapath.set_policy(image))?;
        let of_rules = sources.rules.iter().filter_map(|rule| match &rule.action {
            Action::Proxy(upstream) => upstream.as_ref(),
            _ => None,
        });
        self.rulebook.targets.hold(&sources.upstream, of_rules)?;
        self.policy = Some(Held { sources, bytes });
        Ok(())
    }

    /// Follows names that mean another number now: no one tells of control groups.
    pub(super) async fn keep_policy(&mut self) -> anyhow::Result<()> {
        match self.compile(&self.plan).await? {
            Some(compiled) => self.switch(compiled),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, resolve};
    use crate::config::file;
    use crate::interfaces::{Host, Interface};

    fn sources(rules: &str, interfaces: &[&str]) -> Sources {
        let mut run = Cli::try_parse_from(["tproxy-user", "--iface", "lan*"]).expect("flags").run;
        run.capture.rules = file::parse(rules.as_bytes(), "t.toml".as_ref()).expect("rules").1.rules;
        let interface = |(index, name): (u32, &&str)| Interface {
            index,
            name: (*name).to_owned(),
            ..Interface::default()
        };
        let host = Host { interfaces: (2..).zip(interfaces).map(interface).collect(), ..Host::default() };
        Sources::of(&Plan::new(&resolve::config(&run).expect("valid"), &host).expect("a plan"))
    }

    #[test]
    fn rules_are_made_again_where_they_ask_for_what_has_changed() {
        let rules = "[[rule]]\niface = 'lan*'\naction = 'pass'\n";
        let before = sources(rules, &["lan0", "wan0"]);
        assert_eq!(before, sources(rules, &["lan0", "wan0", "wan1"]));
        assert_ne!(before, sources(rules, &["lan0", "wan0", "lan1"]));
        assert_ne!(before, sources("[[rule]]\niface = 'lan*'\naction = 'drop'\n", &["lan0", "wan0"]));
    }
}

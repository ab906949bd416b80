//! Part by part: is it there, and if not, make it.

use std::time::Instant;

use anyhow::Context as _;
use tproxy_common::abi::program;

use crate::clsact;
use crate::datapath::attach::{Direction, Hook, Target, programs};
use crate::datapath::bpffs;
use crate::instance::Instance;
use crate::instance::state::QdiscMade;
use crate::interfaces::is_still;
use crate::plan::{PlannedInterface, Sysctl};
use crate::routing::Routing;
use crate::{sysctl, tun, undo};

use super::upkeep::Kind;
use super::{Attached, Steering, keeps_clsact_out};

/// Where [`program::GROUP`] is.
const CONTROL_GROUPS: &str = "the control groups";

impl Steering {
    /// Rules and routes.
    pub(super) async fn keep_routing(&mut self) -> anyhow::Result<()> {
        let routing = Routing::new(self.handle.clone(), self.config.steering.table);
        let now = Instant::now();
        let mut repairs = Vec::new();
        let upkeep = &mut self.upkeep;
        upkeep.caught_up();
        let mut may_add = |part: &str| {
            let kind = upkeep.may_make(part, now);
            if let Some(Kind::Repair(_)) = kind {
                repairs.extend(kind.map(|kind| (part.to_owned(), kind)));
            }
            kind.is_some()
        };
        let changes = routing.apply_if(&self.plan.rules, &self.plan.routes, &mut may_add).await?;
        tracing::debug!(?changes, "rules and routes");
        for (part, kind) in repairs {
            self.upkeep.made(&part, kind, Ok(()), |stats| &stats.rules_put_back)?;
        }
        let rules = self.plan.rules.iter().map(ToString::to_string);
        self.upkeep.routing_is(rules.chain(self.plan.routes.iter().map(ToString::to_string)));
        Ok(())
    }

    /// Settings and programs. One that cannot be had must not keep the others from being made.
    pub(super) async fn keep(&mut self, instance: &mut Instance) -> anyhow::Result<()> {
        let mut outcomes = Vec::new();
        for sysctl in self.plan.sysctls.clone() {
            outcomes.push(self.keep_setting(sysctl, instance));
        }
        outcomes.push(self.keep_lookup());
        outcomes.push(self.keep_groups(self.plan.notes_groups));
        outcomes.push(self.keep_tun().await);
        for interface in self.plan.interfaces.clone() {
            let (name, index) = (&*interface.name, interface.index);
            // Gone since the plan was made: notice of that is under way.
            if !is_still(name, index) {
                continue;
            }
            let kept = self.keep_programs(&interface, instance).await;
            // Or meanwhile: its programs go a moment before it does.
            if kept.is_err() && !is_still(name, index) {
                self.detach(name, index, instance).await;
            } else {
                outcomes.push(kept);
            }
        }
        let mut failed = outcomes.into_iter().filter_map(Result::err);
        let first = failed.next();
        for error in failed {
            tracing::warn!("{error:#}");
        }
        first.map_or(Ok(()), Err)
    }

    fn keep_setting(&mut self, setting: Sysctl, instance: &mut Instance) -> anyhow::Result<()> {
        let part = setting.to_string();
        if sysctl::read(setting.name)? == setting.value {
            self.upkeep.found(&part);
            return Ok(());
        }
        let Some(kind) = self.upkeep.may_make(&part, Instant::now()) else { return Ok(()) };
        let set = instance.set_sysctl(setting.name, setting.value);
        self.upkeep.made(&part, kind, set, |stats| &stats.settings_put_back)
    }

    fn keep_lookup(&mut self) -> anyhow::Result<()> {
        let part = "tproxy_lookup of the network namespace";
        if !self.datapath.features().sk_lookup() || self.datapath.has_lookup()? {
            return Ok(());
        }
        let Some(kind) = self.upkeep.may_make(part, Instant::now()) else { return Ok(()) };
        let attached = self.datapath.attach_lookup(&self.config.pin);
        self.upkeep.made(part, kind, attached.map_err(Into::into), |stats| &stats.programs_put_back)
    }

    /// The program that notes the group of sockets, while rules ask for it: it costs something at
    /// each socket that is made anywhere on the host.
    pub(super) fn keep_groups(&mut self, wanted: bool) -> anyhow::Result<()> {
        let part = format!("{} at {CONTROL_GROUPS}", program::GROUP);
        if !wanted {
            self.upkeep.forget(CONTROL_GROUPS);
            return Ok(bpffs::remove_link(&self.config.pin, program::GROUP)?);
        }
        if self.datapath.has_group()? {
            self.upkeep.found(&part);
            return Ok(());
        }
        let Some(kind) = self.upkeep.may_make(&part, Instant::now()) else { return Ok(()) };
        let attached = self.datapath.attach_group(&self.config.pin);
        self.upkeep.made(&part, kind, attached.map_err(Into::into), |stats| &stats.programs_put_back)
    }

    /// The tun device of faithful handshakes: down, or without its program, it
    /// would swallow every SYN. Of one that is gone the workers tell.
    async fn keep_tun(&mut self) -> anyhow::Result<()> {
        let Some(link) = self.tun.clone() else { return Ok(()) };
        let Some(up) = link.is_up(&self.handle).await? else { return Ok(()) };
        let part = format!("the state \"up\" of {}", link.name);
        if up {
            self.upkeep.found(&part);
        } else if let Some(kind) = self.upkeep.may_make(&part, Instant::now()) {
            let set = link.set_up(&self.handle).await;
            self.upkeep.made(&part, kind, set, |stats| &stats.settings_put_back)?;
        }
        let part = format!("{} at {}", program::ADMIT, link.name);
        let hook = self.hook();
        if self.has_admit(&link, hook).await? {
            self.upkeep.found(&part);
        } else if let Some(kind) = self.upkeep.may_make(&part, Instant::now()) {
            if hook == Hook::Clsact && !clsact::has_clsact(&self.handle, link.index).await? {
                clsact::add_clsact(&self.handle, link.index).await?;
            }
            let attached = self.datapath.attach_admit(&link.name, hook).map_err(Into::into);
            self.upkeep.made(&part, kind, attached, |stats| &stats.programs_put_back)?;
        }
        Ok(())
    }

    async fn has_admit(&mut self, link: &tun::Link, hook: Hook) -> anyhow::Result<bool> {
        if hook == Hook::Tcx {
            return Ok(self.datapath.has_tcx(link.index, (Direction::Ingress, program::ADMIT))?);
        }
        let filters = clsact::filters(&self.handle, link.index).await?;
        Ok(filters.iter().any(|filter| filter.name.as_deref() == Some(program::ADMIT)))
    }

    async fn keep_programs(
        &mut self,
        interface: &PlannedInterface,
        instance: &mut Instance,
    ) -> anyhow::Result<()> {
        let hook = self.hook();
        // Egress first: it counts the answers to what ingress lets in.
        for side in programs(interface.role, self.config.capture.own_traffic).into_iter().rev() {
            if self.is_attached(interface.index, side, hook, instance).await? {
                continue;
            }
            let part = format!("{} at {}", side.1, interface.name);
            let Some(kind) = self.upkeep.may_make(&part, Instant::now()) else { continue };
            let attached = self.attach(interface, side, hook, instance).await;
            if attached.is_err() && !is_still(&interface.name, interface.index) {
                return attached;
            }
            self.upkeep.made(&part, kind, attached, |stats| &stats.programs_put_back)?;
        }
        let PlannedInterface { index, role, .. } = *interface;
        let attached = Attached { index, name: interface.name.clone(), role, hook };
        if self.attached.insert(index, attached).is_none() {
            tracing::info!("{} ({role:?}): attached by {hook:?}", interface.name);
        }
        Ok(())
    }

    async fn is_attached(
        &mut self,
        ifindex: u32,
        side: (Direction, &'static str),
        hook: Hook,
        instance: &Instance,
    ) -> anyhow::Result<bool> {
        if hook == Hook::Tcx {
            return Ok(self.datapath.has_tcx(ifindex, side)?);
        }
        let made = instance.state().journal.filter(ifindex, side.0 == Direction::Egress);
        let Some(made) = made else { return Ok(false) };
        Ok(clsact::filters(&self.handle, ifindex).await?.contains(made))
    }

    async fn attach(
        &mut self,
        interface: &PlannedInterface,
        side: (Direction, &'static str),
        hook: Hook,
        instance: &mut Instance,
    ) -> anyhow::Result<()> {
        if hook == Hook::Clsact {
            self.ensure_clsact(interface, instance).await?;
        }
        let target = Target { interface: &interface.name, ifindex: interface.index };
        self.datapath.attach(&target, side, hook, &self.config.pin, &mut |made| {
            instance.record(|journal| journal.attaching(made)).map_err(std::io::Error::other)
        })?;
        Ok(())
    }

    async fn ensure_clsact(
        &self,
        interface: &PlannedInterface,
        instance: &mut Instance,
    ) -> anyhow::Result<()> {
        match clsact::qdisc(&self.handle, interface.index).await? {
            clsact::Qdisc::Clsact => Ok(()),
            clsact::Qdisc::Ingress => Err(keeps_clsact_out(&interface.name).into()),
            clsact::Qdisc::Absent => {
                let made = QdiscMade { ifindex: interface.index, ifname: interface.name.clone() };
                instance.record(|journal| journal.adding(made))?;
                clsact::add_clsact(&self.handle, interface.index)
                    .await
                    .with_context(|| format!("cannot add a clsact qdisc to {}", interface.name))
            }
        }
    }

    /// Takes off what may be at an interface, which may be gone.
    pub(super) async fn detach(&mut self, name: &str, index: u32, instance: &mut Instance) {
        self.upkeep.forget(name);
        if let Err(error) = bpffs::remove_links(&self.config.pin, index) {
            tracing::warn!("{error}");
        }
        if let Err(error) = undo::detached(instance, index, &self.handle).await {
            tracing::warn!("{name}: {error:#}");
        }
    }
}

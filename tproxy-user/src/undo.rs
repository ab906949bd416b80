//! Undoes what a journal says, at exit and after a kill alike.

use std::path::Path;

use anyhow::Context as _;
use nix::net::if_::if_indextoname;
use rtnetlink::Handle;

use crate::clsact;
use crate::datapath::bpffs;
use crate::instance::Instance;
use crate::instance::state::{FilterMade, Journal, QdiscMade, State, SysctlChange, netns};
use crate::interfaces::is_still;
use crate::routing::Routing;
use crate::sysctl;

/// What was removed, a line each, and what could not be.
#[derive(Debug, Default)]
pub struct Report {
    /// Done.
    pub done: Vec<String>,
    /// Failed; the rest was done all the same.
    pub failed: Vec<anyhow::Error>,
}

impl Report {
    fn note<T>(&mut self, result: anyhow::Result<T>, describe: impl FnOnce(T) -> Option<String>) {
        match result {
            Ok(outcome) => self.done.extend(describe(outcome)),
            Err(error) => self.failed.push(error),
        }
    }

    /// The first failure, if any.
    ///
    /// # Errors
    /// That failure.
    pub fn into_result(self) -> anyhow::Result<Vec<String>> {
        match self.failed.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(self.done),
        }
    }
}

/// Undoes everything that an instance set up: programs first, so that no packet
/// is marked any more when the rules go.
///
/// `handle` is in the network namespace of the calling thread. A journal of
/// another one cannot be undone from here, only pins can.
pub async fn everything(state: &State, handle: &Handle) -> Report {
    let mut report = Report::default();
    pins(&state.pin, &mut report);
    if state.journal_netns == netns() {
        network(&state.journal, handle, &mut report).await;
    } else if state.journal != Journal::default() {
        report.done.push(format!(
            "left alone: rules and settings of network namespace {} (this is {}); they went with it, or run cleanup in there",
            state.journal_netns,
            netns()
        ));
    }
    report
}

/// Removes the pinned maps and links, which detaches the programs of the links.
pub fn pins(pin: &Path, report: &mut Report) {
    match bpffs::remove(pin) {
        Ok(removed) => report.done.extend(removed.iter().map(|what| format!("removed {what}"))),
        Err(error) => report.failed.push(error.into()),
    }
}

/// Undoes a journal: filters, qdiscs, rules, routes, settings.
pub async fn network(journal: &Journal, handle: &Handle, report: &mut Report) {
    for made in &journal.filters {
        let result = filter(made, handle).await.with_context(|| format!("on {}", made.ifname));
        report.note(result, |removed| {
            removed.then(|| {
                format!(
                    "removed the filter {} of {}",
                    made.filter.name.as_deref().unwrap_or("bpf"),
                    made.ifname
                )
            })
        });
    }
    for made in &journal.qdiscs {
        let result = qdisc(made, handle).await.with_context(|| format!("on {}", made.ifname));
        report
            .note(result, |removed| removed.then(|| format!("removed the clsact qdisc of {}", made.ifname)));
    }
    if let Some(claim) = journal.routing {
        let result = Routing::new(handle.clone(), claim.table).remove().await;
        report.note(result.map_err(Into::into), |changes| {
            (changes.removed > 0)
                .then(|| format!("removed {} rules and routes of table {}", changes.removed, claim.table))
        });
    }
    for change in &journal.sysctls {
        let result = setting(change);
        report
            .note(result, |restored| restored.then(|| format!("restored {} = {}", change.name, change.old)));
    }
}

/// Removes the filters of one interface of a running instance, and forgets them.
///
/// # Errors
/// Where the kernel refuses, or the journal cannot be written.
pub async fn detached(instance: &mut Instance, ifindex: u32, handle: &Handle) -> anyhow::Result<()> {
    let journal = &instance.state().journal;
    for made in journal.filters.iter().filter(|made| made.ifindex == ifindex) {
        filter(made, handle).await?;
    }
    let name = name(ifindex);
    instance.record(|journal| journal.detached(ifindex, name.as_deref()))?;
    Ok(())
}

/// Has the journal of a running instance call interfaces as they are called now: one may be
/// renamed while nothing is attached to it.
///
/// # Errors
/// Where the journal cannot be written.
pub fn renamed(instance: &mut Instance) -> anyhow::Result<()> {
    let qdiscs = &instance.state().journal.qdiscs;
    let other = |made: &QdiscMade| name(made.ifindex).filter(|name| *name != made.ifname);
    let renamed: Vec<_> = qdiscs.iter().filter_map(|made| Some((made.ifindex, other(made)?))).collect();
    if !renamed.is_empty() {
        instance.record(|journal| renamed.iter().for_each(|(index, name)| journal.called(*index, name)))?;
    }
    Ok(())
}

fn name(ifindex: u32) -> Option<String> {
    if_indextoname(ifindex).ok()?.into_string().ok()
}

/// Removes a filter that we made. It is known by its place and the name of its
/// program; the interface may have another name by now.
async fn filter(made: &FilterMade, handle: &Handle) -> anyhow::Result<bool> {
    if !clsact::filters(handle, made.ifindex).await?.contains(&made.filter) {
        return Ok(false);
    }
    clsact::del_filter(handle, made.ifindex, &made.filter).await?;
    Ok(true)
}

/// Removes a qdisc that we made, unless somebody else put a filter there.
async fn qdisc(made: &QdiscMade, handle: &Handle) -> anyhow::Result<bool> {
    let (ifname, ifindex) = (&*made.ifname, made.ifindex);
    if !is_still(ifname, ifindex) || !clsact::has_clsact(handle, ifindex).await? {
        return Ok(false);
    }
    if !clsact::filters(handle, ifindex).await?.is_empty() {
        tracing::warn!(interface = ifname, "the clsact qdisc stays: others have filters there");
        return Ok(false);
    }
    clsact::del_clsact(handle, ifindex).await?;
    Ok(true)
}

fn setting(change: &SysctlChange) -> anyhow::Result<bool> {
    if sysctl::read(&change.name)? != change.new {
        return Ok(false);
    }
    sysctl::write(&change.name, &change.old)?;
    Ok(true)
}

//! What the running proxy tells of itself.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::cmd;
use crate::config::Config;
use crate::config::upstream::Upstream;
use crate::datapath::counters::CounterMap;
use crate::instance::Instance;
use crate::policy::targets::{Target, Targets};
use crate::stats::Stats;
use crate::steering::{Attached, Steering};
use crate::upstream::outbound::Outbound;

/// Answers at the control socket. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Reporter(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    basics: Map<String, Value>,
    /// Opened at the start: later there may be no descriptor left.
    counters: Option<CounterMap>,
    listeners: Vec<String>,
    stats: Arc<Stats>,
    targets: Targets,
    attached: RefCell<Vec<Attached>>,
    /// Rules, and the bytes of their image.
    policy: Cell<(usize, usize)>,
    /// The plan that is carried out, in words.
    plan: RefCell<String>,
}

impl Reporter {
    /// A reporter of this run.
    #[must_use]
    pub fn new(
        config: &Config,
        instance: &Instance,
        listeners: Vec<String>,
        stats: Arc<Stats>,
        targets: Targets,
    ) -> Self {
        Self(Rc::new(Inner {
            basics: cmd::status::basics(instance),
            // Without steering there are no programs that count.
            counters: CounterMap::open(&config.pin).ok(),
            listeners,
            stats,
            targets,
            attached: RefCell::default(),
            policy: Cell::default(),
            plan: RefCell::default(),
        }))
    }

    /// The targets that it tells of.
    #[must_use]
    pub fn targets(&self) -> Targets {
        self.0.targets.clone()
    }

    /// For `check --diff`.
    #[must_use]
    pub fn plan(&self) -> Value {
        json!({"plan": *self.0.plan.borrow()})
    }

    /// Notes what is attached now, and by which rules is decided.
    pub fn note(&self, steering: &Steering) {
        self.0.plan.replace(steering.plan().to_string());
        self.0.attached.replace(steering.attached().cloned().collect());
        self.0.policy.set(steering.policy());
    }

    /// For `status`.
    #[must_use]
    pub fn status(&self) -> Value {
        let inner = &*self.0;
        let mut status = inner.basics.clone();
        let snapshot = inner.stats.snapshot();
        let interfaces: Vec<_> = inner
            .attached
            .borrow()
            .iter()
            .map(|a| json!({"name": a.name, "index": a.index, "attach": a.hook, "role": a.role}))
            .collect();
        let mut all = Map::new();
        if let Some(Ok(kernel)) = inner.counters.as_ref().map(CounterMap::read) {
            all.extend(kernel.entries().map(|(name, value, _)| (name.to_owned(), value.into())));
        }
        all.extend(snapshot.entries().map(|entry| (entry.name.to_owned(), entry.value.into())));
        status.insert("interfaces".to_owned(), interfaces.into());
        status.insert("listeners".to_owned(), json!(inner.listeners));
        status.insert("upstreams".to_owned(), upstreams(&inner.targets));
        status.insert(
            "connections".to_owned(),
            json!({"tcp": snapshot.tcp_active, "udp": snapshot.udp_active}),
        );
        let (rules, bytes) = inner.policy.get();
        status.insert("policy".to_owned(), json!({"rules": rules, "bytes": bytes}));
        status.insert("memory_bytes".to_owned(), memory().into());
        status.insert("counters".to_owned(), all.into());
        status.into()
    }
}

/// The upstreams that are in use, each with its numbers in the flow table; members of groups have none.
fn upstreams(targets: &Targets) -> Value {
    let mut all = Map::new();
    // Flows may go on by one that a reload has dropped; new ones do not.
    let used = targets.outbounds();
    let in_use = |outbound: &Arc<Outbound>| used.iter().any(|one| Arc::ptr_eq(one, outbound));
    let members = targets.outbounds().into_iter().map(|outbound| (None, Target::Proxy(outbound)));
    let numbered = targets.all().into_iter().enumerate().map(|(number, target)| (Some(number), target));
    for (number, target) in members.chain(numbered) {
        let mut told = match &target {
            Target::Address(_) => continue,
            Target::Direct => json!({"name": "direct", "up": true, "latency_ms": null}),
            Target::Group(pool) => json!({
                "name": &*pool.group().name,
                "members": pool.group().members.iter().map(Upstream::name).collect::<Vec<_>>(),
                "up": pool.members().iter().any(|member| member.as_ref().is_none_or(|one| one.works())),
                "latency_ms": null,
            }),
            Target::Proxy(outbound) => json!({
                "name": &*outbound.proxy().name,
                "url": outbound.proxy().url(),
                "up": outbound.works(),
                "in_use": in_use(outbound),
                "latency_ms": outbound.latency().map(|latency| latency.as_millis()),
            }),
        };
        let name = told["name"].as_str().unwrap_or_default().to_owned();
        // Of two that have been called the same, the one of now.
        let mut numbers = all.remove(&name).map_or_else(|| json!([]), |known| known["numbers"].clone());
        if let Some(numbers) = numbers.as_array_mut() {
            numbers.extend(number.map(|number| json!(number)));
        }
        told["numbers"] = numbers;
        all.insert(name, told);
    }
    all.into_iter().map(|(_, upstream)| upstream).collect()
}

/// Resident bytes of this process.
fn memory() -> Option<u64> {
    let status = procfs::process::Process::myself().and_then(|process| process.status()).ok()?;
    status.vmrss.map(|kib| kib * 1024)
}

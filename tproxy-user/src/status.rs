//! What the running proxy tells of itself.

use std::cell::RefCell;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::cmd;
use crate::config::Config;
use crate::datapath::counters::CounterMap;
use crate::instance::Instance;
use crate::instance::control::Request;
use crate::stats::Stats;
use crate::steering::{Attached, Steering};

/// Answers requests at the control socket.
#[derive(Debug)]
pub struct Reporter {
    basics: Map<String, Value>,
    /// Opened at the start: later there may be no descriptor left.
    counters: Option<CounterMap>,
    listeners: Vec<String>,
    stats: Arc<Stats>,
    attached: RefCell<Vec<Attached>>,
}

impl Reporter {
    /// A reporter of this run.
    #[must_use]
    pub fn new(config: &Config, instance: &Instance, listeners: Vec<String>, stats: Arc<Stats>) -> Self {
        Self {
            basics: cmd::status::basics(instance),
            // Without steering there are no programs that count.
            counters: CounterMap::open(&config.pin).ok(),
            listeners,
            stats,
            attached: RefCell::default(),
        }
    }

    /// Notes what is attached now.
    pub fn note(&self, steering: &Steering) {
        self.attached.replace(steering.attached().cloned().collect());
    }

    /// The answer to a request.
    #[must_use]
    pub fn answer(&self, request: Request) -> Value {
        match request {
            Request::Status => self.status(),
        }
    }

    fn status(&self) -> Value {
        let mut status = self.basics.clone();
        let snapshot = self.stats.snapshot();
        let interfaces: Vec<_> = self
            .attached
            .borrow()
            .iter()
            .map(|a| json!({"name": a.name, "index": a.index, "attach": a.hook, "role": a.role}))
            .collect();
        let mut all = Map::new();
        if let Some(Ok(kernel)) = self.counters.as_ref().map(CounterMap::read) {
            all.extend(kernel.entries().map(|(name, value, _)| (name.to_owned(), value.into())));
        }
        all.extend(snapshot.entries().map(|entry| (entry.name.to_owned(), entry.value.into())));
        status.insert("interfaces".to_owned(), interfaces.into());
        status.insert("listeners".to_owned(), json!(self.listeners));
        status.insert("upstreams".to_owned(), json!([{"name": "direct", "up": true, "latency_ms": null}]));
        status.insert(
            "connections".to_owned(),
            json!({"tcp": snapshot.tcp_active, "udp": snapshot.udp_active}),
        );
        status.insert("counters".to_owned(), all.into());
        status.into()
    }
}

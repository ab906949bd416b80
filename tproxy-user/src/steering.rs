//! The kernel side of a run: programs, maps, rules, routes, settings. It makes
//! the kernel follow the plan, whatever others do to it; undoing is `undo.rs`,
//! by the journal.

mod keep;
mod policy;
mod upkeep;

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;

use anyhow::Context as _;
use rtnetlink::Handle;
use tokio::io::unix::AsyncFd;
use tproxy_common::abi::{ABI_VERSION, ListenerKind, MAX_WORKERS, Settings, listener_index};

use crate::clsact;
use crate::config::{Attach, Config, Fail, Handshake, SourceMode};
use crate::datapath::attach::Hook;
use crate::datapath::bpffs;
use crate::datapath::features::Features;
use crate::datapath::load::Datapath;
use crate::datapath::names::NameTable;
use crate::failure::Failure;
use crate::instance::{self, Instance};
use crate::interfaces;
use crate::listener::WorkerListeners;
use crate::plan::{Plan, Role};
use crate::privilege;
use crate::routing;
use crate::rulebook::Rulebook;
use crate::stats::Stats;
use crate::sysctl;
use crate::tun::{self, Tun};
use crate::undo;
use policy::Compiled;
use upkeep::Upkeep;

/// The running kernel side.
#[derive(Debug)]
pub struct Steering {
    config: Config,
    plan: Plan,
    datapath: Datapath,
    /// The rules by which the kernel decides.
    policy: Option<policy::Held>,
    rulebook: Rulebook,
    handle: Handle,
    /// By index: what is attached now.
    attached: BTreeMap<u32, Attached>,
    /// The tun device of faithful handshakes.
    tun: Option<tun::Link>,
    upkeep: Upkeep,
}

/// An interface with programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is to the proxy.
    pub role: Role,
    /// How the programs are attached.
    pub hook: Hook,
}

impl Steering {
    /// Loads the programs and fills the maps. Nothing is captured yet.
    ///
    /// # Errors
    ///
    /// [`Failure::Conflict`] where table or mark are taken,
    /// [`Failure::Unsupported`] where the kernel lacks something, else what failed.
    pub async fn prepare(
        config: &Config,
        plan: &Plan,
        (listeners, tun): (&[WorkerListeners], Option<&Tun>),
        handle: &Handle,
        instance: &mut Instance,
        stats: &Arc<Stats>,
        rulebook: &Rulebook,
    ) -> anyhow::Result<Self> {
        let features = Features::of(privilege::kernel(config)?)?;
        check(config, plan, features)?;
        let (table, mark) = (config.steering.table, config.steering.mark);
        // A running instance first: it is named, where a rule alone is anybody's.
        if let Some(conflict) = instance::claimed_by_another(instance.paths(), table, mark)? {
            return Err(Failure::Conflict(conflict).into());
        }
        if let Some(conflict) = routing::conflict::find(handle, table, mark).await? {
            return Err(Failure::Conflict(conflict).into());
        }
        instance.claim_routing(table, mark)?;
        bpffs::set_aside(&config.pin)?;
        let settings = settings(config, features, listeners, tun);
        let mut datapath = Datapath::load(
            &settings,
            features,
            config.limits.flow_table,
            &config.pin,
            config.steering.bpf_log,
        )?;
        for (worker, listeners) in (0..).zip(listeners) {
            for listener in listeners.iter() {
                datapath.set_listener(listener.kind, worker, &listener.fd)?;
            }
        }
        let mut steering = Self {
            config: config.clone(),
            plan: plan.clone(),
            datapath,
            policy: None,
            rulebook: rulebook.clone(),
            handle: handle.clone(),
            attached: BTreeMap::new(),
            tun: tun.map(|tun| tun.link.clone()),
            upkeep: Upkeep::new(Arc::clone(stats)),
        };
        let names = NameTable::open(&config.pin).context("cannot open the map of names")?;
        rulebook.tell(names);
        steering.keep_policy().await?;
        if let Some(tun) = tun {
            let hook = steering.hook();
            if hook == Hook::Clsact {
                clsact::add_clsact(handle, tun.link.index).await?;
            }
            steering.datapath.attach_handshakes(tun, hook)?;
        }
        Ok(steering)
    }

    /// Rules, routes and settings, then the programs: packets come from here on.
    ///
    /// # Errors
    ///
    /// What failed.
    pub async fn start(&mut self, instance: &mut Instance) -> anyhow::Result<()> {
        if self.config.steering.bpf_log {
            self.log()?;
        }
        if !self.datapath.features().sk_lookup() {
            tracing::warn!(
                "this kernel has no sk_lookup programs (Linux 5.9): fragmented datagrams are forwarded, not proxied, \
                 and a client port that is used again at once costs a retry"
            );
        }
        self.apply(instance).await?;
        // Only now: until here the programs of a killed run decided over new flows.
        bpffs::remove_replaced(&self.config.pin)?;
        Ok(())
    }

    /// Follows a change of interfaces, addresses, routes or rules.
    ///
    /// # Errors
    ///
    /// What failed; the next change tries again.
    pub async fn follow(&mut self, instance: &mut Instance) -> anyhow::Result<()> {
        let host = interfaces::snapshot(&self.handle, self.config.steering.table).await?;
        // Its own writes bring it here as well: then there is nothing to do.
        let plan = Plan::new(&self.config, &host)?;
        for refused in plan.refused.iter().filter(|refused| !self.plan.refused.contains(refused)) {
            tracing::warn!("{refused}");
        }
        self.plan = plan;
        self.apply(instance).await
    }

    /// Looks after what another program may have removed without a notice, and
    /// after what was left for later because it keeps being removed.
    ///
    /// # Errors
    ///
    /// What failed.
    pub async fn check(&mut self, instance: &mut Instance) -> anyhow::Result<()> {
        if self.upkeep.is_behind() {
            return self.follow(instance).await;
        }
        self.keep_policy().await?;
        self.keep(instance).await
    }

    /// Takes another configuration, which differs in what can change while the programs run.
    ///
    /// # Errors
    ///
    /// [`Failure::Usage`] for a name or rule that cannot be had, [`Failure::Unsupported`] for one
    /// that needs a newer kernel, or what failed; all is as before then.
    pub async fn reload(&mut self, config: Config, instance: &mut Instance) -> anyhow::Result<()> {
        let host = interfaces::snapshot(&self.handle, config.steering.table).await?;
        let plan = Plan::new(&config, &host)?;
        check(&config, &plan, self.datapath.features())?;
        // One that was named before may be gone for a while.
        let before = &self.config.capture.interfaces;
        if plan.missing.iter().any(|name| !before.contains(name))
            || plan.refused.iter().any(|refused| !self.plan.refused.contains(refused))
        {
            plan.require_interfaces(&host)?;
        }
        self.require_hooks(&plan).await?;
        let rules = self.compile(&plan).await?;
        let before = (mem::replace(&mut self.config, config), mem::replace(&mut self.plan, plan));
        let applied = self.carry_out(rules, instance).await;
        if applied.is_err() {
            (self.config, self.plan) = before;
            if let Err(error) = self.apply(instance).await {
                // The next change of the network tries again.
                tracing::warn!("cannot go back to what was before the reload: {error:#}");
            }
            return applied;
        }
        for warning in &self.plan.warnings {
            tracing::warn!("{warning}");
        }
        Ok(())
    }

    /// Makes the kernel be as the plan says.
    async fn apply(&mut self, instance: &mut Instance) -> anyhow::Result<()> {
        let rules = self.compile(&self.plan).await?;
        self.carry_out(rules, instance).await
    }

    /// The same, with rules that are compiled. They come to hold after what may fail and that no
    /// packet notices, and before other interfaces are captured by them.
    async fn carry_out(&mut self, rules: Option<Compiled>, instance: &mut Instance) -> anyhow::Result<()> {
        self.datapath.set_local(&self.plan.local)?;
        self.keep_routing().await?;
        if let Some(rules) = rules {
            self.switch(rules)?;
        }
        self.detach_stale(instance).await;
        undo::renamed(instance)?;
        self.keep(instance).await
    }

    /// Whether the interfaces of a plan can be captured, as far as it can be seen.
    async fn require_hooks(&self, plan: &Plan) -> anyhow::Result<()> {
        if self.hook() == Hook::Clsact {
            for interface in plan.interfaces.iter().filter(|new| !self.attached.contains_key(&new.index)) {
                if clsact::qdisc(&self.handle, interface.index).await? == clsact::Qdisc::Ingress {
                    return Err(keeps_clsact_out(&interface.name).into());
                }
            }
        }
        Ok(())
    }

    /// Detaches from interfaces that are gone or changed their part. Links are
    /// detached by removing their pins; filters would stay, and be joined by
    /// others once the interface is back.
    async fn detach_stale(&mut self, instance: &mut Instance) {
        let plan = &self.plan;
        let stays = |index: u32, attached: &Attached| {
            plan.interfaces
                .iter()
                .any(|i| i.index == index && i.name == attached.name && i.role == attached.role)
        };
        let (stay, stale): (BTreeMap<_, _>, BTreeMap<_, _>) =
            mem::take(&mut self.attached).into_iter().partition(|(index, attached)| stays(*index, attached));
        self.attached = stay;
        for (index, attached) in stale {
            tracing::info!("{}: detached", attached.name);
            self.detach(&attached.name, index, instance).await;
        }
    }

    fn hook(&self) -> Hook {
        match self.config.steering.attach {
            Attach::Tcx => Hook::Tcx,
            Attach::Auto if self.datapath.features().tcx() => Hook::Tcx,
            Attach::Auto | Attach::Clsact => Hook::Clsact,
        }
    }

    /// Passes the log lines of the debugging build on.
    fn log(&mut self) -> anyhow::Result<()> {
        let logger = self.datapath.logger().context("cannot read the log of the eBPF programs")?;
        // SAFETY: the logger owns its descriptor and keeps it until it is dropped.
        let mut logger = unsafe { AsyncFd::register_with_interest(logger, tokio::io::Interest::READABLE) }?;
        tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(())
    }

    /// Takes the TCP listeners away from the programs: new connections fail
    /// open or closed, those that run go on. UDP has no openings: its flows,
    /// new ones too, are served until the end.
    ///
    /// # Errors
    ///
    /// Where the map cannot be changed.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        for kind in [ListenerKind::Tcp4, ListenerKind::Tcp6] {
            self.datapath.clear_listeners(kind, self.config.workers)?;
        }
        Ok(())
    }

    /// Rules of the configuration, and bytes that their image takes in the kernel.
    #[must_use]
    pub fn policy(&self) -> (usize, usize) {
        (self.plan.policy.len(), self.policy.as_ref().map_or(0, |held| held.bytes))
    }

    /// The plan that is carried out.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What is attached, for `status`.
    pub fn attached(&self) -> impl Iterator<Item = &Attached> {
        self.attached.values()
    }

    /// The captured interfaces in words.
    #[must_use]
    pub fn describe(&self) -> String {
        let names: Vec<_> =
            self.attached.values().filter(|a| a.role == Role::Capture).map(|a| a.name.as_str()).collect();
        match (names.is_empty(), self.config.capture.own_traffic) {
            (false, false) => names.join(", "),
            (false, true) => format!("{} and this host's own traffic", names.join(", ")),
            (true, true) => "this host's own traffic".to_owned(),
            (true, false) => "no interface yet".to_owned(),
        }
    }
}

fn keeps_clsact_out(interface: &str) -> Failure {
    Failure::conflict(format_args!(
        "{interface} has an ingress qdisc, which keeps clsact out; remove it (tc qdisc del dev {interface} ingress) or use a kernel with tcx (6.6)"
    ))
}

/// Refuses what was asked for and the kernel lacks.
fn check(config: &Config, plan: &Plan, features: Features) -> Result<(), Failure> {
    if config.steering.attach == Attach::Tcx && !features.tcx() {
        return Err(Failure::unsupported("--attach tcx needs Linux 6.6; leave it out to attach by clsact"));
    }
    if config.steering.handshake == Handshake::Faithful && !features.link_headers() {
        return Err(Failure::unsupported("--handshake faithful needs Linux 5.8"));
    }
    if plan.notes_groups && !features.socket_notes() {
        return Err(Failure::unsupported("rules with `gid` need Linux 5.9"));
    }
    if config.steering.bpf_log && !features.ring_buffer() {
        return Err(Failure::unsupported("--bpf-log needs the ring buffer of Linux 5.8"));
    }
    Ok(())
}

/// The constants of the programs.
fn settings(
    config: &Config,
    features: Features,
    listeners: &[WorkerListeners],
    tun: Option<&Tun>,
) -> Settings {
    let capture = &config.capture;
    let steering = &config.steering;
    let mut settings = Settings {
        abi_version: ABI_VERSION,
        mark_value: steering.mark.value,
        mark_mask: steering.mark.mask,
        own_mark: steering.own_mark,
        workers: config.workers.min(MAX_WORKERS),
        lo_ifindex: interfaces::LOOPBACK_INDEX,
        handshake_ifindex: tun.map_or(0, |tun| tun.link.index),
        listen_v4: steering.on_ip4.octets(),
        listen_v6: steering.on_ip6.octets(),
        udp_timeout: u64::try_from(config.timeouts.udp.as_nanos()).unwrap_or(u64::MAX),
        fail_open: (capture.fail == Fail::Open).into(),
        listener_by_tuple: (!features.listeners_from_tc()).into(),
        link_headers: features.link_headers().into(),
        own_traffic: capture.own_traffic.into(),
        sk_lookup: features.sk_lookup().into(),
        client_port: (config.source == SourceMode::ClientPort).into(),
        early_demux: sysctl::early_demux().into(),
        coarse_clock: features.coarse_clock().into(),
        ..Settings::default()
    };
    for (worker, listeners) in (0..).zip(listeners) {
        for listener in listeners.iter() {
            settings.listener_ports.0[listener_index(listener.kind, worker) as usize] = listener.addr.port();
        }
    }
    settings
}

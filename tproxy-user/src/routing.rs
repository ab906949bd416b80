//! Routing rules and local routes: applied, compared, removed.
//!
//! All that is made here carries the protocol number [`PROTOCOL`], and one
//! table belongs to one instance, so what a killed run left is known again.

pub mod conflict;
mod message;

use rtnetlink::Handle;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleMessage;
use tracing::debug;

use crate::interfaces;
use crate::netlink::{Error, collect};
use crate::plan::{LocalRoute, Rule};
use message::{local_route, ours_of, route_message, route_protocol, rule_message};

/// Who made a rule or route, in the numbers of `rtm_protocol` (Linux 4.17 for
/// rules): free in `/etc/iproute2/rt_protos`, and the letter `t`.
pub const PROTOCOL: u8 = 116;

/// How many rules and routes were added and removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Added.
    pub added: u32,
    /// Removed.
    pub removed: u32,
}

/// The rules and routes of one instance, told by their table.
#[derive(Clone, Debug)]
pub struct Routing {
    handle: Handle,
    table: u32,
}

impl Routing {
    /// Those of the instance with this table, in the network namespace of `handle`.
    #[must_use]
    pub fn new(handle: Handle, table: u32) -> Self {
        Self { handle, table }
    }

    /// Adds what of `rules` and `routes` is not there and removes what of ours
    /// is not among them: leftovers, and what an earlier plan had.
    ///
    /// # Errors
    /// Where the kernel refuses; a second try goes on where this one stopped.
    pub async fn apply(&self, rules: &[Rule], routes: &[LocalRoute]) -> Result<Changes, Error> {
        self.apply_if(rules, routes, &mut |_| true).await
    }

    /// The same, but what `may_add` says no to (told the command of `ip` that
    /// would do it) is not added now.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub async fn apply_if(
        &self,
        rules: &[Rule],
        routes: &[LocalRoute],
        may_add: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Changes, Error> {
        let mut changes = Changes::default();
        let (present_rules, present_routes) = (self.own_rules().await?, self.own_routes().await?);
        // The route first: a rule without it would send packets on to the next rule.
        for route in
            routes.iter().filter(|route| !present_routes.iter().any(|(own, _)| own == &Some(**route)))
        {
            if may_add(&route.to_string()) {
                self.add_route(*route).await?;
                changes.added += 1;
            }
        }
        // A rule that was there twice is kept once.
        let mut kept: Vec<&Rule> = Vec::new();
        for present in &present_rules {
            if rules.contains(present) && !kept.contains(&present) {
                kept.push(present);
            } else {
                self.delete_rule(present).await?;
                changes.removed += 1;
            }
        }
        for rule in rules.iter().filter(|rule| !kept.contains(rule)) {
            if may_add(&rule.to_string()) {
                self.add_rule(rule).await?;
                changes.added += 1;
            }
        }
        for (own, message) in &present_routes {
            if !own.is_some_and(|own| routes.contains(&own)) {
                self.delete_route(message.clone()).await?;
                changes.removed += 1;
            }
        }
        Ok(changes)
    }

    /// Removes all rules and routes of this instance, whichever run made them.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub async fn remove(&self) -> Result<Changes, Error> {
        self.apply(&[], &[]).await
    }

    /// Rules of ours that point to the table, of both families.
    async fn own_rules(&self) -> Result<Vec<Rule>, Error> {
        let mut own = Vec::new();
        for message in rules(&self.handle).await? {
            own.extend(ours_of(&message).filter(|rule| rule.table == self.table));
        }
        Ok(own)
    }

    /// Routes of ours in the table, of both families; `None` where it is not a
    /// local route for everything.
    async fn own_routes(&self) -> Result<Vec<(Option<LocalRoute>, RouteMessage)>, Error> {
        let found = table_routes(&self.handle, self.table).await?;
        Ok(found
            .into_iter()
            .filter(|message| message.header.protocol == route_protocol())
            .map(|message| (local_route(&message), message))
            .collect())
    }

    async fn add_rule(&self, rule: &Rule) -> Result<(), Error> {
        debug!(%rule, "adding a rule");
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule_message(rule);
        request.execute().await.map_err(|error| Error::new(format!("do: {rule}"), error))
    }

    async fn delete_rule(&self, rule: &Rule) -> Result<(), Error> {
        debug!(%rule, "removing a rule");
        let result = self.handle.rule().del(rule_message(rule)).execute().await;
        absent_is_done(result.map_err(|error| Error::new(format!("remove the rule: {rule}"), error)))
    }

    async fn add_route(&self, route: LocalRoute) -> Result<(), Error> {
        debug!(%route, "adding a route");
        let result = self.handle.route().add(route_message(route)).execute().await;
        result.map_err(|error| {
            let error = Error::new(format!("do: {route}"), error);
            match error.errno() {
                Some(libc::ENETDOWN) => {
                    Error { what: format!("{} (lo is down; mend: ip link set lo up)", error.what), ..error }
                }
                _ => error,
            }
        })
    }

    async fn delete_route(&self, message: RouteMessage) -> Result<(), Error> {
        let what = message::describe_route(&message);
        debug!(route = %what, "removing a route");
        let result = self.handle.route().del(message).execute().await;
        absent_is_done(result.map_err(|error| Error::new(format!("remove the route: {what}"), error)))
    }
}

/// Somebody else may have removed it since it was listed.
fn absent_is_done(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        other => other,
    }
}

/// All rules, of both families.
async fn rules(handle: &Handle) -> Result<Vec<RuleMessage>, Error> {
    let mut found = Vec::new();
    for version in [rtnetlink::IpVersion::V4, rtnetlink::IpVersion::V6] {
        found.extend(collect("list rules", handle.rule().get(version).execute()).await?);
    }
    Ok(found)
}

/// All routes of a table, of both families.
async fn table_routes(handle: &Handle, table: u32) -> Result<Vec<RouteMessage>, Error> {
    let mut found = interfaces::routes(handle, false, Some(table), None).await?;
    found.extend(interfaces::routes(handle, true, Some(table), None).await?);
    Ok(found)
}

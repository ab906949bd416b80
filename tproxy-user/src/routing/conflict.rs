//! Rules and routes of others that are in the way.

use rtnetlink::Handle;
use rtnetlink::packet_route::rule::RuleAttribute;

use super::message::{Parts, describe_route, describe_rule, parts, route_protocol};
use super::{rules, table_routes};
use crate::config::Mark;
use crate::netlink::{Error, family};

/// Looks for what forbids the use of `table` and `mark`: a route of another in
/// the table, a rule of another that points to it, or one that matches packets
/// with the same mark. Returns what to tell the user, `None` where all is free.
///
/// Changes nothing, and needs no privilege.
///
/// # Errors
/// Where the kernel refuses a dump.
pub async fn find(handle: &Handle, table: u32, mark: Mark) -> Result<Option<String>, Error> {
    for message in table_routes(handle, table).await? {
        if message.header.protocol != route_protocol() {
            let ip = ip(message.header.address_family == family(true));
            let route = describe_route(&message);
            return Ok(Some(format!(
                "routing table {table} holds a route of another: '{route}'; choose another table with --table, \
                 or remove the route: {ip} route del {route} table {table}"
            )));
        }
    }
    for message in rules(handle).await? {
        let Parts { mark: other, table: target, ours, inverted, priority, .. } = parts(&message);
        let same_table = target == table;
        // An inverted rule ("not fwmark …", as wg-quick has it) singles out another mark than its own.
        let same_mark = !inverted && other.is_some_and(|other| other.overlaps(mark));
        if (ours && same_table) || !(same_table || same_mark) {
            continue;
        }
        let ip = ip(message.header.family == family(true));
        let rule = describe_rule(&message);
        return Ok(Some(if ours {
            format!(
                "the rule '{rule}' matches mark {mark} too and was left by another instance that was killed; \
                 remove what it left with tproxy-user cleanup --pin DIR, or with {ip} rule del pref {priority}"
            )
        } else if same_table {
            format!(
                "the rule '{rule}' of another points to table {table}; choose another table with --table, \
                 or remove the rule: {ip} rule del pref {priority}"
            )
        } else {
            format!(
                "the rule '{rule}' of another matches mark {mark} too; choose other bits with --tproxy-mark, \
                 or remove the rule: {ip} rule del pref {priority}"
            )
        }));
    }
    Ok(None)
}

/// A rule that comes before ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Earlier {
    /// As `ip rule` prints it.
    pub text: String,
    /// IPv6 (else IPv4).
    pub v6: bool,
    /// Its place.
    pub priority: u32,
    /// Interface that it asks for.
    pub iif: Option<String>,
    /// Mark that it asks for.
    pub mark: Option<Mark>,
    /// It has `not`.
    pub inverted: bool,
    /// It asks for more: addresses, ports, users.
    pub narrow: bool,
}

/// Rules of others before `priority`, but for the one that delivers to this
/// host's own addresses, which are never captured.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn earlier(handle: &Handle, priority: u32) -> Result<Vec<Earlier>, Error> {
    const TABLE_LOCAL: u32 = 255;
    let mut found = Vec::new();
    for message in rules(handle).await? {
        let Parts { iif, mark, table, priority: at, ours, inverted } = parts(&message);
        if at >= priority || ours || table == TABLE_LOCAL {
            continue;
        }
        let narrow = message.attributes.iter().any(|attribute| {
            !matches!(
                attribute,
                RuleAttribute::Priority(_)
                    | RuleAttribute::Table(_)
                    | RuleAttribute::FwMark(_)
                    | RuleAttribute::FwMask(_)
                    | RuleAttribute::Iifname(_)
                    | RuleAttribute::Protocol(_)
                    // "None", as every rule has it.
                    | RuleAttribute::SuppressPrefixLen(u32::MAX)
            )
        });
        let v6 = message.header.family == family(true);
        found.push(Earlier { text: describe_rule(&message), v6, priority: at, iif, mark, inverted, narrow });
    }
    Ok(found)
}

fn ip(v6: bool) -> &'static str {
    if v6 { "ip -6" } else { "ip" }
}

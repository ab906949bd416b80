//! Rules and routes of others that are in the way.

use rtnetlink::Handle;

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

fn ip(v6: bool) -> &'static str {
    if v6 { "ip -6" } else { "ip" }
}

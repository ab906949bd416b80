//! From rules as they are written to rules as the rest reads them.

use std::path::{Path, PathBuf};

use nix::unistd::{Group, User};
use tproxy_common::abi::{TCP, UDP};

use super::error::Mistake;
use super::lines;
use super::list::List;
use super::names;
use super::prefixes::Files;
use super::upstream::Upstreams;
use super::value::{Gid, Ids, Network, Protocol, Uid};
use super::{cgroup, rule};
use crate::config::rule::{Action, Addresses, Conditions, Diversion, Domains, NameFile, PrefixFile, Rule};
use crate::policy::domains;

/// Resolves rules; `directory` is what paths are relative to.
pub(super) fn rules(
    rules: &[rule::Rule],
    upstreams: &Upstreams,
    directory: &Path,
) -> Result<Vec<Rule>, Mistake> {
    let mut files = Files::default();
    let resolve = |(index, rule)| {
        Resolve { key: format!("rule[{index}]"), upstreams, directory, files: &mut files }.rule(rule)
    };
    let mut rules: Vec<Rule> =
        rules.iter().cloned().enumerate().map(resolve).collect::<Result<_, Mistake>>()?;
    domains::Domains::share(&mut rules);
    Ok(rules)
}

/// What resolves one rule.
struct Resolve<'a> {
    /// Where the rule is.
    key: String,
    upstreams: &'a Upstreams,
    directory: &'a Path,
    files: &'a mut Files,
}

impl Resolve<'_> {
    fn mistake(&self, key: &str, message: impl Into<String>) -> Mistake {
        Mistake::Key(format!("{}{key}", self.key), message.into())
    }

    fn rule(&mut self, rule: rule::Rule) -> Result<Rule, Mistake> {
        let action = self.action(&rule)?;
        self.only_what_the_relay_knows(&rule)?;
        let conditions = Conditions {
            protocols: values(rule.protocol, |protocol| match protocol {
                Protocol::Tcp => TCP,
                Protocol::Udp => UDP,
            }),
            from: Addresses {
                nets: networks(rule.from),
                files: self.files("from_file", rule.from_file)?,
                not: networks(rule.not_from),
            },
            to: Addresses {
                nets: networks(rule.to),
                files: self.files("to_file", rule.to_file)?,
                not: networks(rule.not_to),
            },
            from_ports: values(rule.from_port, Into::into),
            to_ports: values(rule.to_port, Into::into),
            interfaces: values(rule.iface, Into::into),
            macs: values(rule.mac, Into::into),
            dscps: values(rule.dscp, Into::into),
            marks: values(rule.mark, Into::into),
            uids: self.uids(rule.uid)?,
            gids: self.gids(rule.gid)?,
            domains: Domains {
                listed: values(rule.domain, Into::into),
                files: self.name_files(rule.domain_file)?,
                ..Domains::default()
            },
            cgroups: values(rule.cgroup, |name| cgroup::resolve(Path::new(cgroup::ROOT), &name.0)),
        };
        Ok(Rule { conditions, action })
    }

    fn action(&self, rule: &rule::Rule) -> Result<Action, Mistake> {
        if rule.target.is_some() && rule.action != rule::Action::Divert {
            return Err(self.mistake(".target", "only a rule with action = \"divert\" has a target"));
        }
        if rule.send_proxy.is_some() && rule.action != rule::Action::Divert {
            return Err(self.mistake(".send_proxy", "only a rule with action = \"divert\" has a send_proxy"));
        }
        if rule.upstream.is_some() && rule.action != rule::Action::Proxy {
            return Err(self.mistake(".upstream", "only a rule with action = \"proxy\" has an upstream"));
        }
        Ok(match (rule.action, &rule.target) {
            (rule::Action::Proxy, _) => Action::Proxy(match &rule.upstream {
                None => None,
                Some(text) => Some(self.upstreams.find(text).map_err(|why| self.mistake(".upstream", why))?),
            }),
            (rule::Action::Divert, Some(target)) => {
                Action::Divert(Diversion { target: target.0, send_proxy: rule.send_proxy })
            }
            (rule::Action::Divert, None) => {
                let message = "action = \"divert\" needs a target, such as target = \"127.0.0.53:53\"";
                return Err(self.mistake("", message));
            }
            (rule::Action::Pass, _) => Action::Pass,
            (rule::Action::Reject, _) => Action::Reject,
            (rule::Action::Drop, _) => Action::Drop,
        })
    }

    /// A rule that asks for a name is decided over by the relay, which has seen no packet.
    fn only_what_the_relay_knows(&self, rule: &rule::Rule) -> Result<(), Mistake> {
        let others = [
            ("mac", rule.mac.is_some()),
            ("dscp", rule.dscp.is_some()),
            ("mark", rule.mark.is_some()),
            ("uid", rule.uid.is_some()),
            ("gid", rule.gid.is_some()),
            ("cgroup", rule.cgroup.is_some()),
        ];
        let Some((other, _)) = others.iter().find(|(_, asked)| *asked) else { return Ok(()) };
        let key = if rule.domain.is_some() {
            ".domain"
        } else if rule.domain_file.is_some() {
            ".domain_file"
        } else {
            return Ok(());
        };
        let message = format!(
            "a rule with names cannot have `{other}`, which is not known any more once the name is: leave one of them out"
        );
        Err(self.mistake(key, message))
    }

    fn name_files(&self, paths: Option<List<PathBuf>>) -> Result<Vec<NameFile>, Mistake> {
        let read = |path: PathBuf| {
            let path = self.directory.join(path);
            names::read(&path).map_err(|error| self.unread("domain_file", &path, error))
        };
        paths.into_iter().flatten().map(read).collect()
    }

    fn unread(&self, key: &str, path: &Path, error: lines::Error) -> Mistake {
        match error {
            lines::Error::Io(error) => {
                self.mistake(&format!(".{key}"), format!("cannot read {}: {error}", path.display()))
            }
            lines::Error::Content(failure) => Mistake::Elsewhere(failure),
        }
    }

    fn files(&mut self, key: &str, paths: Option<List<PathBuf>>) -> Result<Vec<PrefixFile>, Mistake> {
        let read = |path: PathBuf| {
            let path = self.directory.join(path);
            self.files.read(path.clone()).map_err(|error| self.unread(key, &path, error))
        };
        paths.into_iter().flatten().map(read).collect()
    }

    fn uids(&self, uids: Option<List<Uid>>) -> Result<Vec<(u32, u32)>, Mistake> {
        let number = |name: &str| Ok(User::from_name(name)?.map(|user| user.uid.as_raw()));
        values(uids, Into::into).into_iter().map(|ids| self.ids(ids, ("uid", "user"), number)).collect()
    }

    fn gids(&self, gids: Option<List<Gid>>) -> Result<Vec<(u32, u32)>, Mistake> {
        let number = |name: &str| Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()));
        values(gids, Into::into).into_iter().map(|ids| self.ids(ids, ("gid", "group"), number)).collect()
    }

    fn ids(
        &self,
        ids: Ids,
        (key, of): (&str, &str),
        number: impl Fn(&str) -> nix::Result<Option<u32>>,
    ) -> Result<(u32, u32), Mistake> {
        let name = match ids {
            Ids::Range(first, last) => return Ok((first, last)),
            Ids::Name(name) => name,
        };
        let why = match number(&name) {
            Ok(Some(id)) => return Ok((id, id)),
            Ok(None) => format!("this host has no {of} of this name"),
            Err(error) => format!("cannot look up the {of}: {error}"),
        };
        Err(self.mistake(&format!(".{key}"), format!("'{name}': {why}")))
    }
}

fn values<T, V>(list: Option<List<T>>, value: impl FnMut(T) -> V) -> Vec<V> {
    list.into_iter().flatten().map(value).collect()
}

fn networks(list: Option<List<Network>>) -> Vec<ipnet::IpNet> {
    values(list, Into::into)
}

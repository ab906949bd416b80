//! Upstreams, as they are written and resolved.

mod check;
mod group;

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::Mistake;
use crate::config::upstream::{self, Credentials, Proxy, Tls, Udp};
pub use check::Check;
pub use group::Group;

/// The most that a file with a password may have, in bytes: more is another file.
const LONGEST: u64 = 4096;

/// The most that a file with certificates may have, in bytes: those of a system have a quarter of one MiB.
const MOST_CERTIFICATES: u64 = 4 << 20;

/// A proxy server that flows can be sent through.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Upstream {
    /// What rules call it.
    pub name: String,
    /// What it speaks and where it is, such as <socks5://10.0.0.2:1080>, <http://proxy.example.org:3128>
    /// or, inside TLS, <https://proxy.example.org:443>.
    pub url: String,
    /// The user that it knows.
    pub username: Option<String>,
    /// A file with the password of that user; relative to the config file.
    pub password_file: Option<PathBuf>,
    /// The environment variable that has it.
    pub password_env: Option<String>,
    /// The systemd credential that has it (`LoadCredential=`).
    pub password_credential: Option<String>,
    /// A file with certificates, in PEM form, of whom is trusted to have signed that of an https://
    /// server, instead of those whom the system trusts; relative to the config file.
    pub ca_file: Option<PathBuf>,
    /// The name or address that its certificate has, where that is not the host of the URL.
    pub server_name: Option<String>,
    /// UDP flows that it cannot carry: reject (the default), pass, direct.
    pub udp: Option<Udp>,
    /// Ask it for destinations by their names, where the client's first bytes tell them (TLS or QUIC
    /// server name, HTTP host), so that it looks them up.
    pub names: Option<bool>,
    /// Another upstream, defined above, through which this one is reached. Carries TCP alone.
    pub via: Option<String>,
    /// Say the whole SOCKS5 handshake at once, where the server reads on: dante and v2ray do, microsocks does not.
    pub pipelined: Option<bool>,
    /// How it is found out whether it works; members of groups are checked also without.
    pub check: Option<Check>,
}

/// The upstreams of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upstreams(Vec<upstream::Upstream>);

impl Upstreams {
    /// What several texts name: one, or the first of them that works.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_all(&self, texts: &[String]) -> Result<upstream::Upstream, String> {
        if let [only] = texts {
            return self.find(only);
        }
        let members = texts.iter().map(|text| {
            Ok(match self.find(text)? {
                // Which of them work is to be known.
                upstream::Upstream::Proxy(proxy) if proxy.check.is_none() => {
                    let check = Some(upstream::Check::default());
                    upstream::Upstream::Proxy(Arc::new(Proxy { check, ..(*proxy).clone() }))
                }
                upstream::Upstream::Group(group) => {
                    return Err(format!("'{}': a group can be named alone only", group.name));
                }
                known => known,
            })
        });
        let members = members.collect::<Result<_, String>>()?;
        let policy = upstream::Policy::Failover;
        Ok(upstream::Upstream::Group(Arc::new(upstream::Group { name: "upstreams".into(), members, policy })))
    }

    /// Resolves what is written; `directory` is what paths are relative to.
    pub(super) fn new(written: &[Upstream], groups: &[Group], directory: &Path) -> Result<Self, Mistake> {
        let mut known = Self::default();
        for (index, written) in written.iter().enumerate() {
            let mistake = |(key, message)| Mistake::Key(format!("upstream[{index}].{key}"), message);
            let mut proxy = written.resolve(directory).map_err(mistake)?;
            if let Some(via) = &written.via {
                proxy.via = Some(known.server(via).map_err(|why| mistake(("via", why)))?);
            }
            if groups.iter().any(|group| group.members.contains(&written.name)) {
                proxy.check.get_or_insert_default();
            }
            known.add(upstream::Upstream::Proxy(proxy.into())).map_err(mistake)?;
        }
        let alone = known.clone();
        for (index, group) in groups.iter().enumerate() {
            let mistake = |(key, message)| Mistake::Key(format!("group[{index}].{key}"), message);
            let group = group.resolve(&alone).map_err(mistake)?;
            known.add(upstream::Upstream::Group(group.into())).map_err(mistake)?;
        }
        Ok(known)
    }

    /// The proxy server with this name.
    fn server(&self, name: &str) -> Result<Arc<Proxy>, String> {
        match self.find(name)? {
            upstream::Upstream::Proxy(proxy) => Ok(proxy),
            other => {
                Err(format!("'{}': expected the name of an [[upstream]] that is defined above", other.name()))
            }
        }
    }

    /// Adds one whose name is new.
    fn add(&mut self, upstream: upstream::Upstream) -> Result<(), (&'static str, String)> {
        if upstream.name() == "direct" || self.0.iter().any(|other| other.name() == upstream.name()) {
            return Err(("name", format!("'{}': there is one of this name already", upstream.name())));
        }
        self.0.push(upstream);
        Ok(())
    }

    /// The upstream that a text names.
    ///
    /// # Errors
    /// What was expected.
    pub fn find(&self, text: &str) -> Result<upstream::Upstream, String> {
        if text == "direct" {
            return Ok(upstream::Upstream::Direct);
        }
        if text.contains("://") {
            let proxy = Proxy::parse(text)?;
            proxy.tls.as_ref().map(Tls::client).transpose()?;
            return Ok(upstream::Upstream::Proxy(proxy.into()));
        }
        let name = upstream::name(text)?;
        if let Some(known) = self.0.iter().find(|known| known.name() == name) {
            return Ok(known.clone());
        }
        let names: Vec<_> = self.0.iter().map(upstream::Upstream::name).chain(["direct"]).collect();
        let hint = super::error::nearest(&name, &names)
            .map_or_else(|| format!("expected {}", names.join(", ")), super::error::ask);
        Err(format!("'{name}': no [[upstream]] or [[group]] has this name; {hint}"))
    }
}

impl Upstream {
    /// What it means; or a key, and what is wrong with it.
    fn resolve(&self, directory: &Path) -> Result<Proxy, (&'static str, String)> {
        let name = named(&self.name)?;
        let mut proxy = Proxy::parse(&self.url).map_err(|message| ("url", message))?;
        if let Some((key, password)) = self.password(directory)? {
            let Some(username) = &self.username else {
                return Err((key, "a password is of a user: name one with username".to_owned()));
            };
            if proxy.credentials.is_some() {
                return Err(("username", "the URL has a user already".to_owned()));
            }
            proxy.credentials = Some(Credentials::new(username, &password).map_err(|why| (key, why))?);
        } else if self.username.is_some() {
            let message =
                "a user has a password: name it with password_file, password_env or password_credential";
            return Err(("username", message.to_owned()));
        }
        self.resolve_tls(&mut proxy, directory)?;
        let files = [&self.password_file, &self.ca_file].into_iter().flatten();
        proxy.files = files.map(|file| directory.join(file)).collect();
        proxy.udp = self.udp.unwrap_or_default();
        let check = self.check.as_ref().map(Check::resolve).transpose().map_err(|why| ("check", why))?;
        let (names, pipelined) = (self.names.unwrap_or_default(), self.pipelined.unwrap_or_default());
        Ok(Proxy { name: name.into(), names, pipelined, check, ..proxy })
    }

    /// Adds what is written about TLS.
    fn resolve_tls(&self, proxy: &mut Proxy, directory: &Path) -> Result<(), (&'static str, String)> {
        let Some(tls) = &mut proxy.tls else {
            let of_none = |key: &'static str| Err((key, "it is of an https:// server alone".to_owned()));
            return match (&self.ca_file, &self.server_name) {
                (None, None) => Ok(()),
                (Some(_), _) => of_none("ca_file"),
                (None, Some(_)) => of_none("server_name"),
            };
        };
        if let Some(name) = &self.server_name {
            tls.name = Tls::name(name).map_err(|why| ("server_name", why))?;
        }
        if let Some(file) = &self.ca_file {
            let path = directory.join(file);
            let read = pem(&path).and_then(|pem| Tls::authorities(&pem));
            let authorities = read.map_err(|why| ("ca_file", format!("{}: {why}", path.display())))?;
            *tls = tls.clone().signed_by(authorities);
        }
        tls.client().map(drop).map_err(|why| ("url", why))
    }

    /// The password, and the key that names it.
    fn password(&self, directory: &Path) -> Result<Option<(&'static str, String)>, (&'static str, String)> {
        let (file, env, credential) = (&self.password_file, &self.password_env, &self.password_credential);
        let (key, password) = match (file, env, credential) {
            (None, None, None) => return Ok(None),
            (Some(file), None, None) => ("password_file", read(&directory.join(file))),
            (None, Some(variable), None) => ("password_env", environment(variable)),
            (None, None, Some(name)) => ("password_credential", credential_of(name)),
            _ => return Err(("username", "it has several passwords: leave all but one out".to_owned())),
        };
        password.map(|password| Some((key, password))).map_err(|message| (key, message))
    }
}

fn named(name: &str) -> Result<String, (&'static str, String)> {
    let expected = |_| ("name", "expected up to 64 letters, digits, '-', '_' and '.'".to_owned());
    upstream::name(name).map_err(expected)
}

fn environment(variable: &str) -> Result<String, String> {
    std::env::var(variable).map_err(|error| format!("cannot read ${variable}: {error}"))
}

/// A credential that systemd has put where it says (systemd.exec(5), `CREDENTIALS_DIRECTORY`).
fn credential_of(name: &str) -> Result<String, String> {
    let Some(directory) = std::env::var_os("CREDENTIALS_DIRECTORY") else {
        return Err(format!("'{name}': there are no credentials; the unit needs LoadCredential={name}:PATH"));
    };
    if name.contains('/') {
        return Err(format!("'{name}': expected the name of a credential, which has no '/'"));
    }
    read(&Path::new(&directory).join(name))
}

/// The content of a file with certificates.
fn pem(path: &Path) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(MOST_CERTIFICATES + 1).read_to_end(&mut content).map_err(|error| error.to_string())?;
    if content.len() as u64 > MOST_CERTIFICATES {
        return Err(format!("expected certificates, at most {} MiB of them", MOST_CERTIFICATES >> 20));
    }
    Ok(content)
}

/// The first line of a file.
fn read(path: &Path) -> Result<String, String> {
    let cannot = |error: &dyn std::fmt::Display| format!("cannot read {}: {error}", path.display());
    let mut text = String::new();
    let file = File::open(path).map_err(|error| cannot(&error))?;
    file.take(LONGEST).read_to_string(&mut text).map_err(|error| cannot(&error))?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() || line.contains('\n') {
        return Err(format!("{}: expected a password, alone on one line", path.display()));
    }
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests;

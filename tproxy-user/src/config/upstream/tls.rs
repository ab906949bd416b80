//! TLS towards a proxy server.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use super::Host;

/// Whom a server is to prove to be, and to whom.
#[derive(Clone)]
pub struct Tls {
    /// The name, or the address, that its certificate is to have.
    pub name: ServerName<'static>,
    authorities: Option<Arc<[CertificateDer<'static>]>>,
    /// What follows from the authorities, once it was asked for.
    client: OnceLock<Arc<ClientConfig>>,
}

impl Tls {
    /// As usual with a server at this host.
    ///
    /// # Errors
    /// No certificate can have its name.
    pub fn of(host: &Host) -> Result<Self, String> {
        let name = match host {
            Host::Address(ip) => ServerName::from(*ip),
            Host::Name(name) => Self::name(name)?,
        };
        Ok(Self { name, authorities: None, client: OnceLock::new() })
    }

    /// A name, or an address, that a certificate can have.
    ///
    /// # Errors
    /// What was expected.
    pub fn name(text: &str) -> Result<ServerName<'static>, String> {
        let name = ServerName::try_from(text.to_owned());
        name.map_err(|_| format!("'{text}': expected a name or an address, as its certificate has it"))
    }

    /// Reads certificates in PEM form.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn authorities(pem: &[u8]) -> Result<Arc<[CertificateDer<'static>]>, String> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let all = all.map_err(|error| format!("expected certificates in PEM form: {error}"))?;
        store(&all)?;
        Ok(all.into())
    }

    /// Who may have signed the certificate; else those whom the system trusts.
    #[must_use]
    pub fn signed_by(self, authorities: Arc<[CertificateDer<'static>]>) -> Self {
        Self { name: self.name, authorities: Some(authorities), client: OnceLock::new() }
    }

    /// What handshakes are made with. Reads the system's certificates, where it is those, the
    /// first time.
    ///
    /// # Errors
    /// The system trusts nobody.
    pub fn client(&self) -> Result<Arc<ClientConfig>, String> {
        if let Some(client) = self.client.get() {
            return Ok(Arc::clone(client));
        }
        let roots = match &self.authorities {
            Some(authorities) => store(authorities)?,
            None => system()?,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| error.to_string())?;
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        // CONNECT is said in HTTP/1.1, and a server is not to choose another.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::clone(self.client.get_or_init(|| Arc::new(config))))
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.authorities) == (&other.name, &other.authorities)
    }
}

impl Eq for Tls {}

fn store(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in authorities {
        let added = roots.add(certificate.clone());
        added.map_err(|error| format!("a certificate cannot be used: {error}"))?;
    }
    if roots.is_empty() {
        return Err("expected certificates in PEM form, and there is none".to_owned());
    }
    Ok(roots)
}

/// Those whom the system trusts. Some hosts have certificates that nobody can use; they are left out.
fn system() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(format!(
            "this host has no certificates of authorities{why}; install ca-certificates, or name some with ca_file"
        ));
    }
    Ok(roots)
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authorities = self.authorities.as_ref().map(|all| all.len());
        f.debug_struct("Tls")
            .field("name", &self.name)
            .field("authorities", &authorities)
            .finish_non_exhaustive()
    }
}

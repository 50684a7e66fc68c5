//! What connections are encrypted with: a certificate and its key, from PEM files that are read once, at the start.

use crate::config::serve::TlsFiles;
use anyhow::{Context as _, Result, ensure};
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;

/// What shakes hands with clients.
///
/// # Errors
/// A file that can't be read or has no certificate or key in it, or a key that is another certificate's; by its name.
pub(super) fn load(files: &TlsFiles) -> Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(&files.cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|error| fault(&files.cert, "certificate", &error))?;
    ensure!(!chain.is_empty(), "{}: holds no certificate in PEM form", files.cert.display());
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| fault(&files.key, "private key", &error))?;
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
    let config = config.context("the TLS library knows no protocol")?.with_no_client_auth().with_single_cert(chain, key);
    let mut config = config.map_err(|error| {
        let (cert, key) = (files.cert.display(), files.key.display());
        match error {
            rustls::Error::InconsistentKeys(_) => anyhow::anyhow!("{key}: is not the key of the certificate in {cert}"),
            rustls::Error::InvalidCertificate(_) => anyhow::anyhow!("{cert}: {error}"),
            _ => anyhow::anyhow!("{cert}, {key}: {error}"),
        }
    })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Why a file has not what it should.
fn fault(path: &Path, what: &str, error: &PemError) -> anyhow::Error {
    let path = path.display();
    match error {
        PemError::NoItemsFound => anyhow::anyhow!("{path}: holds no {what} in PEM form that is not encrypted"),
        PemError::Io(error) => anyhow::anyhow!("{path}: {error}"),
        other => anyhow::anyhow!("{path}: is no {what} in PEM form: {other}"),
    }
}

//! The files that the configuration names: credentials, certificates, keys, authorities.
//!
//! Knows how they are written, and that a key belongs to its certificate. Must not know
//! who uses them, or when they are read again. The invariant it keeps: what it returns
//! can be served, and an error names the file and never shows what is in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::InconsistentKeys;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::Secret;

/// The files of a certificate chain, the server's own first, and of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FileError {
    /// The machine is wrong.
    #[error("{0} cannot be read: {1}")]
    Unreadable(String, String),
    /// The file is wrong.
    #[error("{0} {1}")]
    Unusable(String, String),
}

impl FileError {
    pub(crate) fn unusable(path: &Path, why: impl Into<String>) -> Self {
        Self::Unusable(path.display().to_string(), why.into())
    }
}

/// Returns a file's bytes.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|error| FileError::Unreadable(path.display().to_string(), error.to_string()))
}

impl Pair {
    /// Returns what both files hold now.
    ///
    /// # Errors
    /// If one of them cannot be read.
    pub(crate) fn read(&self) -> Result<[Vec<u8>; 2], FileError> {
        Ok([read(&self.certificate)?, read(&self.key)?])
    }

    /// Returns the chain with its key, ready to sign.
    ///
    /// # Errors
    /// If one of them holds nothing that can be used, or the key is another
    /// certificate's.
    pub(crate) fn parse(&self, [certificate, key]: &[Vec<u8>; 2]) -> Result<Arc<CertifiedKey>, FileError> {
        let chain = certificates(&self.certificate, certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
            pem::Error::NoItemsFound => {
                FileError::unusable(&self.key, "holds no private key in PEM; an encrypted one cannot be used")
            }
            _ => FileError::unusable(&self.key, "is not PEM"),
        })?;
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                let why = format!("is not the key of the first certificate in {}", self.certificate.display());
                FileError::unusable(&self.key, why)
            }
            rustls::Error::InvalidCertificate(why) => {
                FileError::unusable(&self.certificate, format!("holds a certificate that cannot be used: {why}"))
            }
            _ => FileError::unusable(&self.key, "holds a private key of a kind that cannot be used"),
        })?;
        Ok(Arc::new(certified))
    }
}

/// Returns the certificates of a file, at least one.
///
/// # Errors
/// If there is none, or one of them is not PEM.
pub(crate) fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(FileError::unusable(path, "holds no certificate in PEM")),
        Ok(certificates) => Ok(certificates),
        Err(_) => Err(FileError::unusable(path, "is not PEM")),
    }
}

/// Returns the authorities of a file, at least one.
///
/// # Errors
/// If there is none, or one of them cannot be an authority.
pub(crate) fn authorities(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found = certificates(path, bytes)?;
    let mut store = rustls::RootCertStore::empty();
    for (i, certificate) in found.iter().enumerate() {
        store.add(certificate.clone()).map_err(|error| {
            FileError::unusable(path, format!("holds a certificate that cannot be used, the {}. one: {error}", i + 1))
        })?;
    }
    Ok(found)
}

/// Returns the credentials of a file, one a line, at least one.
///
/// # Errors
/// If there is none, or it is not text.
pub(crate) fn credentials(path: &Path, bytes: &[u8]) -> Result<Vec<Secret>, FileError> {
    let text = std::str::from_utf8(bytes).map_err(|_| FileError::unusable(path, "is not text in UTF-8"))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let credentials: Vec<Secret> = lines.map(Secret::new).collect();
    if credentials.is_empty() {
        return Err(FileError::unusable(path, "holds no credential; write one a line"));
    }
    Ok(credentials)
}

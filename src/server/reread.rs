//! The files that are read again while a pod serves: keys, credentials and certificates.
//!
//! Knows when to look and whether something changed. Must not know what stands in them.
//! The invariant it keeps: what cannot be used changes nothing and is said once; what
//! was in force stays in force.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::credentials::Credentials;
use super::tls::Tls;
use crate::cluster::{Cluster, KeyRing};
use crate::config::named::{self, FileError};
use crate::config::{Config, Tls as TlsFiles};

/// How often to look. Kubernetes itself takes up to a minute to bring a changed secret.
const EVERY: Duration = Duration::from_secs(5);

/// What stood in the files, in their order.
type Found = Vec<Vec<u8>>;

type Apply = dyn Fn(&[Vec<u8>]) -> Result<(), FileError> + Send;

/// One thing that is read from files.
struct Watched {
    what: &'static str,
    read: Box<dyn Fn() -> Result<Found, FileError> + Send>,
    /// Puts it into force.
    apply: Box<Apply>,
    /// Of what was found last, so that nothing secret is kept; `None`: not looked yet.
    last: Option<Result<u64, FileError>>,
}

/// What is read again.
pub(crate) struct Files {
    watched: Mutex<Vec<Watched>>,
    stamp: RandomState,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Files")
    }
}

impl Files {
    /// Returns the files that `config` names, and puts what stands in them now into force.
    pub(crate) fn new(
        config: &Config,
        cluster: Option<&Arc<Cluster>>,
        credentials: &Arc<Credentials>,
        tls: Option<&Arc<Tls>>,
    ) -> Arc<Self> {
        let mut watched = Vec::new();
        if let (Some(path), Some(cluster)) = (config.gossip.key_file.clone(), cluster.cloned()) {
            let read = path.clone();
            watched.push(Watched {
                what: "key file",
                read: Box::new(move || Ok(vec![named::read(&read)?])),
                apply: Box::new(move |found| {
                    let found = found.first().map(Vec::as_slice).unwrap_or_default();
                    let unusable = |why: String| FileError::unusable(&path, why);
                    let keys = KeyRing::parse(&String::from_utf8_lossy(found));
                    cluster
                        .rekey(keys.map_err(|error| unusable(error.to_string()))?)
                        .map_err(|error| unusable(error.to_string()))
                }),
                last: None,
            });
        }
        let config = &config.proxy;
        if let Some(path) = config.credentials_file.clone() {
            let (credentials, fixed) = (credentials.clone(), config.fixed_credentials.clone());
            let read = path.clone();
            watched.push(Watched {
                what: "credentials",
                read: Box::new(move || Ok(vec![named::read(&read)?])),
                apply: Box::new(move |found| {
                    let found = found.first().map(Vec::as_slice).unwrap_or_default();
                    credentials.replace(&[named::credentials(&path, found)?, fixed.clone()].concat());
                    Ok(())
                }),
                last: None,
            });
        }
        if let (Some(TlsFiles { pair, .. }), Some(tls)) = (config.tls.clone(), tls.cloned()) {
            let read = pair.clone();
            watched.push(Watched {
                what: "certificate",
                read: Box::new(move || Ok(read.read()?.to_vec())),
                apply: Box::new(move |found| {
                    let [certificate, key] = found else { return Ok(()) };
                    let certified = pair.parse(&[certificate.clone(), key.clone()])?;
                    tls.replace(certified).map_err(|error| FileError::unusable(&pair.certificate, error.to_string()))
                }),
                last: None,
            });
        }
        let files = Self { watched: Mutex::new(watched), stamp: RandomState::new() };
        files.look();
        Arc::new(files)
    }

    /// Reads all of them and puts what changed into force. Blocks on the disk.
    pub(crate) fn look(&self) {
        for watched in &mut *self.watched.lock().unwrap_or_else(PoisonError::into_inner) {
            let found = (watched.read)();
            let stamp = found.as_ref().map(|found| self.stamp.hash_one(found)).map_err(Clone::clone);
            let is_first = watched.last.is_none();
            if watched.last.as_ref() == Some(&stamp) {
                continue;
            }
            watched.last = Some(stamp);
            let what = watched.what;
            match found.and_then(|found| (watched.apply)(&found)) {
                Ok(()) if is_first => {}
                Ok(()) => tracing::info!(event = "file_changed", what, "the {what} changed: the new one is in force"),
                Err(error) => {
                    tracing::error!(event = "file_refused", what, %error, "the {what} changed and cannot be used: the old one is in force")
                }
            }
        }
    }

    /// As [`Files::look`], off the threads that serve.
    pub(crate) async fn read_again(self: &Arc<Self>) {
        let files = self.clone();
        let _ = tokio::task::spawn_blocking(move || files.look()).await;
    }

    /// Looks from time to time, for ever.
    pub(crate) async fn watch(self: Arc<Self>) {
        if self.watched.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return;
        }
        loop {
            tokio::time::sleep(EVERY).await;
            self.read_again().await;
        }
    }
}

//! The gossip key file, read again while a replica takes part: keys are rotated without a
//! restart.
//!
//! Knows when to look and whether something changed. Must not know what a key is. The
//! invariant it keeps: what cannot be used changes nothing, and is said once.

use std::fmt;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::sync::Weak;
use std::time::Duration;

use quotum::cluster::{Cluster, KeyRing};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

/// How often to look, as `quotum serve` does. Kubernetes itself takes up to a minute to bring
/// a changed secret.
const EVERY: Duration = Duration::from_secs(5);

/// A file with gossip keys, and what was last found in it.
#[derive(Clone, Debug)]
pub(crate) struct KeyFile {
    path: String,
    hasher: RandomState,
    /// Of what was found, so that nothing secret is kept.
    last: Result<u64, String>,
}

impl KeyFile {
    /// Reads the keys for the first time.
    ///
    /// # Errors
    /// Says why there are none.
    pub(crate) fn open(path: String) -> Result<(Self, KeyRing), String> {
        let mut file = Self { path, hasher: RandomState::new(), last: Err(String::new()) };
        let (found, keys) = file.read();
        file.last = found;
        Ok((file, keys?))
    }

    /// Returns what tells this reading from another, and its keys.
    fn read(&self) -> (Result<u64, String>, Result<KeyRing, String>) {
        let wrong = |error: &dyn fmt::Display| format!("{}: {error}", self.path);
        match fs::read_to_string(&self.path) {
            Ok(text) => (Ok(self.hasher.hash_one(&text)), KeyRing::parse(&text).map_err(|error| wrong(&error))),
            Err(error) => (Err(wrong(&error)), Err(wrong(&error))),
        }
    }

    /// Returns the keys that stand in the file now, unless it is as it was.
    fn changed(&mut self) -> Option<Result<KeyRing, String>> {
        let (found, keys) = self.read();
        let is_new = found != self.last;
        self.last = found;
        is_new.then_some(keys)
    }

    /// Looks from time to time, for as long as the replica takes part.
    pub(crate) async fn watch(mut self, cluster: Weak<Cluster>) {
        loop {
            sleep(EVERY).await;
            let Some(cluster) = Weak::upgrade(&cluster) else { return };
            // A disk may take its time.
            let looked = spawn_blocking(move || {
                let keys = self.changed();
                (self, keys)
            });
            let Ok((file, keys)) = looked.await else { return };
            self = file;
            let applied = keys.map(|keys| cluster.rekey(keys?).map_err(|error| format!("{}: {error}", self.path)));
            if let Some(Err(why)) = applied {
                eprintln!("quotum: the key file changed and cannot be used, the old keys are in force: {why}");
            }
        }
    }
}

//! What callers must present, if anything.
//!
//! Knows hashes of the credentials. Must not know the credentials themselves for longer
//! than it takes to hash them. The invariant it keeps: how long a comparison takes says
//! nothing about what would have been right.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{PoisonError, RwLock};

use axum::http::{HeaderMap, header};

use crate::config::Secret;

/// The accepted credentials; none means that nobody is asked.
pub(crate) struct Credentials {
    /// Two keyed hashes (SipHash) of each: 128 bits under keys no caller knows, so
    /// that neither a match nor a near miss can be constructed.
    hashes: RwLock<Vec<[u64; 2]>>,
    keys: [RandomState; 2],
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    pub(crate) fn new(secrets: &[Secret]) -> Self {
        let keys = [RandomState::new(), RandomState::new()];
        let credentials = Self { hashes: RwLock::default(), keys };
        credentials.replace(secrets);
        credentials
    }

    /// Accepts these from now on, and no others.
    pub(crate) fn replace(&self, secrets: &[Secret]) {
        let hashes = secrets.iter().map(|secret| hash(&self.keys, secret.reveal().as_bytes())).collect();
        *self.hashes.write().unwrap_or_else(PoisonError::into_inner) = hashes;
    }

    /// Returns whether nobody is asked for a credential.
    pub(crate) fn is_empty(&self) -> bool {
        self.hashes.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Returns whether the request carries an accepted credential, as bearer or
    /// `x-api-key`.
    pub(crate) fn accept(&self, headers: &HeaderMap) -> bool {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
            let (scheme, credential) = value.as_bytes().split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then(|| credential.trim_ascii())
        });
        let key = headers.get("x-api-key").map(|value| value.as_bytes());
        [bearer, key].into_iter().flatten().any(|presented| self.knows(presented))
    }

    fn knows(&self, presented: &[u8]) -> bool {
        let presented = hash(&self.keys, presented);
        // Every hash is compared in full, whatever the earlier ones were.
        let hashes = self.hashes.read().unwrap_or_else(PoisonError::into_inner);
        let found = hashes.iter().fold(0u64, |found, known| {
            let difference = (known[0] ^ presented[0]) | (known[1] ^ presented[1]);
            found | u64::from(std::hint::black_box(difference) == 0)
        });
        found != 0
    }
}

fn hash(keys: &[RandomState; 2], bytes: &[u8]) -> [u64; 2] {
    [keys[0].hash_one(bytes), keys[1].hash_one(bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn bearer_and_api_key_are_both_read() {
        let credentials = Credentials::new(&[Secret::new("one"), Secret::new("two")]);
        let with = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            credentials.accept(&headers)
        };
        assert!(with("authorization", "Bearer one"));
        assert!(with("authorization", "bearer two"));
        assert!(with("x-api-key", "two"));
        assert!(!with("authorization", "Bearer on"));
        assert!(!with("authorization", "Basic one"));
        assert!(!with("authorization", "one"));
        assert!(!credentials.accept(&HeaderMap::new()));
    }
}

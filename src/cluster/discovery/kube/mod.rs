//! Kubernetes: the pods as the API server lists and watches them, beside the headless name.
//!
//! Knows when to list, when to watch, and what to fall back to. Must not know what follows from an
//! answer. The invariants it keeps: the first answer is a consistent list, and an answer is never
//! older than a watch lasts; without the API server the headless name goes on alone, and that is said.

mod api;
mod pods;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{debug, info, warn};

pub use self::api::KubeConfig;

use self::api::{Api, ApiError, Said, Watch};
use self::pods::Pods;
use super::{Answer, Discovery, Dns, Fallback, LOOKUP_EVERY, LOOKUP_EVERY_JOINING, Unanswered};
use crate::cluster::socket::Net;
use crate::ledger::{Directory, Timestamp};

/// How long the headless name goes on alone before the API server is asked again.
const AGAIN: Duration = Duration::from_secs(5);

/// How often it is said that the API server does not answer.
const SAID_EVERY: Duration = Duration::from_secs(600);

/// What going by the headless name alone costs.
const MEANWHILE: &str = "the headless name goes on alone: newcomers are seen within seconds, and a pod that crashed \
    is proven gone by its absence only";

/// How long events are gathered before they are told: an update of a pod comes in several.
const GATHER: Duration = Duration::from_millis(50);

/// Returns what is known of the pods after an API server has said this: a list, or else lines of a watch, up to the
/// first that is neither. For whoever attacks the decoder; `ask` reads the same way.
#[doc(hidden)]
pub fn read(bytes: &[u8], port: u16) -> Answer {
    let mut pods = Pods::new(port);
    if let Ok((list, _)) = api::read_list(bytes) {
        pods.list(list);
    }
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        match api::read(line) {
            Ok(Said::Event(event, _)) => _ = pods.take(event),
            Ok(Said::Bookmark(_) | Said::End) => {}
            Err(_) => break,
        }
    }
    pods.answer()
}

/// The pods of a fleet on Kubernetes.
pub struct Kube<N> {
    api: Api,
    dns: Dns<N>,
    port: u16,
    memory: Mutex<Memory>,
    /// Apart from the memory, which a question under way holds for seconds.
    fallback: StdMutex<Option<Fallback>>,
}

/// What is known from one question to the next.
struct Memory {
    pods: Pods,
    /// The version that is known; `None`: list first.
    version: Option<String>,
    watch: Option<Watch>,
    opened: Option<Instant>,
    /// How long the API server is left alone.
    away_until: Option<Instant>,
    said: Option<Instant>,
    joined: bool,
}

impl<N: Net> Kube<N> {
    /// Returns the directory that asks the API server for pods, and `net` for `host` where the API
    /// server does not answer; every replica is at this UDP port.
    ///
    /// # Errors
    /// If the file with the API server's authority cannot be used: says why.
    pub fn new(net: Arc<N>, host: &str, port: u16, config: KubeConfig) -> Result<Self, String> {
        let pods = Pods::new(port);
        let memory =
            Memory { pods, version: None, watch: None, opened: None, away_until: None, said: None, joined: false };
        let (memory, fallback) = (Mutex::new(memory), StdMutex::default());
        Ok(Self { api: Api::new(config)?, dns: Dns::new(net, host, port), port, memory, fallback })
    }

    /// Waits for the next thing that is worth an answer, at most as long as a headless name would
    /// be left alone.
    async fn watched(&self, memory: &mut Memory) -> Result<Answer, ApiError> {
        let every = if memory.joined { LOOKUP_EVERY } else { LOOKUP_EVERY_JOINING };
        let Some(version) = memory.version.clone() else {
            let (pods, version) = self.api.list().await?;
            memory.pods.list(pods);
            memory.version = Some(version);
            return Ok(memory.pods.answer());
        };
        let mut until = Instant::now() + every;
        if memory.watch.is_none() {
            memory.watch = Some(self.api.watch(&version).await?);
            memory.opened = Some(Instant::now());
            // Not before: who may list and not watch has not come back.
            if let Some(Fallback { since, .. }) = self.fell_back().take() {
                memory.said = None;
                info!(
                    event = "discovery_restored",
                    since_unix_ms = since.unix_ms(),
                    "the API server tells of the pods again"
                );
            }
        }
        let mut news = false;
        loop {
            let Some(watch) = &mut memory.watch else { return Ok(memory.pods.answer()) };
            let Ok(said) = tokio::time::timeout_at(until, watch.next()).await else {
                return Ok(memory.pods.answer());
            };
            match said {
                Ok(Said::Event(event, version)) => {
                    memory.version = Some(version);
                    if memory.pods.take(event) && !news {
                        news = true;
                        until = until.min(Instant::now() + GATHER);
                    }
                }
                Ok(Said::Bookmark(version)) => memory.version = Some(version),
                // The next question opens another one; not at once, if this one ended at once.
                Ok(Said::End) => {
                    memory.watch = None;
                    if memory.opened.is_some_and(|opened| opened.elapsed() < LOOKUP_EVERY_JOINING) {
                        tokio::time::sleep(LOOKUP_EVERY_JOINING).await;
                    }
                }
                Err(error) => {
                    memory.watch = None;
                    return Err(error);
                }
            }
        }
    }

    /// The headless name's answer, for as long as the API server gives none.
    async fn alone(&self, memory: &mut Memory, error: &ApiError, now: Timestamp) -> Result<Answer, Unanswered> {
        let resolve = self.api.resolve(error);
        let since = {
            let mut fallback = self.fell_back();
            let since = fallback.as_ref().map_or(now, |fallback| fallback.since);
            *fallback =
                Some(Fallback { since, why: error.to_string(), meanwhile: MEANWHILE.into(), resolve: resolve.clone() });
            since
        };
        if memory.said.is_none_or(|said| said.elapsed() >= SAID_EVERY) {
            memory.said = Some(Instant::now());
            let since_unix_ms = since.unix_ms();
            warn!(event = "discovery_fell_back", %error, since_unix_ms, resolve, "{MEANWHILE}; {resolve}");
        }
        memory.watch = None;
        memory.version = None;
        memory.away_until = Some(Instant::now() + AGAIN);
        self.dns.ask(now).await
    }

    fn fell_back(&self) -> MutexGuard<'_, Option<Fallback>> {
        // It is whole or not there.
        self.fallback.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl<N: Net> Discovery for Kube<N> {
    fn directory(&self) -> Directory {
        Directory::Name
    }

    /// Answers come when something has happened.
    fn every(&self, settled: bool) -> Option<Duration> {
        if settled && let Ok(mut memory) = self.memory.try_lock() {
            memory.joined = true;
        }
        Some(Duration::ZERO)
    }

    async fn ask(&self, now: Timestamp) -> Result<Answer, Unanswered> {
        let memory = &mut *self.memory.lock().await;
        if memory.away_until.is_some_and(|until| Instant::now() < until) {
            tokio::time::sleep(LOOKUP_EVERY_JOINING).await;
            return self.dns.ask(now).await;
        }
        match self.watched(memory).await {
            Ok(answer) => Ok(answer),
            // What broke off is watched on, and what is too old for that is listed anew.
            Err(error) if memory.version.is_some() && !matches!(error, ApiError::Refused { .. }) => {
                debug!(%error, "the watch of the pods ended");
                if matches!(error, ApiError::Expired) {
                    memory.version = None;
                }
                match self.watched(memory).await {
                    Ok(answer) => Ok(answer),
                    Err(error) => self.alone(memory, &error, now).await,
                }
            }
            Err(error) => self.alone(memory, &error, now).await,
        }
    }

    fn fallback(&self) -> Option<Fallback> {
        self.fell_back().clone()
    }

    async fn towards(&self) -> io::Result<Option<SocketAddr>> {
        self.dns.towards().await
    }
}

impl<N> fmt::Debug for Kube<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the pods behind port {} as {:?} lists them, and {:?}", self.port, self.api, self.dns)
    }
}

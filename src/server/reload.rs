//! Reading the configuration again while the pod serves.
//!
//! Knows what can change at run time and what cannot, and when to look. Must not know how a
//! limit switches or a request is served. The invariant it keeps: a file that is wrong in any
//! part changes nothing at all, and is said with file, line and field.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::{Limiter, UnknownDeployment};
use tokio::signal::unix::Signal;

use super::proxy::Proxy;
use super::reread::Files;
use super::upstream::Client;
use super::{admin::Admin, builder};
use crate::config::{Config, ConfigError, Deployment, Source, Timeouts};
use crate::telemetry::Telemetry;

/// How often to look at the file. Kubernetes itself takes up to a minute to bring a changed
/// ConfigMap. What it says is compared, not its time: a ConfigMap changes by a link.
const EVERY: Duration = Duration::from_secs(5);

/// Everything that a changed configuration reaches.
pub(crate) struct Reload {
    pub(super) source: Source,
    pub(super) limiter: Limiter,
    pub(super) proxy: Arc<Proxy>,
    pub(super) admin: Arc<Admin>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) client: Box<dyn Fn(Timeouts) -> Client + Send + Sync>,
    pub(super) state: Mutex<State>,
}

/// What was read last.
pub(super) struct State {
    /// What is in force.
    running: Config,
    /// What the file said when it was read last, usable or not. `None`: it may have changed
    /// since the pod read it at its start.
    seen: Option<u64>,
    stamp: RandomState,
    /// One for each set of timeouts, so that connections outlive a change of something else.
    clients: Vec<(Timeouts, Client)>,
}

/// Why nothing was changed.
type Refused = Box<dyn std::error::Error + Send + Sync>;

impl State {
    pub(super) fn new(running: Config, clients: Vec<(Timeouts, Client)>) -> Mutex<Self> {
        Mutex::new(Self { running, seen: None, stamp: RandomState::new(), clients })
    }

    fn said(&self, file: Option<&Path>) -> Option<u64> {
        Some(self.stamp.hash_one(std::fs::read(file?).ok()?))
    }
}

impl fmt::Debug for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reload").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Reload {
    /// Looks from time to time, and when told to by SIGHUP, for ever.
    pub(crate) async fn watch(self, files: Arc<Files>, mut hangup: Signal) {
        let this = Arc::new(self);
        loop {
            let told = tokio::select! {
                biased;
                signal = hangup.recv() => signal.is_some(),
                () = tokio::time::sleep(EVERY) => false,
            };
            if told {
                files.read_again().await;
            }
            let this = this.clone();
            let _ = tokio::task::spawn_blocking(move || this.look(told)).await;
        }
    }

    /// Reads the configuration if its file says something else than before, or if told to.
    fn look(&self, told: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.source.file();
        let Some(name) = file.as_deref().map(|file| file.display().to_string()) else {
            if told {
                tracing::warn!(
                    event = "config_without_file",
                    "told to read the configuration again, and there is no file: start with --config"
                );
            }
            return;
        };
        let said = state.said(file.as_deref());
        // A file that is missing for a moment is being replaced.
        if !told && (said.is_none() || said == state.seen) {
            return;
        }
        let is_first = state.seen.is_none();
        state.seen = said;
        match self.apply(&mut state) {
            Ok(None) if is_first && !told => {}
            Ok(changes) => {
                let changes = changes.unwrap_or_else(|| "nothing changed".into());
                tracing::info!(event = "config_changed", file = name, "the configuration was read again: {changes}");
                self.telemetry.reloaded("changed");
                self.admin.reloaded(None);
            }
            Err(error) => {
                tracing::error!(
                    event = "config_refused",
                    file = name,
                    "the configuration cannot be used, the old one is in force: {error}"
                );
                self.telemetry.reloaded("refused");
                // Whoever reaches the admin port is told where; what stands there is for the log.
                let shown = error.downcast_ref().map_or_else(|| error.to_string(), ConfigError::places);
                self.admin.reloaded(Some(shown));
            }
        }
    }

    /// Puts into force what stands in the file now; says what that changed.
    fn apply(&self, state: &mut State) -> Result<Option<String>, Refused> {
        let config = self.source.load()?;
        let limiter = self.limiter.reconfigure(builder(&config.deployments))?;
        let State { running, clients, .. } = state;
        let mut client = |deployment: &Deployment| client_for(deployment.timeouts, clients, &self.client);
        let served: Result<(), UnknownDeployment> = self.proxy.serve_these(&config.deployments, &limiter, &mut client);
        served?;
        clients.retain(|(timeouts, _)| config.deployments.iter().any(|deployment| deployment.timeouts == *timeouts));
        let fixed = fixed(running, &config);
        if !fixed.is_empty() {
            tracing::warn!(
                event = "restart_needed",
                "changed, and in force only after a restart: {}",
                fixed.join(", ")
            );
        }
        let changes = changes(&running.deployments, &config.deployments, &limiter);
        self.admin.serve_these(&config.deployments, limiter);
        running.deployments = config.deployments;
        Ok(changes)
    }
}

/// Returns the client with these timeouts: a known one keeps its connections.
pub(super) fn client_for(
    timeouts: Timeouts,
    clients: &mut Vec<(Timeouts, Client)>,
    make: &dyn Fn(Timeouts) -> Client,
) -> Client {
    if let Some((_, client)) = clients.iter().find(|(known, _)| *known == timeouts) {
        return client.clone();
    }
    let client = make(timeouts);
    clients.push((timeouts, client.clone()));
    client
}

/// Names what changed among the deployments, and when.
fn changes(before: &[Deployment], after: &[Deployment], limiter: &Limiter) -> Option<String> {
    let find = |all: &'_ [Deployment], id: &str| all.iter().find(|deployment| deployment.id == id).cloned();
    let mut said = Vec::new();
    for deployment in after {
        match find(before, &deployment.id) {
            None => said.push(format!("{} added", deployment.id)),
            Some(known) if known != *deployment => said.push(format!("{} changed", deployment.id)),
            Some(_) => {}
        }
    }
    for deployment in before.iter().filter(|deployment| find(after, &deployment.id).is_none()) {
        said.push(format!("{} removed", deployment.id));
    }
    let now = limiter.now();
    for limit in limiter.status().limits {
        for switch in &limit.switches {
            said.push(format!("{} is {} in {:?}", limit.name, switch.to, switch.at.since(now)));
            said.dedup(); // It may follow several.
        }
    }
    (!said.is_empty()).then(|| said.join(", "))
}

/// Names what changed and cannot change while the pod runs.
fn fixed(running: &Config, read: &Config) -> Vec<&'static str> {
    let (a, b) = (&running.gossip, &read.gossip);
    let (p, q) = (&running.proxy, &read.proxy);
    let parts = [
        ("node.name", running.node != read.node),
        ("gossip.cluster", a.cluster != b.cluster),
        ("gossip.listen", a.listen != b.listen),
        ("gossip.advertise", a.advertise != b.advertise),
        ("gossip.seeds", a.seeds != b.seeds),
        ("gossip.pods", a.pods != b.pods),
        ("gossip.interval", a.interval != b.interval),
        ("gossip.key_file", a.key_file != b.key_file),
        ("gossip.insecure", a.insecure != b.insecure),
        ("gossip.absent_for", a.absent_for != b.absent_for),
        ("gossip.on_silence", a.on_silence != b.on_silence),
        ("gossip.patience", a.patience != b.patience),
        ("gossip.first_window", a.first_window != b.first_window),
        ("proxy.listen", p.listen != q.listen),
        ("proxy.credentials_file", p.credentials_file != q.credentials_file),
        ("proxy.tls", p.tls.as_ref().map(|tls| &tls.pair) != q.tls.as_ref().map(|tls| &tls.pair)),
        ("proxy.upstream_ca", p.upstream_ca != q.upstream_ca),
        ("proxy.max_body", p.max_body != q.max_body),
        ("proxy.max_bodies", p.max_bodies != q.max_bodies),
        ("proxy's bounds", p.bounds != q.bounds),
        ("proxy.linger", p.linger != q.linger),
        ("proxy.drain", p.drain != q.drain),
        ("admin.listen", running.admin != read.admin),
        ("general_settings.master_key", p.fixed_credentials != q.fixed_credentials),
    ];
    parts.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, parse};

    #[test]
    fn what_needs_a_restart_is_named() {
        let read = |rest: &str| {
            let limits = "limits: [{ unit: tokens, amount: 1, window: 1s }]";
            let text = format!("deployments: [{{ model: m, upstream: 'http://h/v1', {limits} }}]\n{rest}");
            parse(&text, "q.yaml", &|_| None, &Flags::default()).unwrap()
        };
        let usual = read("");
        assert_eq!(fixed(&usual, &usual), Vec::<&str>::new());
        let told = |rest: &str| fixed(&usual, &read(rest));
        assert_eq!(told("proxy: { max_bodies: 2GiB }"), ["proxy.max_bodies"]);
        assert_eq!(told("proxy: { drain: 5s, timeouts: { idle: 5s } }"), ["proxy's bounds", "proxy.drain"]);
        assert_eq!(told("gossip: { patience: 5s }\nadmin: { listen: '[::1]:1' }"), ["gossip.patience", "admin.listen"]);
        let litellm = |key: &str| {
            let text = format!(
                "general_settings: {{ master_key: {key} }}\nmodel_list: [{{ model_name: m, litellm_params: {{ model: gpt-4 }} }}]"
            );
            parse(&text, "l.yaml", &|_| None, &Flags::default()).unwrap()
        };
        assert_eq!(fixed(&litellm("a"), &litellm("b")), ["general_settings.master_key"]);
    }
}

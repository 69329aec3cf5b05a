//! What the operator asks for: config file, environment and flags, made one.
//!
//! Knows every setting, its default and who wins (default < file < environment <
//! flag); the only place of the product that reads the environment. Must not know what
//! is done with the settings. The invariant it keeps: a [`Config`] that exists is one
//! that can be served, and whoever wrote a wrong one is told file, line, field and what
//! to do.

mod check;
mod file;
mod litellm;
pub(crate) mod named;
mod place;
pub mod scalar;
#[cfg(test)]
mod tests;
mod tree;
pub(crate) mod zone;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::{KeyRing, Seeds};
pub use crate::layer::{Reserve, Tokenizer, Unreported};
use crate::ledger::{FirstWindow, OnSilence};
use crate::{Mode, Portion, Quota};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

pub use scalar::Secret;

/// The default port of the proxy.
const PROXY_PORT: u16 = 4000;
/// The default port of the admin endpoints.
const ADMIN_PORT: u16 = 9090;
/// The default UDP port of the gossip.
const GOSSIP_PORT: u16 = 7946;

/// Everything one pod needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// This pod's node name.
    pub node: String,
    pub gossip: Gossip,
    pub proxy: Proxy,
    /// Where the admin endpoints listen.
    pub admin: Listen,
    /// What is served; never empty unless `embedded_stub` is set.
    pub deployments: Vec<Deployment>,
    /// No deployments were configured: the built-in stub upstream is the only one.
    pub embedded_stub: bool,
    /// What an operator should know that is no mistake.
    pub remarks: Vec<String>,
}

/// How this pod finds and trusts its peers.
#[derive(Clone, Debug)]
pub struct Gossip {
    pub cluster: String,
    pub listen: Listen,
    pub advertise: Option<SocketAddr>,
    pub seeds: Seeds,
    /// On Kubernetes: the API server is asked for the pods, too.
    pub pods: Option<Pods>,
    pub interval: Duration,
    pub keys: KeyRing,
    /// Where they stand; read again on change.
    pub key_file: Option<PathBuf>,
    pub insecure: bool,
    pub absent_for: Duration,
    pub on_silence: OnSilence,
    pub patience: Duration,
    pub first_window: FirstWindow,
}

/// The fleet's pods on Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pods {
    /// Their label selector.
    pub selector: String,
    /// The namespace that this pod is in.
    pub namespace: String,
    /// Where the API server is.
    pub api: String,
}

/// What Kubernetes mounts into a pod that may ask the API server: its token, the authority of the
/// API server and the namespace.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// An address to listen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Every address of the machine: `[::]` dual-stack, `0.0.0.0` where that fails.
    Everywhere(u16),
    /// Exactly this one.
    At(SocketAddr),
}

/// The proxy port, and what its callers and upstreams may be.
#[derive(Clone, Debug)]
pub struct Proxy {
    pub listen: Listen,
    /// What callers may present; empty: no credential is asked for.
    pub credentials: Vec<Secret>,
    /// Those of them that stand in LiteLLM's file, and stay.
    pub fixed_credentials: Vec<Secret>,
    /// Where the others stand; read again on change.
    pub credentials_file: Option<PathBuf>,
    /// `None`: callers speak plain HTTP.
    pub tls: Option<Tls>,
    /// Authorities whose upstreams are believed beside the public ones.
    pub upstream_ca: Vec<CertificateDer<'static>>,
    pub max_body: usize,
    /// Bytes of all request bodies that are held at a time.
    pub max_bodies: usize,
    pub bounds: Bounds,
    /// How long requests are still taken after the signal to end.
    pub linger: Duration,
    /// How long requests in flight may take after that; `None`: as long as they do.
    pub drain: Option<Duration>,
}

/// TLS on the proxy port.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Where it stands; read again on change.
    pub pair: named::Pair,
    pub certified: Arc<CertifiedKey>,
}

/// What a caller may take of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Connections at a time; one more is answered with 503 and closed.
    pub connections: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// Headers of a request.
    pub headers: usize,
    /// Bytes of all of a request's headers, names and values.
    pub header_bytes: usize,
    /// From accepting a connection to the end of the TLS handshake.
    pub handshake: Duration,
    /// From accepting a connection, or from a request's first byte, to the end of its
    /// head.
    pub header: Duration,
    /// From a request's head to the end of its body.
    pub body: Duration,
    /// Between two pieces of a request's body.
    pub body_idle: Duration,
    /// How long a connection takes nothing of what is to be written on it.
    pub unread: Duration,
    /// How long a connection is kept without a request.
    pub idle: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connections: 10_000,
            streams: 250,
            headers: 100,
            header_bytes: 64 << 10,
            handshake: seconds(10),
            header: seconds(10),
            body: seconds(300),
            body_idle: seconds(30),
            unread: seconds(120),
            // Over the 60 s for which load balancers commonly keep theirs.
            idle: seconds(75),
        }
    }
}

/// One upstream model endpoint with its own limits.
#[derive(Clone, Debug, PartialEq)]
pub struct Deployment {
    pub id: String,
    /// The name callers use; several deployments may share it.
    pub model: String,
    /// The name the upstream uses, if that is another.
    pub upstream_model: Option<String>,
    /// The base of the upstream's API, such as `https://example.invalid/v1`.
    pub upstream: axum::http::Uri,
    pub api_key: Option<Secret>,
    pub timeouts: Timeouts,
    pub quotas: Vec<Quota>,
    pub limit_id: Option<String>,
    pub mode: Mode,
    pub wait: Duration,
    pub edge: Duration,
    pub reserve: Reserve,
    pub tokenizer: Tokenizer,
    pub default_max_tokens: u64,
    pub unreported: Unreported,
    /// What a token of the prompt counts that was read from the cache; `None` is one.
    pub cached_input: Option<Portion>,
    /// How often it is asked first among those of its model and order.
    pub weight: u32,
    /// Those of a lower order are asked first.
    pub order: u32,
}

/// How long each phase of an upstream request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// From sending the request to the response's head.
    pub first_byte: Duration,
    /// Between two pieces of the response's body.
    pub idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(5), first_byte: seconds(60), idle: seconds(120) }
    }
}

/// What stands on the command line of `serve`; the last word.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub node: Option<String>,
    pub cluster: Option<String>,
    pub gossip_listen: Option<String>,
    pub gossip_advertise: Option<String>,
    pub seeds: Option<String>,
    pub gossip_key_file: Option<String>,
    pub admin_listen: Option<String>,
    pub proxy_listen: Option<String>,
}

/// Where the configuration of `serve` comes from: to be read again while it runs.
#[derive(Clone, Debug, Default)]
pub struct Source {
    pub path: Option<PathBuf>,
    pub flags: Flags,
}

impl Source {
    /// Returns the configuration as it stands there now.
    ///
    /// # Errors
    /// As [`load`].
    pub fn load(&self) -> Result<Config, ConfigError> {
        load(self.path.as_deref(), &environment, &self.flags)
    }

    /// Returns the file, if there is one.
    pub fn file(&self) -> Option<PathBuf> {
        self.path.clone().or_else(|| environment("QUOTUM_CONFIG").map(PathBuf::from))
    }
}

/// Where variables are looked up; the process's own by [`environment`].
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Returns a variable of the process's environment; an empty one counts as unset.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// One thing that is wrong with the configuration, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where: `quotum.yaml:12:5`, `environment`, or `flag`.
    pub place: String,
    /// Which field, as a path: `deployments[0].limits[1].amount`.
    pub field: String,
    pub message: String,
    /// A file it names cannot be read: the machine is wrong, not the text.
    pub unreadable: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.field, self.message)
    }
}

/// A configuration that cannot be served: everything wrong with it, at least one thing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// Returns the exit code of the process: 69 if a file it names cannot be read and
    /// nothing else is wrong, else 64.
    pub fn exit_code(&self) -> u8 {
        if self.problems.iter().all(|problem| problem.unreadable) { 69 } else { 64 }
    }

    /// Returns where the problems are, without the values that stand there: one of them may
    /// be a credential in the wrong place.
    pub fn places(&self) -> String {
        let places: Vec<String> =
            self.problems.iter().map(|problem| format!("{}: {}", problem.place, problem.field)).collect();
        places.join("\n")
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

/// Returns the configuration of `serve`: the file if one is named by flag or
/// environment, the rest over it.
///
/// # Errors
/// Names everything that is wrong. Nothing was started.
pub fn load(path: Option<&Path>, env: Environment<'_>, flags: &Flags) -> Result<Config, ConfigError> {
    let from_env = env("QUOTUM_CONFIG");
    let path = path.or(from_env.as_deref().map(Path::new));
    let Some(path) = path else {
        return check::check(file::File::default(), None, "defaults", Some(env), flags);
    };
    parse(&text(path)?, &path.display().to_string(), env, flags)
}

/// Returns the configuration that `text` describes, with environment and flags over it.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, name: &str, env: Environment<'_>, flags: &Flags) -> Result<Config, ConfigError> {
    understood(text, name, Some(env), flags)
}

/// What is known of a configuration by its text alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// How many deployments stand in it.
    pub deployments: usize,
    /// What an operator should know: also what was not looked at.
    pub remarks: Vec<String>,
}

/// Checks what stands in a file by itself, away from where it is served: no variable is looked
/// up, and no file that it names is opened. What these would add or mend is no mistake.
///
/// # Errors
/// Names everything that is wrong wherever it is served.
pub fn check_offline(path: &Path) -> Result<Checked, ConfigError> {
    // It would serve without keys and credentials: nobody may have it.
    let config = understood(&text(path)?, &path.display().to_string(), None, &Flags::default())?;
    Ok(Checked { deployments: config.deployments.len(), remarks: config.remarks })
}

fn text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot be read: {error}");
        let (place, field) = (path.display().to_string(), "(the file)".into());
        ConfigError { problems: vec![Problem { place, field, message, unreadable: false }] }
    })
}

fn understood(text: &str, name: &str, env: Option<Environment<'_>>, flags: &Flags) -> Result<Config, ConfigError> {
    if litellm::is_one(text) {
        let read = litellm::read(text, name, env);
        return check::check(file::File::default(), Some(read), name, env, flags);
    }
    let options = serde_saphyr::options! {
        // A snippet of the file could show an api_key.
        with_snippet: false,
    };
    let file: Option<file::File> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        use serde_saphyr::Error::{DuplicateMappingKey, SerdeUnknownField};
        let location = error.location().filter(|location| location.line() > 0);
        let place = location.map_or_else(|| name.to_owned(), |at| format!("{name}:{}:{}", at.line(), at.column()));
        let is_name = matches!(error.without_snippet(), SerdeUnknownField { .. } | DuplicateMappingKey { .. });
        let field = location.and_then(|at| place::field_at(text, at, is_name)).unwrap_or_else(|| "(the file)".into());
        let message = error.render().lines().next().unwrap_or("not YAML").to_owned();
        // The place says so already.
        let message = message.split(" at line ").next().unwrap_or(&message).to_owned();
        ConfigError { problems: vec![Problem { place, field, message, unreadable: false }] }
    })?;
    let file = file.unwrap_or_default();
    if file.deployments.is_empty() && file.litellm_config.is_none() {
        // The embedded stub is for whoever gave no file at all; a file that lost its
        // deployments must not be answered with made-up text.
        let message = "no deployment is listed; list at least one, or leave out --config to serve the built-in stub";
        let problem =
            Problem { place: name.to_owned(), field: "deployments".into(), message: message.into(), unreadable: false };
        return Err(ConfigError { problems: vec![problem] });
    }
    check::check(file, None, name, env, flags)
}

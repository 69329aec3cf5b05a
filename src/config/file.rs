//! The config file as it is written, before anything in it is believed.
//!
//! Knows the names of the fields and where each value stood. Must not know what values
//! are right: that is `check`. The invariant it keeps: an unknown field is an error, so
//! a typing mistake never turns a limit off.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::scalar::Secret;
use super::tree::Tree;

pub(super) type Text = Option<Spanned<String>>;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    pub(super) node: Node,
    pub(super) gossip: Gossip,
    pub(super) proxy: Proxy,
    pub(super) admin: Admin,
    pub(super) litellm_config: Option<Spanned<String>>,
    pub(super) deployments: Vec<Spanned<Deployment>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Node {
    pub(super) name: Text,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Gossip {
    pub(super) cluster: Text,
    pub(super) listen: Text,
    pub(super) advertise: Text,
    pub(super) seeds: Option<Spanned<Vec<Spanned<String>>>>,
    pub(super) interval: Text,
    pub(super) key_file: Text,
    pub(super) pods: Text,
    pub(super) insecure: bool,
    pub(super) absent_for: Text,
    pub(super) on_silence: Text,
    pub(super) patience: Text,
    pub(super) first_window: Text,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Proxy {
    pub(super) listen: Text,
    pub(super) credentials_file: Text,
    pub(super) open: bool,
    pub(super) tls: Option<Spanned<Tls>>,
    pub(super) upstream_ca: Text,
    pub(super) linger: Text,
    pub(super) drain: Text,
    pub(super) max_body: Text,
    pub(super) max_bodies: Text,
    pub(super) max_connections: Option<Spanned<i64>>,
    pub(super) max_streams: Option<Spanned<i64>>,
    pub(super) max_headers: Option<Spanned<i64>>,
    pub(super) max_header_bytes: Text,
    pub(super) timeouts: CallerTimeouts,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Tls {
    pub(super) certificate: Text,
    pub(super) key: Text,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct CallerTimeouts {
    pub(super) handshake: Text,
    pub(super) header: Text,
    pub(super) body: Text,
    pub(super) body_idle: Text,
    pub(super) unread: Text,
    pub(super) idle: Text,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Admin {
    pub(super) listen: Text,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Deployment {
    #[serde(default)]
    pub(super) id: Text,
    pub(super) model: Spanned<String>,
    pub(super) upstream: Spanned<String>,
    #[serde(default)]
    pub(super) upstream_model: Text,
    #[serde(default)]
    pub(super) api_key: Option<Spanned<Secret>>,
    #[serde(default)]
    pub(super) timeouts: Timeouts,
    pub(super) limits: Spanned<Vec<Spanned<Limit>>>,
    #[serde(default)]
    pub(super) limit_id: Text,
    #[serde(default)]
    pub(super) mode: Option<Spanned<Tree>>,
    #[serde(default)]
    pub(super) wait: Text,
    #[serde(default)]
    pub(super) edge: Text,
    #[serde(default)]
    pub(super) reserve: Text,
    #[serde(default)]
    pub(super) tokenizer: Text,
    #[serde(default)]
    pub(super) default_max_tokens: Option<Spanned<i64>>,
    #[serde(default)]
    pub(super) unreported: Text,
    #[serde(default)]
    pub(super) weights: Weights,
    #[serde(default)]
    pub(super) weight: Option<Spanned<i64>>,
    #[serde(default)]
    pub(super) order: Option<Spanned<i64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Weights {
    pub(super) cached_input: Option<Spanned<f64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Timeouts {
    pub(super) connect: Text,
    pub(super) first_byte: Text,
    pub(super) idle: Text,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limit {
    pub(super) unit: Spanned<String>,
    pub(super) amount: Spanned<i64>,
    #[serde(default)]
    pub(super) window: Text,
    #[serde(default)]
    pub(super) kind: Option<Spanned<Tree>>,
    /// Settings of the kind, as they can also be written beside it.
    #[serde(default)]
    pub(super) parts: Option<Spanned<Tree>>,
    #[serde(default)]
    pub(super) burst: Option<Spanned<Tree>>,
    #[serde(default)]
    pub(super) time_zone: Option<Spanned<Tree>>,
    #[serde(default)]
    pub(super) at_once: bool,
}

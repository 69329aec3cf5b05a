//! The config file as it is written, before anything in it is believed.
//!
//! Knows the names of the fields and where each value stood. Must not know what values
//! are right or which must be there: that is `check`. The invariants it keeps: an unknown
//! field is an error, so a typing mistake never turns a limit off; and a section or field
//! without a value, as one whose lines are all commented out, is one that does not stand there.

use serde::Deserialize;
use serde::de::Deserializer;
use serde_saphyr::Spanned;

use super::scalar::Secret;
use super::tree::Tree;

pub(super) type Text = Option<Spanned<String>>;

/// Reads nothing as what it is if it is left out.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    #[serde(deserialize_with = "or_default")]
    pub(super) node: Node,
    #[serde(deserialize_with = "or_default")]
    pub(super) gossip: Gossip,
    #[serde(deserialize_with = "or_default")]
    pub(super) proxy: Proxy,
    #[serde(deserialize_with = "or_default")]
    pub(super) admin: Admin,
    pub(super) litellm_config: Option<Spanned<String>>,
    #[serde(deserialize_with = "or_default")]
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
    #[serde(deserialize_with = "or_default")]
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
    #[serde(deserialize_with = "or_default")]
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
    #[serde(deserialize_with = "or_default")]
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

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Deployment {
    pub(super) id: Text,
    pub(super) model: Text,
    pub(super) upstream: Text,
    pub(super) upstream_model: Text,
    pub(super) api_key: Option<Spanned<Secret>>,
    #[serde(deserialize_with = "or_default")]
    pub(super) timeouts: Timeouts,
    pub(super) limits: Option<Spanned<Vec<Spanned<Limit>>>>,
    pub(super) limit_id: Text,
    pub(super) mode: Option<Spanned<Tree>>,
    pub(super) wait: Text,
    pub(super) edge: Text,
    pub(super) reserve: Text,
    pub(super) tokenizer: Text,
    pub(super) default_max_tokens: Option<Spanned<i64>>,
    pub(super) unreported: Text,
    #[serde(deserialize_with = "or_default")]
    pub(super) weights: Weights,
    pub(super) weight: Option<Spanned<i64>>,
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

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Limit {
    pub(super) unit: Text,
    pub(super) amount: Option<Spanned<i64>>,
    pub(super) window: Text,
    pub(super) kind: Option<Spanned<Tree>>,
    /// Settings of the kind, as they can also be written beside it.
    pub(super) parts: Option<Spanned<Tree>>,
    pub(super) burst: Option<Spanned<Tree>>,
    pub(super) time_zone: Option<Spanned<Tree>>,
    #[serde(deserialize_with = "or_default")]
    pub(super) at_once: bool,
}

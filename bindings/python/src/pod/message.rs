//! What the workers of a pod tell the one that owns its rights.
//!
//! Knows the messages and how they are written: one JSON object a line. Must not know sockets
//! or limits. The invariant it keeps: what is asked of the owner over the socket and what is
//! asked within its process are the same.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A deployment and its limits, as LiteLLM has them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Declared {
    pub(crate) id: String,
    /// Per minute; `None` is no limit.
    #[serde(default)]
    pub(crate) tpm: Option<u64>,
    #[serde(default)]
    pub(crate) rpm: Option<u64>,
    #[serde(default)]
    pub(crate) itpm: Option<u64>,
    #[serde(default)]
    pub(crate) otpm: Option<u64>,
    /// OpenAI's name of its model; empty where that is not known to be one.
    #[serde(default)]
    pub(crate) model: String,
    #[serde(default)]
    pub(crate) terms: Terms,
}

/// Reads a JSON list of deployments.
///
/// # Errors
/// Says which deployment is not written as one.
pub(crate) fn declared(deployments: &str) -> Result<Vec<Declared>, String> {
    let written: Vec<Value> = serde_json::from_str(deployments).map_err(|error| error.to_string())?;
    let read = |written: Value| {
        let id = written["id"].as_str().unwrap_or_default().to_owned();
        serde_json::from_value(written).map_err(|error| format!("deployment {id:?}: {error}"))
    };
    written.into_iter().map(read).collect()
}

/// What stands in `model_info.quotum`: how the limits are applied. Durations in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Terms {
    /// `fixed` or `sliding`, or `bucket` with `burst`.
    pub(crate) kind: Option<String>,
    pub(crate) parts: Option<u8>,
    pub(crate) burst: Option<u64>,
    /// `strict`, `observe` or `{"elastic": {"beta": 0.05}}`.
    pub(crate) mode: Option<Mode>,
    pub(crate) wait: Option<f64>,
    pub(crate) edge: Option<f64>,
    pub(crate) reserve: Option<Reserve>,
    pub(crate) default_max_tokens: Option<u64>,
    /// What prompts are counted with; by default what the model counts with.
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) unreported: Option<Unreported>,
    pub(crate) limit_id: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    Strict,
    Observe,
    Elastic { beta: f64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reserve {
    Auto,
    Bound,
    Learned,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tokenizer {
    Bytes,
    O200k,
    Cl100k,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unreported {
    Reserved,
    Counted,
}

/// One request, as far as it decides what is reserved, and who may take it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Deployments in the order in which they are asked; a later level is asked once an
    /// earlier one has no room.
    pub(crate) levels: Vec<Vec<String>>,
    /// Upper bounds of the prompt's tokens: by its bytes, and by each tokenizer.
    pub(crate) bytes: u64,
    pub(crate) o200k: u64,
    pub(crate) cl100k: u64,
    /// The largest output of one choice, if the request names one.
    pub(crate) cap: Option<u64>,
    pub(crate) choices: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// It used this.
    Used { prompt: u64, cached: u64, completion: u64, total: u64 },
    /// It was answered, and nobody says with how many tokens.
    Unreported,
    /// The upstream would not work on it.
    Rejected,
    /// It failed when the upstream may have worked on it.
    Failed,
    /// It never left.
    Unsent,
}

/// What a worker wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ask {
    /// These are the deployments it knows; those of before stay.
    Declare(Vec<Declared>),
    Reserve(Request),
    /// Which of these deployments have room now.
    Room(Request),
    Settle {
        id: u64,
        outcome: Outcome,
    },
    /// It leaves only now: later than its reservation covers.
    Late {
        id: u64,
    },
    Metrics,
    Status,
}

/// What it is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Reserved at this deployment, for a request that leaves until then (Unix time in
    /// seconds). Id 0: it has no limit.
    Granted {
        id: u64,
        deployment: String,
        until: f64,
    },
    Refused(Refusal),
    Room(Vec<String>),
    Text(String),
    Done,
    /// What was asked cannot be done, and why.
    Wrong(String),
}

/// Why nobody takes a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub(crate) deployment: String,
    pub(crate) message: String,
    pub(crate) reason: String,
    /// Seconds; `None` is never.
    pub(crate) retry_after: Option<f64>,
    pub(crate) limit: String,
    pub(crate) unit: String,
    pub(crate) remaining: u64,
}

impl Refusal {
    pub(crate) fn of(deployment: &str, denied: &quotum::Denied) -> Self {
        Self {
            deployment: deployment.to_owned(),
            message: denied.to_string(),
            reason: denied.reason().to_owned(),
            retry_after: denied.retry_after().map(|after| after.as_secs_f64()),
            limit: denied.by().to_string(),
            unit: denied.by().unit().name().to_owned(),
            remaining: denied.standing().remaining(),
        }
    }

    /// The worker that owns this pod's rights cannot be asked: it fails closed.
    pub(crate) fn unowned(why: &str) -> Self {
        Self {
            deployment: String::new(),
            message: format!("this pod cannot reach its limits now ({why}); try again in a second"),
            reason: "unreachable".to_owned(),
            retry_after: Some(1.0),
            limit: String::new(),
            unit: String::new(),
            remaining: 0,
        }
    }
}

/// A message and the number that its answer carries, too.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Numbered<T> {
    pub(crate) number: u64,
    pub(crate) body: T,
}

impl<T: Serialize> Numbered<T> {
    /// Returns the message as a line.
    pub(crate) fn line(&self) -> String {
        // Only maps with keys that are no text cannot be written, and there are none.
        let mut line = serde_json::to_string(self).unwrap_or_default();
        line.push('\n');
        line
    }
}

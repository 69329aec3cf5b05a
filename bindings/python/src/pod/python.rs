//! The pod as LiteLLM's callback sees it.
//!
//! Knows how Python's requests and outcomes are written. Must not know LiteLLM. The invariant
//! it keeps: a decision that needs no waiting is made in the caller's thread, at once.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use quotum::layer::parts::Prompts;
use quotum::layer::{
    AnthropicMessages, Dialect, OpenAiChat, OpenAiCompletions, OpenAiEmbeddings, OpenAiResponses, Tokenizer,
};
use tokio::task::JoinHandle;

use super::message::{self, Ask, Outcome, Refusal, Reply, Request};
use super::{Seat, Shared};
use crate::background;
use crate::settings::{self, Passed};

/// This process's part in its pod.
#[pyclass(name = "Pod", module = "quotum", frozen)]
#[derive(Debug)]
pub(crate) struct Pod {
    shared: Arc<Shared>,
    task: Mutex<Option<(u32, JoinHandle<()>)>>,
}

#[pymethods]
impl Pod {
    /// Reads the environment; nothing starts.
    #[new]
    fn new() -> PyResult<Self> {
        let settled = settings::settle(Passed::default()).map_err(|wrong| PyValueError::new_err(wrong.to_string()));
        let (config, key_file) = settled?;
        let admin = settings::admin().map_err(|wrong| PyValueError::new_err(wrong.to_string()))?;
        Ok(Self { shared: Shared::new(config, key_file, admin), task: Mutex::default() })
    }

    /// Says which deployments there are: a JSON list. The first time, takes a seat.
    fn declare(&self, deployments: &str) -> PyResult<()> {
        let declared = message::declared(deployments).map_err(PyValueError::new_err)?;
        let shared = &self.shared;
        *shared.declared.lock().unwrap_or_else(PoisonError::into_inner) = declared.clone();
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = std::process::id();
        match &*task {
            Some((of, _)) if *of == pid => match shared.seat() {
                Seat::Owner(book) => return book.declare(&declared).map_err(PyValueError::new_err),
                Seat::Guest(link) => {
                    // Nobody waits for the owner's answer.
                    super::book::Book::new(&declared, Arc::new(())).map_err(PyValueError::new_err)?;
                    link.tell(Ask::Declare(declared));
                }
                // It will be declared with all of them once there is an owner.
                Seat::Standing(_) => {}
            },
            Some((of, _)) => {
                return Err(PyRuntimeError::new_err(format!("this pod was started in process {of}, before a fork")));
            }
            None => {
                super::book::Book::new(&declared, Arc::new(())).map_err(PyValueError::new_err)?;
                let runtime = background::runtime()?;
                // What blocks this pod is said in the log, unless whoever embeds it logs already.
                let log = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN);
                let _ = log.with_writer(std::io::stderr).with_ansi(false).try_init();
                // Reading a table takes longer than a request should wait.
                shared
                    .tokenizers()
                    .into_iter()
                    .for_each(|tokenizer| drop(runtime.spawn_blocking(move || tokenizer.load())));
                *task = Some((pid, runtime.spawn(shared.clone().run())));
            }
        }
        Ok(())
    }

    /// Reserves at the first of these deployments with room: `(id, deployment, until)`,
    /// awaited; a request that leaves after `until` (Unix time) has to be reserved again.
    /// Raises Denied.
    fn reserve<'py>(
        &self,
        py: Python<'py>,
        levels: Vec<Vec<String>>,
        api: &str,
        body: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.asked(py, levels, api, body, Ask::Reserve)
    }

    /// Returns which of these deployments have room, awaited. Raises Denied if none has.
    fn room<'py>(
        &self,
        py: Python<'py>,
        levels: Vec<Vec<String>>,
        api: &str,
        body: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.asked(py, levels, api, body, Ask::Room)
    }

    /// Settles a reservation with what was used.
    #[pyo3(signature = (id, prompt, completion, total, cached = 0))]
    fn used(&self, id: u64, prompt: u64, completion: u64, total: u64, cached: u64) {
        self.settle(id, Outcome::Used { prompt, cached, completion, total });
    }

    /// Settles a reservation otherwise: `unreported`, `rejected`, `failed` or `unsent`.
    fn ended(&self, id: u64, how: &str) -> PyResult<()> {
        let outcome = match how {
            "unreported" => Outcome::Unreported,
            "rejected" => Outcome::Rejected,
            "failed" => Outcome::Failed,
            "unsent" => Outcome::Unsent,
            _ => return Err(PyValueError::new_err(format!("{how:?} is no outcome"))),
        };
        self.settle(id, outcome);
        Ok(())
    }

    /// Charges a reservation where its request arrives that leaves only now, after `until`,
    /// and cannot be held back any more.
    fn late(&self, id: u64) -> PyResult<()> {
        match self.shared.seat() {
            Seat::Owner(book) => drop(background::runtime()?.spawn(async move { book.late(id).await })),
            Seat::Guest(link) => link.tell(Ask::Late { id }),
            // As with a settlement.
            Seat::Standing(_) => {}
        }
        Ok(())
    }

    /// Returns this pod's standing as JSON, whichever worker owns it.
    fn status(&self, py: Python<'_>) -> PyResult<String> {
        self.text(py, Ask::Status)
    }

    /// Returns this pod's metrics as OpenMetrics text, whichever worker owns it.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        self.text(py, Ask::Metrics)
    }

    /// Hands the rights over to peers, if this worker owns them, and gives the seat up.
    #[pyo3(signature = (timeout = 5.0))]
    fn leave(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((pid, task)) = task else { return Ok(()) };
        if pid != std::process::id() {
            return Ok(());
        }
        let cluster = self.shared.cluster.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(cluster) = cluster {
            let timeout = Duration::try_from_secs_f64(timeout).unwrap_or_default();
            background::wait(py, async move { drop(tokio::time::timeout(timeout, cluster.leave()).await) })?;
        }
        task.abort();
        self.shared.stand("this worker has ended");
        Ok(())
    }

    /// What this worker is in its pod: `owner`, `guest` or `standing`.
    #[getter]
    fn seat(&self) -> &'static str {
        match self.shared.seat() {
            Seat::Owner(_) => "owner",
            Seat::Guest(_) => "guest",
            Seat::Standing(_) => "standing",
        }
    }
}

impl Pod {
    fn asked<'py>(
        &self,
        py: Python<'py>,
        levels: Vec<Vec<String>>,
        api: &str,
        body: &str,
        ask: fn(Request) -> Ask,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (shared, dialect) = (self.shared.clone(), dialect(api));
        let body = bytes::Bytes::copy_from_slice(body.as_bytes());
        let mut asking: Pin<Box<dyn Future<Output = PyResult<Answer>> + Send>> = Box::pin(async move {
            let reply = match request(levels, &dialect, body, shared.tokenizers()).await {
                Ok(request) => shared.ask(ask(request)).await,
                Err(why) => Reply::Wrong(why),
            };
            answer(&shared, reply)
        });
        let runtime = background::runtime()?;
        let _entered = runtime.enter();
        match asking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => background::ready(py, answer),
            Poll::Pending => background::awaitable(py, asking),
        }
    }

    fn settle(&self, id: u64, outcome: Outcome) {
        settle(&self.shared, id, outcome);
    }

    fn text(&self, py: Python<'_>, ask: Ask) -> PyResult<String> {
        let shared = self.shared.clone();
        match background::wait(py, async move { shared.ask(ask).await })? {
            Reply::Text(text) => Ok(text),
            Reply::Refused(refusal) => Err(PyRuntimeError::new_err(refusal.message)),
            other => Err(PyRuntimeError::new_err(format!("{other:?} is no answer to that"))),
        }
    }
}

fn settle(shared: &Shared, id: u64, outcome: Outcome) {
    match shared.seat() {
        Seat::Owner(book) => book.settle(id, outcome),
        Seat::Guest(link) => link.tell(Ask::Settle { id, outcome }),
        // The owner is gone, and what was reserved there stays charged.
        Seat::Standing(_) => {}
    }
}

/// What a reply is in Python.
#[derive(IntoPyObject)]
enum Answer {
    Granted(Granted),
    Room(Vec<String>),
}

/// A reservation on its way to who asked for it: `(id, deployment, until)`. Dropped before it is
/// one of Python's objects, because nobody waits for it any more, it gives itself back.
struct Granted {
    shared: Arc<Shared>,
    /// Zero: there is none, or somebody has it.
    id: u64,
    deployment: String,
    until: f64,
}

impl Drop for Granted {
    fn drop(&mut self) {
        if self.id != 0 {
            settle(&self.shared, self.id, Outcome::Unsent);
        }
    }
}

impl<'py> IntoPyObject<'py> for Granted {
    type Target = PyTuple;
    type Output = Bound<'py, PyTuple>;
    type Error = PyErr;

    fn into_pyobject(mut self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let object = (self.id, self.deployment.as_str(), self.until).into_pyobject(py)?;
        self.id = 0;
        Ok(object)
    }
}

fn answer(shared: &Arc<Shared>, reply: Reply) -> PyResult<Answer> {
    match reply {
        Reply::Granted { id, deployment, until } => {
            Ok(Answer::Granted(Granted { shared: shared.clone(), id, deployment, until }))
        }
        Reply::Room(room) => Ok(Answer::Room(room)),
        Reply::Refused(refusal) => {
            let error = Python::try_attach(|py| denied(py, refusal));
            Err(error.unwrap_or_else(|| PyRuntimeError::new_err("the interpreter has ended")))
        }
        Reply::Wrong(why) => Err(PyRuntimeError::new_err(why)),
        other => Err(PyRuntimeError::new_err(format!("{other:?} is no answer to that"))),
    }
}

fn denied(py: Python<'_>, refusal: Refusal) -> PyErr {
    let build = || -> PyResult<Bound<'_, PyAny>> {
        let attributes = PyDict::new(py);
        attributes.set_item("deployment", refusal.deployment)?;
        attributes.set_item("reason", refusal.reason)?;
        attributes.set_item("retry_after", refusal.retry_after)?;
        attributes.set_item("limit", refusal.limit)?;
        attributes.set_item("unit", refusal.unit)?;
        attributes.set_item("remaining", refusal.remaining)?;
        py.import("quotum._denied")?.getattr("Denied")?.call((refusal.message,), Some(&attributes))
    };
    build().map_or_else(|error| error, PyErr::from_value)
}

fn dialect(api: &str) -> Arc<dyn Dialect> {
    match api {
        "completions" => Arc::new(OpenAiCompletions),
        "embeddings" => Arc::new(OpenAiEmbeddings),
        "responses" => Arc::new(OpenAiResponses),
        "messages" => Arc::new(AnthropicMessages),
        _ => Arc::new(OpenAiChat),
    }
}

/// Returns what a request asks for. What is no request of its API counts with all its bytes:
/// LiteLLM will refuse it, or knows more than this reading.
///
/// # Errors
/// If it is no JSON: then nobody knows which cap it names.
async fn request(
    levels: Vec<Vec<String>>,
    dialect: &Arc<dyn Dialect>,
    body: bytes::Bytes,
    wanted: Vec<Tokenizer>,
) -> Result<Request, String> {
    match dialect.call(body.clone()) {
        Ok(call) => {
            let prompts = Prompts::count(dialect, &call, wanted).await;
            let [bytes, o200k, cl100k] =
                [Tokenizer::Bytes, Tokenizer::O200k, Tokenizer::Cl100k].map(|tokenizer| prompts.by(tokenizer));
            Ok(Request { levels, bytes, o200k, cl100k, cap: call.cap, choices: call.choices })
        }
        Err(_) => {
            let cap = cap(&body).map_err(|error| format!("the request is no JSON: {error}"))?;
            let bytes = body.len() as u64;
            Ok(Request { levels, bytes, o200k: bytes, cl100k: bytes, cap, choices: 1 })
        }
    }
}

/// Returns the largest cap that a request of no known shape names, for all choices.
fn cap(body: &[u8]) -> serde_json::Result<Option<u64>> {
    let body: serde_json::Value = serde_json::from_slice(body)?;
    let caps = ["max_tokens", "max_completion_tokens", "max_output_tokens"];
    let cap = caps.iter().filter_map(|name| body[*name].as_u64()).max();
    Ok(cap.map(|cap| cap.saturating_mul(body["n"].as_u64().unwrap_or(1))))
}

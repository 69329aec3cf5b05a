//! The workload: open-loop Poisson arrivals over HTTP.
//!
//! Knows what callers ask and how long they wait. Must not know what the pods should
//! answer. The invariant it keeps: requests are sent when they are due, whatever became
//! of the earlier ones, and both runs get the same requests.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Options, Stream, unix_now};
use quotum::client::Client;

/// Prompts are 20 to 400 tokens with a mean of 100: 20 and an exponential part, cut at
/// 380, whose mean before the cut is this.
const PROMPT_MEAN: f64 = 80.7;

/// The mean of a request in actual tokens: prompt 100, output 150.
pub(super) const MEAN_TOKENS: f64 = 250.0;

/// How long a request may take before it counts as failed.
const GIVE_UP: Duration = Duration::from_secs(15);

/// One request of the workload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    /// When it is due, from the start of the load.
    at: Duration,
    prompt: usize,
    output: u64,
    /// Decides the pod and whether it streams.
    lot: u64,
}

/// All requests of a run.
#[derive(Debug)]
pub(super) struct Trace {
    arrivals: Vec<Arrival>,
}

impl Trace {
    /// Draws the requests of one run.
    pub(super) fn new(options: &Options) -> Result<Self, getrandom::Error> {
        let mut random = Random(getrandom::u64()?);
        let per_second = options.requests_in(1.0) / options.window.as_secs_f64();
        let length = options.lead_in() + options.window * options.windows;
        let mut arrivals = Vec::new();
        let mut at = 0.0;
        loop {
            at += random.exponential() / per_second;
            if at >= length.as_secs_f64() {
                return Ok(Self { arrivals });
            }
            arrivals.push(Arrival {
                at: Duration::from_secs_f64(at),
                prompt: 20 + (random.exponential() * PROMPT_MEAN).min(380.0) as usize,
                output: 50 + random.next() % 201,
                lot: random.next(),
            });
        }
    }
}

/// What became of one request.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) id: String,
    pub(super) sent_unix_ms: u64,
    /// What it would use if it was admitted.
    pub(super) tokens: u64,
    pub(super) kind: Kind,
    /// From sending to the answer's last byte.
    pub(super) took: Duration,
    /// How long the pod says it parked the request.
    pub(super) parked: Duration,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Admitted,
    Refused,
    Failed(String),
}

/// A load between two instants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) start_unix_ms: u64,
    pub(super) end_unix_ms: u64,
    pub(super) lead_in: Duration,
    pub(super) stream: Stream,
}

impl Load {
    /// Sends every request when it is due and returns what became of each.
    pub(super) async fn drive(&self, client: &Client, trace: &Trace, pods: &[String]) -> Result<Vec<Outcome>> {
        for pod in pods {
            // A connection and its memory: the first request measures neither.
            client.json(&format!("{pod}/v1/models")).await?;
        }
        let (tx, mut rx) = mpsc::unbounded_channel();
        let lead_in = u64::try_from(self.lead_in.as_millis())?;
        let begin = Instant::now()
            + Duration::from_millis(self.start_unix_ms.saturating_sub(lead_in).saturating_sub(unix_now()?));
        for (number, arrival) in trace.arrivals.iter().enumerate() {
            tokio::time::sleep_until(begin + arrival.at).await;
            if unix_now()? >= self.end_unix_ms {
                break;
            }
            let pod = &pods[usize::try_from(arrival.lot % pods.len() as u64)?];
            let url = format!("{pod}/v1/chat/completions");
            let stream = match self.stream {
                Stream::Mix => (arrival.lot >> 32) & 1 == 1,
                Stream::All => true,
                Stream::None => false,
            };
            let (client, tx, arrival) = (client.clone(), tx.clone(), *arrival);
            tokio::spawn(async move {
                let outcome = request(&client, &url, arrival, format!("r{number}"), stream).await;
                // Nobody listens any more only if the demo has ended.
                let _ = tx.send(outcome);
            });
        }
        drop(tx);
        let mut outcomes = Vec::new();
        while let Some(outcome) = rx.recv().await {
            outcomes.push(outcome.context("a request could not be built")?);
        }
        Ok(outcomes)
    }
}

async fn request(client: &Client, url: &str, arrival: Arrival, id: String, stream: bool) -> Result<Outcome> {
    let body = json!({
        "model": "demo",
        "messages": [{"role": "user", "content": "x".repeat(arrival.prompt)}],
        "max_tokens": 300,
        "stream": stream,
    });
    let mut headers = HeaderMap::new();
    headers.insert("x-stub-id", HeaderValue::from_str(&id)?);
    headers.insert("x-stub-completion-tokens", HeaderValue::from(arrival.output));
    let tokens = arrival.prompt as u64 + arrival.output;
    let sent_unix_ms = unix_now()?;
    let sent = Instant::now();
    let exchange = exchange(client, url, headers, body.to_string().into(), stream);
    let (kind, parked) = tokio::time::timeout(GIVE_UP, exchange)
        .await
        .unwrap_or_else(|_| (Kind::Failed("no answer in time".into()), Duration::ZERO));
    Ok(Outcome { id, sent_unix_ms, tokens, kind, took: sent.elapsed(), parked })
}

async fn exchange(client: &Client, url: &str, headers: HeaderMap, body: Bytes, stream: bool) -> (Kind, Duration) {
    let answer = match client.send(Method::POST, url, headers, body).await {
        Ok(answer) => answer,
        Err(error) => return (Kind::Failed(format!("{error:#}")), Duration::ZERO),
    };
    let (head, body) = answer.into_parts();
    let number = |name: &str| head.headers.get(name)?.to_str().ok()?.parse::<u64>().ok();
    let parked = Duration::from_millis(number("x-quotum-wait-ms").unwrap_or(0));
    let by_us = head.headers.get("x-quotum-refused-by").is_some_and(|by| by == "quotum");
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return (Kind::Failed("the answer broke off".into()), parked),
    };
    let kind = match head.status {
        StatusCode::OK if whole(&body, stream) => Kind::Admitted,
        StatusCode::OK => Kind::Failed("the answer is not whole".into()),
        StatusCode::TOO_MANY_REQUESTS if by_us => Kind::Refused,
        status => Kind::Failed(format!("{status}: {}", String::from_utf8_lossy(&body))),
    };
    (kind, parked)
}

/// Returns whether an answer is what a caller must get: all of it, and no more.
fn whole(body: &[u8], stream: bool) -> bool {
    if stream {
        // Nobody asked for usage, so nobody gets its chunk.
        let text = String::from_utf8_lossy(body);
        return text.ends_with("data: [DONE]\n\n") && !text.contains("\"choices\":[]");
    }
    serde_json::from_slice::<Value>(body).is_ok_and(|answer| answer["usage"]["total_tokens"].is_u64())
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough for a workload.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Returns an exponential variate of mean one.
    fn exponential(&mut self) -> f64 {
        // 53 bits, and never zero, whose logarithm has no value.
        let uniform = ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        -uniform.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_has_the_promised_shape() {
        let options = Options {
            replicas: 3,
            limit: 6_000_000,
            window: Duration::from_secs(5),
            windows: 3,
            overload: 5.0,
            stream: Stream::Mix,
            json: true,
        };
        let trace = Trace::new(&options).unwrap();
        let count = trace.arrivals.len() as f64;
        let prompts: usize = trace.arrivals.iter().map(|arrival| arrival.prompt).sum();
        let outputs: u64 = trace.arrivals.iter().map(|arrival| arrival.output).sum();
        assert!(trace.arrivals.iter().all(|arrival| (20..=400).contains(&arrival.prompt)));
        assert!(trace.arrivals.iter().all(|arrival| (50..=250).contains(&arrival.output)));
        // Some 360,000 requests: the means lie within one percent but once in an age.
        assert!((prompts as f64 / count - 100.0).abs() < 1.0);
        assert!((outputs as f64 / count - 150.0).abs() < 1.5);
        assert!((count * MEAN_TOKENS / (5.0 * 6_000_000.0 * 17.5 / 5.0) - 1.0).abs() < 0.01);
    }
}

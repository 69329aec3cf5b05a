//! The demo: real pods over real HTTP, first isolated, then holding one limit together.
//!
//! Knows the two runs and what makes them a success. Must not know how pods share a
//! limit: it judges them by the stub upstream's own count. The invariant it keeps:
//! whatever happens, no child outlives it.

mod fleet;
mod load;
mod report;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::{BAD_CONFIG, complain, print};
use fleet::Fleet;
use load::{Load, MEAN_TOKENS, Trace};
use quotum::Quota;
use quotum::client::Client;
use quotum::config::scalar;
use report::{Report, Run};

/// How long pods may take until each has its share: far above the few gossip rounds that
/// a cold start takes.
const SHARES_WITHIN: Duration = Duration::from_secs(30);

/// The smallest limit: a few requests of the workload must fit into one pod's share.
const MIN_LIMIT: u64 = 2_000;

/// The most requests of a run: some 100 MB here, and more in a window of 1 s than two cores answer in a minute.
const MOST_REQUESTS: f64 = 1e6;

/// What to run.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// How many pods.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) replicas: u32,
    /// Tokens a window, for all pods together.
    #[arg(long, default_value_t = 60_000)]
    pub(crate) limit: u64,
    /// The length of a window.
    #[arg(long, default_value = "5s", value_parser = window)]
    pub(crate) window: Duration,
    /// How many whole windows count, in each run.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) windows: u32,
    /// How many times the limit is offered, in actual tokens.
    #[arg(long, default_value_t = 5.0)]
    pub(crate) overload: f64,
    /// Which requests stream.
    #[arg(long, value_enum, default_value_t = Stream::Mix)]
    pub(crate) stream: Stream,
    /// Print exactly one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which requests stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stream {
    /// Half of them.
    Mix,
    /// All of them.
    All,
    /// None of them.
    None,
}

/// How the pods stand to one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Each for itself: what a limiter per pod does.
    Isolated,
    /// One fleet, one limit.
    Strict,
}

impl Options {
    /// Returns how long before the first counted window the load begins.
    ///
    /// Half a window: long enough that the window before is spent, as it is under a load
    /// that lasts. Into an unspent one requests would still be admitted within `edge` of
    /// its end, and those are charged to the first counted window, too.
    fn lead_in(&self) -> Duration {
        self.window / 2
    }

    /// Returns how many requests a run is expected to have for each window of this length.
    fn requests_in(&self, windows: f64) -> f64 {
        self.overload * self.limit as f64 / MEAN_TOKENS * windows
    }

    /// Says what cannot be run, before anything is started.
    fn check(&self) -> Result<(), String> {
        let Self { limit, overload, .. } = *self;
        if !(MIN_LIMIT..=Quota::MAX_AMOUNT).contains(&limit) {
            return Err(format!(
                "--limit is between {MIN_LIMIT} and {}, the largest limit there is",
                Quota::MAX_AMOUNT
            ));
        }
        if !(overload > 0.0 && overload <= 100.0) {
            return Err("--overload is above 0 and at most 100".into());
        }
        // Half a window leads in.
        let requests = self.requests_in(f64::from(self.windows) + 0.5);
        if requests > MOST_REQUESTS {
            return Err(format!(
                "that would be {requests:.0} requests in a run, and {MOST_REQUESTS:.0} are the most: lower --limit, \
                 --overload or --windows"
            ));
        }
        if self.requests_in(1.0) < 1.0 {
            return Err(format!(
                "that would be less than one request of {MEAN_TOKENS} tokens in a window: raise --limit or --overload"
            ));
        }
        Ok(())
    }
}

impl Mode {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Strict => "strict",
        }
    }
}

fn window(text: &str) -> Result<Duration, String> {
    let window = scalar::duration(text)?;
    if window < Duration::from_secs(1) || window > Duration::from_secs(3_600) {
        return Err("a window lasts between 1s and 1h".into());
    }
    Ok(window)
}

/// Runs the demo: 0 if the joined pods held the limit and nothing failed, 1 if they went
/// over, 2 if it could not be run.
pub(crate) async fn run(options: Options) -> ExitCode {
    if let Err(why) = options.check() {
        complain(format_args!("quotum: {why}"));
        return ExitCode::from(BAD_CONFIG);
    }
    // Dropping the runs ends their children, so an interruption needs no more than that.
    let finished = tokio::select! {
        biased;
        code = interrupted() => return ExitCode::from(code),
        finished = both_runs(&options) => finished,
    };
    match finished {
        Ok(report) => {
            let text = if options.json { report.json().to_string() } else { report.table() };
            match print(format_args!("{text}")) {
                Ok(()) => ExitCode::from(report.exit_code()),
                // What nobody could read was in vain.
                Err(error) => {
                    complain(format_args!("quotum: the demo's result is lost: {error}"));
                    ExitCode::from(2)
                }
            }
        }
        Err(error) => {
            complain(format_args!("quotum: the demo could not be run: {error:#}"));
            ExitCode::from(2)
        }
    }
}

async fn interrupted() -> u8 {
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        biased;
        _ = tokio::signal::ctrl_c() => 130,
        _ = terminate.recv() => 143,
    }
}

async fn both_runs(options: &Options) -> Result<Report> {
    let trace = Trace::new(options).context("no randomness for the workload")?;
    let mut runs = Vec::new();
    for mode in [Mode::Isolated, Mode::Strict] {
        runs.push(one_run(options, mode, &trace).await.with_context(|| format!("the {} run", mode.name()))?);
    }
    Ok(Report::new(options, runs))
}

async fn one_run(options: &Options, mode: Mode, trace: &Trace) -> Result<Run> {
    progress(options, &format!("{}: starting a stub upstream and {} pods", mode.name(), options.replicas));
    let fleet = Fleet::start(options, mode).await?;
    let client = Client::new();
    let began = tokio::time::Instant::now();
    while !every_pod_has_its_share(&client, &fleet).await? {
        ensure!(began.elapsed() < SHARES_WITHIN, "not every pod had its share after {SHARES_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let now = unix_now()?;
    let window_ms = u64::try_from(options.window.as_millis())?;
    // Every pod has its share of the running window, so of each later one, too.
    let first = (now + u64::try_from(options.lead_in().as_millis())?).div_ceil(window_ms) * window_ms;
    let end = first + window_ms * u64::from(options.windows);
    let limit = options.limit;
    progress(
        options,
        &format!(
            "{}: offering {} x {limit} tokens a window for {} windows",
            mode.name(),
            options.overload,
            options.windows
        ),
    );
    let load = Load { start_unix_ms: first, end_unix_ms: end, lead_in: options.lead_in(), stream: options.stream };
    let outcomes = load.drive(&client, trace, fleet.proxies()).await?;
    let ledger = settled_ledger(&client, fleet.stub()).await?;
    let mut statuses = Vec::new();
    for admin in fleet.admins() {
        statuses.push(client.json(&format!("{admin}/status")).await?);
    }
    fleet.stop().await;
    let run = Run::count(options, mode, first, &outcomes, &ledger, &statuses)?;
    progress(options, &format!("{}: at most {} tokens in a window", mode.name(), run.admitted_max()));
    Ok(run)
}

async fn every_pod_has_its_share(client: &Client, fleet: &Fleet) -> Result<bool> {
    for admin in fleet.admins() {
        let status = client.json(&format!("{admin}/status")).await?;
        if status["ready"] != Value::Bool(true) || status["has_share"] != Value::Bool(true) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns the stub's ledger once every answer in it has ended.
async fn settled_ledger(client: &Client, stub: &str) -> Result<Vec<Value>> {
    for _ in 0..100 {
        let Value::Array(ledger) = client.json(&format!("{stub}/_ledger")).await? else {
            bail!("the stub's ledger is not a list");
        };
        if ledger.iter().all(|record| !record["completion_tokens"].is_null()) {
            return Ok(ledger);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("answers of the stub did not end");
}

fn unix_now() -> Result<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?;
    Ok(u64::try_from(since.as_millis())?)
}

fn progress(options: &Options, what: &str) {
    if std::io::stderr().is_terminal() || !options.json {
        complain(format_args!("{what}"));
    }
}

//! The `quotum` command.
//!
//! Knows the commands, their flags and their exit codes. Must not know how any of them
//! works. The invariant it keeps: standard output is for what scripts read, standard
//! error is for people, and the exit code says whose fault it was.

/// Prints a line for whoever reads standard output, and does not mind if nobody does:
/// `quotum status | head -1` must not end in a panic.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout().lock(), $($text)*);
    }};
}

mod demo;
#[cfg(test)]
mod deploy_tests;
mod log;
#[cfg(test)]
mod monitoring_tests;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use axum::http::Method;
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use quotum::config::Flags;
use quotum::{client, config, server};

/// Bad usage or configuration.
const BAD_CONFIG: u8 = 64;

/// One token budget for a whole fleet of LLM proxy pods, without a store.
#[derive(Debug, Parser)]
#[command(name = "quotum", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one pod: proxy, gossip and admin endpoints.
    Serve(Serve),
    /// Run the stub upstream alone.
    Stub(Stub),
    /// Watch real pods hold one limit that they break when they are isolated.
    Demo(demo::Options),
    /// Check a config file.
    CheckConfig {
        /// The file.
        file: PathBuf,
        /// Look at the text alone: no variable is looked up, and no file that it names is opened.
        #[arg(long)]
        offline: bool,
    },
    /// Show the cluster as one pod sees it.
    Status {
        /// The pod's admin endpoints.
        #[arg(long, default_value = "http://127.0.0.1:9090")]
        admin: String,
        /// Print the answer as it is.
        #[arg(long)]
        json: bool,
    },
    /// Declare a replica dead that will not come back.
    Forget {
        /// The replica's id, or an address on the list at which nobody answers.
        replica: String,
        /// The pod's admin endpoints.
        #[arg(long, default_value = "http://127.0.0.1:9090")]
        admin: String,
    },
}

#[derive(Debug, Args)]
struct Serve {
    /// The config file; without one the built-in stub upstream is served on loopback.
    #[arg(long)]
    config: Option<PathBuf>,
    /// This pod's node name.
    #[arg(long)]
    node: Option<String>,
    /// The cluster's name.
    #[arg(long)]
    cluster: Option<String>,
    /// Where to listen for gossip.
    #[arg(long)]
    gossip_listen: Option<String>,
    /// The address peers send to.
    #[arg(long)]
    gossip_advertise: Option<String>,
    /// Comma-separated host:port of every replica, or one headless name.
    #[arg(long)]
    seeds: Option<String>,
    /// The file with the cluster's keys.
    #[arg(long)]
    gossip_key_file: Option<String>,
    /// Where the admin endpoints listen.
    #[arg(long)]
    admin_listen: Option<String>,
    /// Where the proxy listens.
    #[arg(long)]
    proxy_listen: Option<String>,
}

#[derive(Debug, Args)]
struct Stub {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:4010")]
    listen: SocketAddr,
    /// From a request's last byte to the answer's first, in milliseconds.
    #[arg(long, default_value_t = 0)]
    first_byte_ms: u64,
    /// From the answer's first byte to its last, in milliseconds.
    #[arg(long, default_value_t = 0)]
    body_ms: u64,
    /// How many bytes of text count as one token.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    bytes_per_token: u64,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for; the rest is bad usage.
            let code = if error.use_stderr() { BAD_CONFIG } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(format_args!("quotum: the runtime does not start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(run(cli.command));
    // What is still running belongs to nobody now.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

async fn run(command: Command) -> ExitCode {
    match command {
        Command::Serve(flags) => serve(flags).await,
        Command::Stub(options) => done(stub(options).await),
        Command::Demo(options) => demo::run(options).await,
        Command::CheckConfig { file, offline } => check_config(&file, offline),
        Command::Status { admin, json } => done(status(&admin, json).await),
        Command::Forget { replica, admin } => done(forget(&replica, &admin).await),
    }
}

fn done(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("quotum: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Tells people what is wrong. Where that cannot be written, the exit code still says it.
fn complain(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

async fn serve(serve: Serve) -> ExitCode {
    log::start(config::environment("RUST_LOG").as_deref());
    let flags = Flags {
        node: serve.node,
        cluster: serve.cluster,
        gossip_listen: serve.gossip_listen,
        gossip_advertise: serve.gossip_advertise,
        seeds: serve.seeds,
        gossip_key_file: serve.gossip_key_file,
        admin_listen: serve.admin_listen,
        proxy_listen: serve.proxy_listen,
    };
    let source = config::Source { path: serve.config, flags };
    let config = match source.load() {
        Ok(config) => config,
        Err(error) => {
            complain(format_args!("{error}"));
            return ExitCode::from(error.exit_code());
        }
    };
    match server::serve(config, source).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("quotum: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

async fn stub(options: Stub) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(options.listen).await;
    let listener = listener.with_context(|| format!("cannot listen at {}", options.listen))?;
    say!("{}", json!({"stub": listener.local_addr()?.to_string()}));
    let behaviour = server::stub::Behaviour {
        first_byte: Duration::from_millis(options.first_byte_ms),
        body: Duration::from_millis(options.body_ms),
        bytes_per_token: options.bytes_per_token,
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let stop = async move {
        tokio::select! {
            biased;
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    server::stub::serve(server::stub::Stub::new(behaviour), listener, stop).await;
    Ok(())
}

fn check_config(file: &std::path::Path, offline: bool) -> ExitCode {
    let checked = match offline {
        true => config::check_offline(file).map(|checked| (checked.deployments, checked.remarks)),
        false => config::load(Some(file), &config::environment, &Flags::default())
            .map(|config| (config.deployments.len(), config.remarks)),
    };
    match checked {
        Ok((deployments, remarks)) => {
            remarks.iter().for_each(|remark| say!("{remark}"));
            let by = if offline { " by its text" } else { "" };
            say!("{}: fine{by}, {deployments} deployments", file.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(format_args!("{error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

async fn status(admin: &str, as_json: bool) -> anyhow::Result<()> {
    let status = client::Client::new().json(&format!("{}/status", admin.trim_end_matches('/'))).await?;
    if as_json {
        say!("{status:#}");
        return Ok(());
    }
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    say!(
        "replica {}  node {}  ready {}  has share {}  leaving {}",
        text(&status["replica"]),
        text(&status["node"]),
        status["ready"],
        status["has_share"],
        status["leaving"]
    );
    for peer in status["peers"].as_array().into_iter().flatten() {
        say!(
            "peer    {}  node {}  {}  reachable {}  staleness {} ms  skew {} ms{}",
            text(&peer["replica"]),
            text(&peer["node"]),
            text(&peer["addr"]),
            peer["reachable"],
            peer["staleness_ms"],
            peer["skew_ms"],
            if peer["gone_from_unix_ms"].is_null() { "" } else { "  gone" }
        );
    }
    for block in status["blocked"].as_array().into_iter().flatten() {
        say!("blocked {}: {}; {}", text(&block["who"]), text(&block["why"]), text(&block["resolve"]));
    }
    for peer in status["silent"].as_array().into_iter().flatten() {
        say!("silent  {}, {}; {}", text(&peer["who"]), text(&peer["why"]), text(&peer["resolve"]));
    }
    if let Some(refused) = status["config_refused"].as_str() {
        say!("config refused, the old one is in force: {refused}");
    }
    if let Some(fallback) = status["discovery_fallback"].as_object() {
        say!(
            "discovery has fallen back since {} ms: {}; {}; {}",
            fallback["since_unix_ms"],
            text(&fallback["why"]),
            text(&fallback["meanwhile"]),
            text(&fallback["resolve"])
        );
    }
    for limit in status["limits"].as_array().into_iter().flatten() {
        for quota in limit["quotas"].as_array().into_iter().flatten() {
            say!(
                "limit   {}  {}  used {} of {}  margin {} reachable, {} not  spendable {}  resets in {} ms",
                text(&limit["limit_id"]),
                text(&quota["quota"]),
                quota["used"],
                quota["limit"],
                quota["margin_reachable"],
                quota["margin_unreachable"],
                quota["spendable"],
                quota["resets_in_ms"]
            );
        }
        for switch in limit["switches"].as_array().into_iter().flatten() {
            let from = switch["from"].as_str().unwrap_or("no limit");
            say!("        from {} to {} at {} ms", from, text(&switch["to"]), switch["at_unix_ms"]);
        }
        for other in limit["mismatches"].as_array().into_iter().flatten() {
            say!("        {} has another limit: {}", text(&other["peer"]), text(&other["theirs"]));
        }
    }
    Ok(())
}

async fn forget(replica: &str, admin: &str) -> anyhow::Result<()> {
    let url = format!("{}/forget", admin.trim_end_matches('/'));
    let body = json!({"replica": replica}).to_string();
    let (status, answer) = client::Client::new().ask(Method::POST, &url, body.into()).await?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    if !status.is_success() {
        anyhow::bail!("{status}: {}", answer["error"]["message"].as_str().unwrap_or("no reason given"));
    }
    say!("forgotten: {}", answer["forgotten"].as_str().unwrap_or(replica));
    Ok(())
}

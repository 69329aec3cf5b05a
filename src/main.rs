//! The `quotum` command.
//!
//! Knows the commands, their flags and their exit codes. Must not know how any of them
//! works. The invariant it keeps: standard output is for what scripts read, standard
//! error is for people, and the exit code says whose fault it was.

mod demo;
#[cfg(test)]
mod deploy_tests;
mod log;
#[cfg(test)]
mod monitoring_tests;
#[cfg(test)]
mod reference_tests;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use axum::http::Method;
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

use quotum::config::Flags;
use quotum::{client, config, server};

/// Bad usage or configuration.
const BAD_CONFIG: u8 = 64;

/// A port is in use, or the address is not this machine's.
const NO_PORT: u8 = 69;

/// How long a pod may take to answer `status` and `forget`: it does within milliseconds, or not at all.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

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
    #[command(after_help = help::SERVE)]
    Serve(Serve),
    /// Run the stub upstream alone.
    #[command(after_help = help::STUB)]
    Stub(Stub),
    /// Watch real pods hold one limit that they break when they are isolated.
    #[command(after_help = help::DEMO)]
    Demo(demo::Options),
    /// Check a config file.
    #[command(after_help = help::CHECK_CONFIG)]
    CheckConfig {
        /// The file.
        file: PathBuf,
        /// Look at the text alone: no variable is looked up, and no file that it names is opened.
        #[arg(long)]
        offline: bool,
    },
    /// Show the cluster as one pod sees it.
    #[command(after_help = help::ASK)]
    Status {
        /// The pod's admin endpoints.
        #[arg(long, default_value = "http://127.0.0.1:9090")]
        admin: String,
        /// Print the answer as it is.
        #[arg(long)]
        json: bool,
    },
    /// Declare a replica dead that will not come back.
    #[command(after_help = help::ASK)]
    Forget {
        /// The replica's id, or an address on the list at which nobody answers.
        replica: String,
        /// The pod's admin endpoints.
        #[arg(long, default_value = "http://127.0.0.1:9090")]
        admin: String,
    },
}

/// What `--help` says below the flags.
mod help {
    pub(crate) const SERVE: &str = "\
A flag wins over its variable, and a variable over the file; an empty variable is none. Without a flag there are:
  QUOTUM_LINGER     as proxy.linger in the file [default: 0s]
  QUOTUM_DRAIN      as proxy.drain in the file [default: as long as they take]
  QUOTUM_PODS       as gossip.pods in the file [default: the API server is not asked]
  QUOTUM_NAMESPACE  the namespace of these pods [default: the service account's]
  RUST_LOG          what is logged [default: info,chitchat=warn]

Exit codes: 0 drained and left; 64 bad flags or configuration; 69 a port is in use or a file that the configuration
names cannot be read; 130 or 143 ended at once by a second signal; 1 anything else.

Every field of the file, with its default: docs/configuration.md";

    pub(crate) const STUB: &str = "Exit codes: 0 told to end; 64 bad flags; 1 it cannot listen there.";

    pub(crate) const DEMO: &str = "Exit codes: 0 the joined pods held the limit and no request failed; 1 they went over; \
2 requests failed, or it could not be run; 64 bad flags; 130 or 143 interrupted.";

    pub(crate) const CHECK_CONFIG: &str = "\
Every problem is a line on standard error: file, line and column, field, what is wrong. Variables and the files it
names are those of this machine; away from the pods use --offline.

Exit codes: 0 fine; 64 bad flags or configuration; 69 a file that it names cannot be read and nothing else is wrong.";

    pub(crate) const ASK: &str = "Exit codes: 0 done; 64 bad flags; 1 the pod does not answer, or says no.";
}

// The variables are read with the configuration, not by clap: an empty one counts as unset, and what is wrong with one is
// told as the environment's fault. `reference_tests` compares these texts with what is read.
#[derive(Debug, Args)]
struct Serve {
    #[arg(long, help = "The config file [env: QUOTUM_CONFIG] [default: the built-in stub upstream on loopback]")]
    config: Option<PathBuf>,
    #[arg(long, help = "This pod's node name [env: QUOTUM_NODE] [default: the host name]")]
    node: Option<String>,
    #[arg(long, help = "The cluster's name [env: QUOTUM_CLUSTER] [default: quotum]")]
    cluster: Option<String>,
    #[arg(long, help = "Where to listen for gossip, UDP [env: QUOTUM_GOSSIP_LISTEN] [default: [::]:7946]")]
    gossip_listen: Option<String>,
    #[arg(
        long,
        help = "The address peers send to [env: QUOTUM_GOSSIP_ADVERTISE] [default: the one that reaches the first seed]"
    )]
    gossip_advertise: Option<String>,
    #[arg(
        long,
        help = "Comma-separated host:port of every replica, or one headless name [env: QUOTUM_SEEDS] [default: alone]"
    )]
    seeds: Option<String>,
    #[arg(
        long,
        help = "The file with the cluster's keys [env: QUOTUM_GOSSIP_KEY_FILE] [default: none, for loopback only]"
    )]
    gossip_key_file: Option<String>,
    #[arg(
        long,
        help = "Where the admin endpoints listen [env: QUOTUM_ADMIN_LISTEN] [default: [::]:9090, without a file 127.0.0.1:9090]"
    )]
    admin_listen: Option<String>,
    #[arg(
        long,
        help = "Where the proxy listens [env: QUOTUM_PROXY_LISTEN] [default: [::]:4000, without credentials 127.0.0.1:4000]"
    )]
    proxy_listen: Option<String>,
    /// End when standard input does: for whoever starts pods of its own.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
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
    /// End when standard input does: for whoever starts stubs of its own.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
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
        Command::Stub(options) => stub(options).await,
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

/// Prints what was asked for. That its reader has gone, as in `quotum status | head -1`, is no mistake.
fn print(text: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    let text = format!("{text}\n");
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(std::io::Error::new(error.kind(), format!("standard output cannot be written: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Ends this process when its standard input ends: whoever holds the other end is gone, however that went.
fn end_with_stdin() -> std::io::Result<()> {
    let wait = || {
        // Nothing is ever said there; an input that cannot be read has ended, too.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(0);
    };
    std::thread::Builder::new().name("stdin".into()).spawn(wait).map(drop)
}

/// Tells people what is wrong. Where that cannot be written, the exit code still says it.
fn complain(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

async fn serve(serve: Serve) -> ExitCode {
    log::start(config::environment("RUST_LOG").as_deref());
    if serve.end_with_stdin
        && let Err(error) = end_with_stdin()
    {
        return done(Err(error.into()));
    }
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

async fn stub(options: Stub) -> ExitCode {
    match tokio::net::TcpListener::bind(options.listen).await {
        Ok(listener) => done(serve_stub(options, listener).await),
        Err(error) => {
            let at = options.listen;
            complain(format_args!("quotum: cannot listen at {at}: {error}; free the port or choose another one"));
            ExitCode::from(NO_PORT)
        }
    }
}

async fn serve_stub(options: Stub, listener: tokio::net::TcpListener) -> anyhow::Result<()> {
    if options.end_with_stdin {
        end_with_stdin()?;
    }
    if let Err(error) = print(format_args!("{}", json!({"stub": listener.local_addr()?.to_string()}))) {
        complain(format_args!("quotum: {error}; the stub serves all the same"));
    }
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
        Ok((deployments, mut lines)) => {
            let by = if offline { " by its text" } else { "" };
            lines.push(format!("{}: fine{by}, {deployments} deployments", file.display()));
            done(print(format_args!("{}", lines.join("\n"))).map_err(Into::into))
        }
        Err(error) => {
            complain(format_args!("{error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

async fn status(admin: &str, as_json: bool) -> anyhow::Result<()> {
    let admin = base(admin);
    let url = format!("{admin}/status");
    let status = in_time(&admin, client::Client::new().json(&url)).await?;
    if as_json {
        return Ok(print(format_args!("{status:#}"))?);
    }
    let mut lines = String::new();
    // Writing to a string cannot fail.
    let _ = show(&status, &mut lines);
    Ok(print(format_args!("{}", lines.trim_end()))?)
}

/// Writes a status for people: a line for each replica, obstacle and limit.
fn show(status: &Value, lines: &mut String) -> std::fmt::Result {
    use std::fmt::Write;

    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    writeln!(
        lines,
        "replica {}  node {}  ready {}  has share {}  leaving {}",
        text(&status["replica"]),
        text(&status["node"]),
        status["ready"],
        status["has_share"],
        status["leaving"]
    )?;
    for peer in status["peers"].as_array().into_iter().flatten() {
        writeln!(
            lines,
            "peer    {}  node {}  {}  reachable {}  staleness {} ms  skew {} ms{}",
            text(&peer["replica"]),
            text(&peer["node"]),
            text(&peer["addr"]),
            peer["reachable"],
            peer["staleness_ms"],
            peer["skew_ms"],
            if peer["gone_from_unix_ms"].is_null() { "" } else { "  gone" }
        )?;
    }
    for other in status["duplicate_node"].as_array().into_iter().flatten() {
        writeln!(lines, "node    {} is also the name of {}: give each its own", text(&status["node"]), text(other))?;
    }
    for block in status["blocked"].as_array().into_iter().flatten() {
        writeln!(lines, "blocked {}: {}; {}", text(&block["who"]), text(&block["why"]), text(&block["resolve"]))?;
    }
    for peer in status["silent"].as_array().into_iter().flatten() {
        writeln!(lines, "silent  {}, {}; {}", text(&peer["who"]), text(&peer["why"]), text(&peer["resolve"]))?;
    }
    if let Some(refused) = status["config_refused"].as_str() {
        writeln!(lines, "config refused, the old one is in force: {refused}")?;
    }
    if let Some(fallback) = status["discovery_fallback"].as_object() {
        writeln!(
            lines,
            "discovery has fallen back since {} ms: {}; {}; {}",
            fallback["since_unix_ms"],
            text(&fallback["why"]),
            text(&fallback["meanwhile"]),
            text(&fallback["resolve"])
        )?;
    }
    for limit in status["limits"].as_array().into_iter().flatten() {
        for quota in limit["quotas"].as_array().into_iter().flatten() {
            writeln!(
                lines,
                "limit   {}  {}  used {} of {}  margin {} reachable, {} not  spendable {}  resets in {} ms",
                text(&limit["limit_id"]),
                text(&quota["quota"]),
                quota["used"],
                quota["limit"],
                quota["margin_reachable"],
                quota["margin_unreachable"],
                quota["spendable"],
                quota["resets_in_ms"]
            )?;
        }
        for switch in limit["switches"].as_array().into_iter().flatten() {
            let from = switch["from"].as_str().unwrap_or("no limit");
            writeln!(lines, "        from {} to {} at {} ms", from, text(&switch["to"]), switch["at_unix_ms"])?;
        }
        for other in limit["mismatches"].as_array().into_iter().flatten() {
            writeln!(lines, "        {} has another limit: {}", text(&other["peer"]), text(&other["theirs"]))?;
        }
    }
    Ok(())
}

async fn forget(replica: &str, admin: &str) -> anyhow::Result<()> {
    let admin = base(admin);
    let url = format!("{admin}/forget");
    let body = json!({"replica": replica}).to_string();
    let (status, answer) = in_time(&admin, client::Client::new().ask(Method::POST, &url, body.into())).await?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    if !status.is_success() {
        anyhow::bail!("{status}: {}", answer["error"]["message"].as_str().unwrap_or("no reason given"));
    }
    Ok(print(format_args!("forgotten: {}", answer["forgotten"].as_str().unwrap_or(replica)))?)
}

/// Returns where a pod's admin endpoints are: `host:port` is plain HTTP.
fn base(admin: &str) -> String {
    let scheme = if admin.contains("://") { "" } else { "http://" };
    format!("{scheme}{}", admin.trim_end_matches('/'))
}

/// Waits for a pod's answer no longer than for one that works.
async fn in_time<T>(admin: &str, answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let answered = tokio::time::timeout(ANSWERS_WITHIN, answer).await;
    answered.unwrap_or_else(|_| {
        Err(anyhow::anyhow!(
            "{admin} has not answered within {ANSWERS_WITHIN:?}: that pod is stopped or overloaded, or cannot be \
             reached from here; ask another pod what it sees of it (--admin), and restart it if it does not come back"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_does_not_answer_is_not_waited_for() {
        // It takes connections, as the operating system does for a process that is stopped.
        let stopped = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = stopped.local_addr().unwrap().to_string();
        for asked in [status(&admin, true).await, forget("10.0.0.9:7946", &admin).await] {
            let told = asked.unwrap_err().to_string();
            assert!(told.starts_with(&format!("http://{admin} has not answered within 5s: ")), "{told}");
        }
    }

    #[test]
    fn an_address_is_enough_to_find_a_pod() {
        assert_eq!(base("127.0.0.1:9090"), "http://127.0.0.1:9090");
        assert_eq!(base("http://pod:9090/"), "http://pod:9090");
        assert_eq!(base("https://pod"), "https://pod");
    }

    #[test]
    fn a_status_says_who_else_has_the_node_name() {
        let mut lines = String::new();
        show(&json!({"node": "pod-a", "duplicate_node": ["ab"]}), &mut lines).unwrap();
        assert!(lines.contains("node    pod-a is also the name of ab: give each its own\n"), "{lines}");
    }
}

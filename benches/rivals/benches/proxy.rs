//! What the proxy adds: the real command beside a plain pass-through of the same HTTP library
//! and nginx, all before the same stub, in one run.
//!
//! `cargo build --release && cargo bench -p quotum-bench --bench proxy`, about four minutes;
//! `-- --quick` takes seconds and judges nothing, `-- --memory` measures idle streams alone.
//! Prints the Markdown tables that the README quotes, and exits with 1 if the proxy costs more
//! than it may. nginx is a column where it is installed.
//!
//! The contenders take turns, in an order that shifts from round to round; a figure is the
//! median over the rounds, and so is a ratio, of the ratios within each round. Load, contender
//! and stub share the machine. Latency is from sending a request to the last byte of its
//! answer, on connections that are kept; CPU is that of the contender's process, the kernel's part
//! included, and says most on a busy machine. Callers of streams do not ask for usage, so that the
//! proxy has to: it rewrites the request and takes the usage out of the answer. Memory is resident memory,
//! of all contenders with the system's allocator.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::http::uri::Authority;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use quotum_bench::{Ask, Callers, Failure, Folder, Process, free_addrs, median, open_loop, quotum};
use serde_json::json;
use tokio::net::TcpListener;

/// The most of the pass-through's p50 and p99 that the proxy's may be (issue 5).
const MAX_RATIO: f64 = 1.5;

/// The most memory of an idle stream, in bytes (issue 5).
const MAX_STREAM: u64 = 32 << 10;

/// Requests per second of the open loop.
const PER_SECOND: f64 = 1_000.0;

/// How many callers are never without a request: enough that both cores are.
const CALLERS: usize = 32;

/// What a prompt is: about 400 tokens of text.
const PROMPT_BYTES: usize = 1_600;

/// How long and how often is measured.
struct Extent {
    rounds: usize,
    turn: Duration,
    streams: u64,
}

const FULL: Extent = Extent { rounds: 5, turn: Duration::from_secs(2), streams: 1_000 };
const QUICK: Extent = Extent { rounds: 1, turn: Duration::from_millis(300), streams: 100 };

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Open,
    Saturation,
}

/// What one turn came to.
#[derive(Clone, Copy)]
struct Turn {
    p50: f64,
    p99: f64,
    per_second: f64,
    /// CPU of the contender's process, in microseconds a request.
    cpu: f64,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let Ok(runtime) = runtime else { return ExitCode::from(2) };
    let arguments: Vec<String> = std::env::args().collect();
    let done = match arguments.get(1).map(String::as_str) {
        Some(PASS_THROUGH) => runtime.block_on(pass_through(&arguments[2])).map(|()| true),
        _ => {
            let is_asked_for = |option: &str| arguments.iter().any(|it| it == option);
            let extent = if is_asked_for("--quick") { &QUICK } else { &FULL };
            match is_asked_for("--memory") {
                true => runtime.block_on(memory(extent)),
                false => runtime.block_on(run(extent)),
            }
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("proxy: {error}");
            ExitCode::from(2)
        }
    }
}

/// The processes under load, each with its name; the first is the stub and the second the
/// pass-through.
struct Field {
    contenders: Vec<(&'static str, Process, SocketAddr)>,
    _folder: Folder,
}

impl Field {
    fn start() -> Result<Self, Failure> {
        let (folder, quotum) = (Folder::new("proxy")?, quotum()?);
        let stub = Process::start(&folder, "stub", &quotum, &["stub", "--listen", "127.0.0.1:0"])?;
        let upstream = stub.addr("stub")?;
        let arguments = [PASS_THROUGH, &upstream.to_string()];
        let plain = Process::start(&folder, "pass-through", &std::env::current_exe()?, &arguments)?;
        let plain_at = plain.addr("proxy")?;
        let mut contenders = vec![("stub alone", stub, upstream), ("hyper pass-through", plain, plain_at)];
        match nginx(&folder, upstream) {
            Ok((nginx, at)) => contenders.push(("nginx", nginx, at)),
            Err(error) => println!("nginx is left out, it does not start: {error}\n"),
        }
        let config = folder.write("quotum.yaml", &config(upstream))?;
        let serve = Process::start(&folder, "serve", &quotum, &["serve", "--config", &config])?;
        let at = serve.addr("proxy")?;
        contenders.push(("quotum", serve, at));
        Ok(Self { contenders, _folder: folder })
    }
}

/// Returns a configuration with limits that are looked at and never reached.
fn config(upstream: SocketAddr) -> String {
    format!(
        "proxy: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         deployments:\n  - id: a\n    model: m\n    upstream: http://{upstream}/v1\n    limits:\n      \
         - {{ unit: tokens, amount: 1000000000000, window: 60s }}\n      \
         - {{ unit: requests, amount: 1000000000, window: 60s }}\n"
    )
}

/// Starts nginx as one would put it before an LLM's API: connections kept, nothing buffered.
fn nginx(folder: &Folder, upstream: SocketAddr) -> Result<(Process, SocketAddr), Failure> {
    let at = free_addrs(1)?[0];
    let folder = folder.path().display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {folder}/{kind};\n"))
        .collect();
    let text = format!(
        "daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log /dev/null;\n\
         events {{ worker_connections 8192; }}\nhttp {{\n access_log off; {temporary}\
         upstream stub {{ server {upstream}; keepalive 128; keepalive_requests 1000000000; }}\n\
         server {{\n listen {at}; keepalive_requests 1000000000; client_max_body_size 64m;\n\
         location / {{ proxy_pass http://stub; proxy_http_version 1.1; proxy_set_header Connection '';\n\
         proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s; }} }} }}\n"
    );
    let path = Path::new(&folder.to_string()).join("nginx.conf");
    std::fs::write(&path, text)?;
    Ok((Process::start_at(at, Command::new("nginx").arg("-e").arg("/dev/null").arg("-c").arg(path))?, at))
}

async fn run(extent: &Extent) -> Result<bool, Failure> {
    let met = memory(extent).await?;
    let field = Field::start()?;
    println!("| load | | p50, ms | p99, ms | requests/s | CPU, us each | ratio of p50 | p99 | requests/s | CPU |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    let mut is_fast = true;
    for load in [Load::Open, Load::Saturation] {
        for stream in [false, true] {
            let turns = race(&field, extent, load, stream).await?;
            is_fast &= report(&field, load, stream, &turns);
        }
    }
    println!("\nquotum's p50 and p99 at most {MAX_RATIO} times the pass-through's: {}", verdict(is_fast));
    Ok((met && is_fast) || extent.rounds == 1)
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

/// Lets the contenders take turns; returns the turns of each.
async fn race(field: &Field, extent: &Extent, load: Load, stream: bool) -> Result<Vec<Vec<Turn>>, Failure> {
    let mut turns = vec![Vec::new(); field.contenders.len()];
    let callers: Vec<_> = field.contenders.iter().map(|(_, _, at)| Arc::new(Callers::new(*at))).collect();
    let ask = Arc::new(ask(stream, 0));
    for (caller, (_, process, _)) in callers.iter().zip(&field.contenders) {
        turn(caller, process, &ask, Load::Saturation, extent.turn / 4).await?;
    }
    for round in 0..extent.rounds {
        for step in 0..callers.len() {
            let place = (round + step) % callers.len();
            let (_, process, _) = &field.contenders[place];
            turns[place].push(turn(&callers[place], process, &ask, load, extent.turn).await?);
        }
    }
    Ok(turns)
}

/// Prints what a race came to, and returns whether the target was met.
fn report(field: &Field, load: Load, stream: bool, turns: &[Vec<Turn>]) -> bool {
    let middle = |place: usize, figure: fn(&Turn) -> f64| median(turns[place].iter().map(figure).collect());
    let ratio = |place: usize, figure: fn(&Turn) -> f64| {
        let pairs = turns[place].iter().zip(&turns[1]);
        median(pairs.map(|(own, theirs)| figure(own) / figure(theirs)).collect()).unwrap_or(f64::NAN)
    };
    let load = match load {
        Load::Open => format!("{PER_SECOND} requests/s"),
        Load::Saturation => format!("{CALLERS} callers at once"),
    };
    let figures: [fn(&Turn) -> f64; 4] = [|turn| turn.p50, |turn| turn.p99, |turn| turn.per_second, |turn| turn.cpu];
    for (place, (name, ..)) in field.contenders.iter().enumerate() {
        let [p50, p99, per_second, cpu] = figures.map(|figure| middle(place, figure).unwrap_or(f64::NAN));
        let [r50, r99, rate, work] = figures.map(|figure| ratio(place, figure));
        let load = format!("{load}, {}", if stream { "streaming" } else { "whole" });
        println!(
            "| {load} | {name} | {p50:.3} | {p99:.3} | {per_second:.0} | {cpu:.0} | {r50:.2} | {r99:.2} | {rate:.2} \
             | {work:.2} |"
        );
    }
    let quotum = field.contenders.len() - 1;
    figures[..2].iter().all(|figure| ratio(quotum, *figure) <= MAX_RATIO)
}

/// Returns a chat request; the stub takes that long for the body of its answer.
fn ask(stream: bool, body_ms: u64) -> Ask {
    let body = json!({
        "model": "m",
        "messages": [{"role": "user", "content": "word ".repeat(PROMPT_BYTES / 5)}],
        "max_tokens": 300,
        "stream": stream,
    });
    let headers = vec![
        ("authorization", "Bearer sk-of-a-caller".to_owned()),
        ("user-agent", "bench".to_owned()),
        ("x-stub-completion-tokens", "50".to_owned()),
        ("x-stub-body-ms", body_ms.to_string()),
    ];
    Ask { path: "/v1/chat/completions", headers, body: body.to_string().into() }
}

/// Puts one contender under load.
async fn turn(
    callers: &Arc<Callers>,
    process: &Process,
    ask: &Arc<Ask>,
    load: Load,
    length: Duration,
) -> Result<Turn, Failure> {
    let took = Arc::new(Mutex::new(Vec::new()));
    let (begun, cpu) = (Instant::now(), process.cpu()?);
    let mut tasks = tokio::task::JoinSet::new();
    match load {
        Load::Open => {
            let one = |_| drop(tasks.spawn(timed(callers.clone(), ask.clone(), took.clone(), begun)));
            open_loop(PER_SECOND, length, one).await;
        }
        Load::Saturation => {
            (0..CALLERS)
                .for_each(|_| drop(tasks.spawn(timed(callers.clone(), ask.clone(), took.clone(), begun + length))));
        }
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let (elapsed, cpu) = (begun.elapsed().as_secs_f64(), process.cpu()? - cpu);
    let mut took = std::mem::take(&mut *took.lock().unwrap_or_else(PoisonError::into_inner));
    took.sort_unstable_by(f64::total_cmp);
    let quantile = |part: f64| took.get((took.len() as f64 * part) as usize).copied().unwrap_or(f64::NAN);
    let requests = took.len() as f64;
    let cpu = cpu.as_secs_f64() * 1e6 / requests;
    Ok(Turn { p50: quantile(0.5), p99: quantile(0.99), per_second: requests / elapsed, cpu })
}

/// Asks once, and then again until it is late; notes how long each answer took, in
/// milliseconds.
async fn timed(
    callers: Arc<Callers>,
    ask: Arc<Ask>,
    took: Arc<Mutex<Vec<f64>>>,
    until: Instant,
) -> Result<(), Failure> {
    loop {
        let sent = Instant::now();
        let answer = callers.ask(&ask).await?;
        let ms = sent.elapsed().as_secs_f64() * 1_000.0;
        if answer.status() != StatusCode::OK {
            return Err(format!("{}: {}", answer.status(), String::from_utf8_lossy(answer.body())).into());
        }
        took.lock().unwrap_or_else(PoisonError::into_inner).push(ms);
        if Instant::now() >= until {
            return Ok(());
        }
    }
}

/// Measures what a stream costs in memory of which only the first event has come.
async fn memory(extent: &Extent) -> Result<bool, Failure> {
    let field = Field::start()?;
    println!("| {} idle streams | memory each, kB |", extent.streams);
    println!("|---|---:|");
    let mut each = 0;
    for (name, process, at) in &field.contenders[1..] {
        let callers = Callers::new(*at);
        callers.ask(&ask(true, 0)).await?;
        let before = process.resident()?;
        let mut open = Vec::new();
        for _ in 0..extent.streams {
            // The first of ten events now, the next in over a minute.
            open.push(callers.send(&ask(true, 600_000)).await?);
        }
        each = process.resident()?.saturating_sub(before) / extent.streams;
        println!("| {name} | {:.1} |", each as f64 / 1_024.0);
    }
    println!("\nquotum's at most {} kB: {}\n", MAX_STREAM >> 10, verdict(each <= MAX_STREAM));
    Ok(each <= MAX_STREAM)
}

/// The argument that makes this program the pass-through.
const PASS_THROUGH: &str = "pass-through";

/// Passes every request on to the stub and every answer back: the least that a proxy of this
/// HTTP library does.
async fn pass_through(upstream: &str) -> Result<(), Failure> {
    let upstream: Authority = upstream.parse()?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<_, Incoming> = Client::builder(TokioExecutor::new()).build(connector);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", json!({"proxy": listener.local_addr()?.to_string()}));
    loop {
        let (io, _) = listener.accept().await?;
        io.set_nodelay(true)?;
        let (client, upstream) = (client.clone(), upstream.clone());
        let service = service_fn(move |request| pass(client.clone(), upstream.clone(), request));
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service);
        tokio::spawn(connection);
    }
}

async fn pass(
    client: Client<HttpConnector, Incoming>,
    upstream: Authority,
    mut request: Request<Incoming>,
) -> Result<Response<Incoming>, Infallible> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    (parts.scheme, parts.authority) = (Some(hyper::http::uri::Scheme::HTTP), Some(upstream));
    *request.uri_mut() = Uri::from_parts(parts).expect("a path that was a path");
    Ok(client.request(request).await.expect("the stub answers"))
}

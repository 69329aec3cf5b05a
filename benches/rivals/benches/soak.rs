//! The proxy under faults for a minute: what it must not lose, and what it must not keep.
//!
//! `cargo build --release && cargo bench -p quotum-bench --bench soak`, about 75 s;
//! `-- --quick` takes 6 s of load. Two real pods that share every limit, a stub that fails in
//! all its ways, 200 streams at once and 500 requests/s at one of the pods, callers that hang
//! up. Afterwards, of that pod:
//!
//! - every request whose caller stayed was answered, as its fault has it;
//! - nothing is parked, and every reservation was settled: what the limits say was used is
//!   what the stub says it was asked for, and the charges of faults that docs/algorithm.md
//!   section 4 has;
//! - memory is where it was after a third of the load, and descriptors where they were before.
//!
//! Exits with 1 if one of these does not hold.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use quotum_bench::{Ask, Callers, Failure, Folder, Process, free_addrs, open_loop, quotum};
use serde_json::{Value, json};

/// How long the load is.
const FULL: Duration = Duration::from_secs(60);
const QUICK: Duration = Duration::from_secs(6);

/// Streams at once, and how long one of them is.
const STREAMS: usize = 200;
const STREAM_MS: u64 = 1_000;

/// Requests per second beside them.
const PER_SECOND: f64 = 500.0;

/// Longer than any answer takes: whoever waits so long has none.
const PATIENCE: Duration = Duration::from_secs(30);

/// How much more memory than after a third of the load there may be at its end: less than a
/// hundred bytes a request, and what an allocator keeps of a busier moment.
const MORE_MEMORY: u64 = 4 << 20;

/// Tokens of a prompt, as the proxy reserves them and as the stub is told to count them.
const CONTENT: usize = 50;
const PROMPT: u64 = CONTENT as u64 + 4 + 8 + 3;

/// The most tokens of an answer, and how many there are.
const CAP: u64 = 200;
const COMPLETION: u64 = 20;

/// The most bytes of text that a token of the stub's comes to, and what else an event counts.
const TOKEN_BYTES: u64 = 5;
const ROLE_BYTES: u64 = 16;

/// What becomes of a request.
struct Kind {
    name: &'static str,
    /// The deployment it is for: each is counted by itself.
    model: &'static str,
    stream: bool,
    fault: &'static str,
    first_byte_ms: u64,
    /// When the caller hangs up.
    hang_up: Option<Duration>,
    statuses: &'static [u16],
    /// The least and the most that is charged, when the stub has sent that many tokens.
    charge: fn(u64) -> (u64, u64),
}

/// What a request costs whose answer says so.
const fn told(completion: u64) -> (u64, u64) {
    (PROMPT + completion, PROMPT + completion)
}

/// What it costs that came to nothing, or to what the stub sent until then.
fn broken(completion: u64) -> (u64, u64) {
    (PROMPT, PROMPT + (completion * TOKEN_BYTES + ROLE_BYTES).min(CAP))
}

const fn everything(_: u64) -> (u64, u64) {
    (PROMPT + CAP, PROMPT + CAP)
}

const PLAIN: Kind = Kind {
    name: "plain",
    model: "exact",
    stream: false,
    fault: "",
    first_byte_ms: 0,
    hang_up: None,
    statuses: &[200],
    charge: told,
};

/// What the open loop asks, in turns.
const ASKED: [Kind; 10] = [
    PLAIN,
    Kind { name: "error", fault: "500", statuses: &[500], ..PLAIN },
    Kind { name: "rejected", fault: "400", statuses: &[400], charge: |_| (0, 0), ..PLAIN },
    Kind { name: "silent", fault: "hang", statuses: &[504], ..PLAIN },
    Kind { name: "slow", first_byte_ms: 300, ..PLAIN },
    Kind { name: "garbage", fault: "garbage", charge: everything, ..PLAIN },
    Kind { name: "untold", fault: "no-usage", charge: everything, ..PLAIN },
    Kind { name: "paused", model: "pausing", fault: "429", statuses: &[429], ..PLAIN },
    Kind { name: "crowded", model: "tight", statuses: &[200, 429], ..PLAIN },
    Kind {
        name: "gone",
        model: "broken",
        first_byte_ms: 300,
        hang_up: Some(Duration::from_millis(50)),
        statuses: &[],
        charge: |_| (PROMPT, PROMPT + CAP),
        ..PLAIN
    },
];

const STREAM: Kind = Kind { name: "stream", stream: true, ..PLAIN };

/// What the streams are, in turns.
const STREAMED: [Kind; 4] = [
    STREAM,
    Kind { name: "cut", model: "broken", fault: "cut", charge: broken, ..STREAM },
    Kind { name: "gives-up", model: "broken", fault: "error-event", charge: broken, ..STREAM },
    Kind {
        name: "left",
        model: "broken",
        hang_up: Some(Duration::from_millis(STREAM_MS / 2)),
        statuses: &[],
        charge: broken,
        ..STREAM
    },
];

fn main() -> ExitCode {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done =
        runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(soak(if quick { QUICK } else { FULL })));
    match done {
        Ok(wrong) if wrong.is_empty() => {
            println!("nothing was lost and nothing was kept");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            wrong.iter().for_each(|wrong| eprintln!("soak: {wrong}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::from(2)
        }
    }
}

/// Two pods before one stub.
struct Fleet {
    folder: Folder,
    pods: Vec<Process>,
    stub: Process,
}

impl Fleet {
    fn start() -> Result<Self, Failure> {
        let (folder, quotum) = (Folder::new("soak")?, quotum()?);
        let stub = Process::start(&folder, "stub", &quotum, &["stub", "--listen", "127.0.0.1:0"])?;
        let (upstream, gossip) = (stub.addr("stub")?, free_addrs(2)?);
        let mut pods = Vec::new();
        for (number, own) in gossip.iter().enumerate() {
            let config = folder.write(&format!("pod-{number}.yaml"), &config(upstream, &gossip, *own))?;
            pods.push(Process::start(&folder, &format!("pod-{number}"), &quotum, &["serve", "--config", &config])?);
        }
        Ok(Self { folder, pods, stub })
    }
}

fn config(upstream: SocketAddr, gossip: &[SocketAddr], own: SocketAddr) -> String {
    let deployment = |id: &str, amount: u64, window: &str| {
        format!(
            "  - id: {id}\n    model: {id}\n    upstream: http://{upstream}/v1\n    reserve: bound\n    \
             timeouts: {{ first_byte: 1s }}\n    limits:\n      \
             - {{ unit: tokens, amount: {amount}, window: {window}, at_once: true }}\n      \
             - {{ unit: requests, amount: 1000000000, window: 100d, at_once: true }}\n"
        )
    };
    let ample = 1_000_000_000_000;
    let deployments: String = ["exact", "broken", "pausing"].iter().map(|id| deployment(id, ample, "100d")).collect();
    let seeds = gossip.iter().map(|addr| format!("'{addr}'")).collect::<Vec<_>>().join(", ");
    format!(
        "gossip: {{ cluster: soak, listen: '{own}', advertise: '{own}', seeds: [{seeds}] }}\n\
         proxy: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         deployments:\n{deployments}{}",
        // What is asked of it in a second comes to more than that: half of it lies with the peer.
        deployment("tight", 4_000, "1s")
    )
}

/// What the callers met.
#[derive(Default)]
struct Met {
    /// How many requests were sent of each kind.
    sent: BTreeMap<&'static str, u64>,
    /// How many were parked.
    parked: u64,
    /// What should not have happened.
    wrong: Vec<String>,
}

/// Runs the load and returns what was wrong.
async fn soak(length: Duration) -> Result<Vec<String>, Failure> {
    let fleet = Fleet::start()?;
    let pod = &fleet.pods[0];
    let admin = Callers::new(pod.addr("admin")?);
    until("the pods share", async || {
        let status = get(&admin, "/status").await?;
        Ok((status["has_share"] == true && status["peers"][0]["reachable"] == true).then_some(()))
    })
    .await?;
    let descriptors = pod.descriptors()?;
    let (callers, met) = (Arc::new(Callers::new(pod.addr("proxy")?)), Arc::new(Mutex::new(Met::default())));
    let warm = load(&callers, &met, pod, length).await?;
    callers.close();

    let Met { sent, parked, mut wrong } = std::mem::take(&mut *met.lock().unwrap_or_else(PoisonError::into_inner));
    println!("{} requests, {parked} of them parked: {sent:?}", sent.values().sum::<u64>());
    let stub = Callers::new(fleet.stub.addr("stub")?);
    for model in ["exact", "broken", "pausing"] {
        let settled = until("it is settled", async || is_settled(&admin, &stub, model).await).await;
        match settled {
            Ok(line) => println!("{line}"),
            Err(error) => wrong.push(format!("{model}: {error}; {}", counted(&admin, &stub, model).await?.0)),
        }
    }
    let status = get(&admin, "/status").await?;
    for limit in status["limits"].as_array().into_iter().flatten().filter(|limit| limit["parked"] != 0) {
        wrong.push(format!("{}: {} are still parked", limit["limit_id"], limit["parked"]));
    }
    // Without it there is nothing to keep connections for.
    drop(fleet.stub);
    let closed = until("it closes its connections", async || Ok((pod.descriptors()? <= descriptors).then_some(())));
    if let Err(error) = closed.await {
        wrong.push(format!("{error}: {} descriptors, and before there were {descriptors}", pod.descriptors()?));
    }
    let cold = pod.resident()?;
    println!("{descriptors} descriptors; {} kB after a third of it, {} kB at the end", warm >> 10, cold >> 10);
    if cold > warm + MORE_MEMORY {
        wrong.push(format!("{} kB more memory than after a third of it", (cold - warm) >> 10));
    }
    let log = std::fs::read_to_string(fleet.folder.path().join("pod-0.log"))?;
    wrong.extend(log.lines().filter(|line| line.contains("panicked")).map(str::to_owned));
    Ok(wrong)
}

/// Runs the load; returns what memory the pod had after a third of it.
async fn load(callers: &Arc<Callers>, met: &Arc<Mutex<Met>>, pod: &Process, length: Duration) -> Result<u64, Failure> {
    let ends = Instant::now() + length;
    let mut tasks = tokio::task::JoinSet::new();
    for stream in 0..STREAMS {
        let (callers, met) = (callers.clone(), met.clone());
        tasks.spawn(async move {
            for turn in stream.. {
                if Instant::now() >= ends {
                    break;
                }
                request(&callers, &met, &STREAMED[turn % STREAMED.len()]).await;
            }
        });
    }
    let mut warm = 0;
    for part in 0..3 {
        let send = |number: u64| {
            let (callers, met) = (callers.clone(), met.clone());
            let kind = &ASKED[usize::try_from(number).unwrap_or(0) % ASKED.len()];
            tasks.spawn(async move { request(&callers, &met, kind).await });
        };
        open_loop(PER_SECOND, length / 3, send).await;
        if part == 0 {
            warm = pod.resident()?;
        }
        while tasks.try_join_next().is_some() {}
    }
    while tasks.join_next().await.is_some() {}
    Ok(warm)
}

/// Sends one request and notes whether it was answered as it should be.
async fn request(callers: &Callers, met: &Mutex<Met>, kind: &'static Kind) {
    let number = {
        let mut met = met.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = met.sent.entry(kind.name).or_default();
        *sent += 1;
        *sent
    };
    let ask = ask(kind, number);
    let exchange = tokio::time::timeout(kind.hang_up.unwrap_or(PATIENCE), exchange(callers, &ask, kind)).await;
    let (parked, wrong) = match exchange {
        Ok(Ok(parked)) => (parked, None),
        Ok(Err(error)) => (false, Some(error.to_string())),
        Err(_) if kind.hang_up.is_some() => (false, None),
        Err(_) => (false, Some("no answer".to_owned())),
    };
    let mut met = met.lock().unwrap_or_else(PoisonError::into_inner);
    met.parked += u64::from(parked);
    if let Some(wrong) = wrong {
        met.wrong.push(format!("{} {number}: {wrong}", kind.name));
    }
}

/// Returns whether the request was parked.
async fn exchange(callers: &Callers, ask: &Ask, kind: &Kind) -> Result<bool, Failure> {
    if kind.fault == "cut" {
        // The last words are an event; then the connection ends as the upstream's did.
        let mut begun = callers.send(ask).await?;
        let mut text = Vec::new();
        let broke_off = loop {
            match begun.answer.body_mut().frame().await {
                None => break false,
                Some(Err(_)) => break true,
                Some(Ok(frame)) => text.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..])),
            }
        };
        let said = String::from_utf8_lossy(&text).contains("upstream_cut");
        return if broke_off && said { Ok(false) } else { Err("it was cut, and its caller was not told".into()) };
    }
    let answer = callers.ask(ask).await?;
    if !kind.statuses.contains(&answer.status().as_u16()) && kind.hang_up.is_none() {
        return Err(format!("{}: {}", answer.status(), String::from_utf8_lossy(answer.body())).into());
    }
    if kind.stream && kind.fault.is_empty() && !answer.body().ends_with(b"data: [DONE]\n\n") {
        return Err("the stream is not whole".into());
    }
    Ok(answer.headers().contains_key("x-quotum-wait-ms"))
}

fn ask(kind: &Kind, number: u64) -> Ask {
    let messages = json!([{"role": "user", "content": "x".repeat(CONTENT)}]);
    let body = json!({"model": kind.model, "messages": messages, "max_tokens": CAP, "stream": kind.stream});
    let headers = vec![
        ("x-stub-id", format!("{} {} {number}", kind.model, kind.name)),
        ("x-stub-prompt-tokens", PROMPT.to_string()),
        ("x-stub-completion-tokens", COMPLETION.to_string()),
        ("x-stub-first-byte-ms", kind.first_byte_ms.to_string()),
        ("x-stub-body-ms", if kind.stream { STREAM_MS } else { 0 }.to_string()),
        ("x-stub-fault", kind.fault.to_owned()),
    ];
    Ask { path: "/v1/chat/completions", headers, body: body.to_string().into() }
}

/// Says how a deployment was settled, once it was.
async fn is_settled(admin: &Callers, stub: &Callers, model: &str) -> Result<Option<String>, Failure> {
    let (line, settled) = counted(admin, stub, model).await?;
    Ok(settled.then_some(line))
}

/// Compares what the limits of a deployment say with what the stub does.
async fn counted(admin: &Callers, stub: &Callers, model: &str) -> Result<(String, bool), Failure> {
    let status = get(admin, "/status").await?;
    let limits = status["limits"].as_array();
    let limit = limits.and_then(|limits| limits.iter().find(|limit| limit["limit_id"] == model));
    let quotas = limit.and_then(|limit| limit["quotas"].as_array()).ok_or("no limit of this name")?;
    let used = |unit: &str| quotas.iter().find(|quota| quota["unit"] == unit).and_then(|quota| quota["used"].as_u64());
    let (tokens, requests) = (used("tokens").unwrap_or(0), used("requests").unwrap_or(0));
    let records = get(stub, "/_ledger").await?;
    let (mut least, mut most, mut asked, mut open) = (0, 0, 0, 0);
    for record in records.as_array().into_iter().flatten() {
        let mut id = record["id"].as_str().unwrap_or_default().split(' ');
        let (of, name) = (id.next(), id.next());
        let Some(kind) = ASKED.iter().chain(&STREAMED).find(|kind| Some(kind.name) == name) else { continue };
        if of != Some(model) {
            continue;
        }
        asked += 1;
        open += u64::from(record["completion_tokens"].is_null());
        let (low, high) = (kind.charge)(record["completion_tokens"].as_u64().unwrap_or(0));
        (least, most) = (least + low, most + high);
    }
    // A caller that hung up may have done so before its request reached the stub.
    let gone = ASKED.iter().chain(&STREAMED).any(|kind| kind.model == model && kind.hang_up.is_some());
    let counted = if gone { requests >= asked } else { requests == asked };
    let most = if gone { most + (requests.saturating_sub(asked)) * (PROMPT + CAP) } else { most };
    let settled = open == 0 && counted && (least..=most).contains(&tokens);
    let line = format!(
        "{model}: {tokens} tokens used, {least} to {most} by the stub's count; {requests} requests, {asked} by the \
         stub's; {open} open there"
    );
    Ok((line, settled))
}

async fn get(from: &Callers, path: &'static str) -> Result<Value, Failure> {
    let answer = from.ask(&Ask { path, headers: Vec::new(), body: Default::default() }).await?;
    Ok(serde_json::from_slice(answer.body())?)
}

/// Asks again and again until there is something.
async fn until<T>(what: &str, condition: impl AsyncFn() -> Result<Option<T>, Failure>) -> Result<T, Failure> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(found) = condition().await? {
            return Ok(found);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err(format!("it never came that {what}").into())
}

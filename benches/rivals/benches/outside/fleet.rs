//! A fleet of real pods, a stub upstream, a load balancer and callers.
//!
//! Knows how pods are started, found ready, loaded and ended. Must not know what is done to
//! them or why. The invariants it keeps: the balancer knows of a pod only what `/readyz` says;
//! the load is an open loop; and every request carries the instant at which it was sent to the
//! upstream, whose count is all there is.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use quotum_bench::{Ask, Callers, Failure, Folder, Process, Signal, open_loop};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::net::{Ground, Slot, Wires};

/// Tokens of a window.
pub(crate) const LIMIT: u64 = 24_000;

/// Tokens of a prompt as the proxy reserves them and as the stub counts them, and the cap.
const CONTENT: usize = 25;
const PROMPT: u64 = CONTENT as u64 + 4 + 8 + 3;
const CAP: u64 = 80;

/// A request uses 20 to 80 tokens beside its prompt, 50 in the mean.
const LEAST: u64 = 20;
const MEAN: f64 = (PROMPT + 50) as f64;

/// What is asked for, in limits.
const OVERLOAD: f64 = 2.0;

/// From the request's last byte to the answer's first, and from there to its last.
const FIRST_BYTE_MS: &str = "20";
const BODY_MS: &str = "150";

/// How long a transit may take by the promise: a busy machine takes its time.
pub(crate) const EDGE_MS: u64 = 250;

/// Longer than anything here takes: whoever waits so long has no answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often the balancer asks whether a pod is ready, and how long it waits for the answer.
const PROBE_EVERY: Duration = Duration::from_millis(50);
const PROBE_WAITS: Duration = Duration::from_secs(1);

/// What kind of fleet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// How many pods there are at the start, and how many places.
    pub(crate) pods: usize,
    pub(crate) slots: usize,
    /// Where the pods find one another.
    pub(crate) seeds: Seeds,
    /// `wait` instead of `admit`.
    pub(crate) first_window_waits: bool,
    /// Of a hundred datagrams, how many are lost; not zero: through a relay.
    pub(crate) loss: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seeds {
    Nowhere,
    List,
    Name,
}

/// What all fleets share.
pub(crate) struct Site {
    pub(crate) folder: Folder,
    pub(crate) ground: Ground,
    pub(crate) quotum: PathBuf,
    pub(crate) namespaces: bool,
    pub(crate) window: Duration,
}

/// A pod as the balancer sees it.
struct Member {
    proxy: Callers,
    ready: AtomicBool,
    gone: AtomicBool,
    /// The longest that `/readyz` has taken while it was ready, in ms.
    slowest_ms: AtomicU64,
}

/// A pod.
pub(crate) struct Pod {
    process: Process,
    pub(crate) slot: usize,
    admin: Callers,
    member: Arc<Member>,
}

/// What callers met.
#[derive(Debug, Default)]
pub(crate) struct Met {
    pub(crate) answered: u64,
    pub(crate) refused: u64,
    /// Due while no pod was ready.
    pub(crate) turned_away: u64,
    pub(crate) failed: Vec<String>,
}

/// A stub and pods before it.
pub(crate) struct Fleet {
    pub(crate) name: &'static str,
    site: Arc<Site>,
    kind: Kind,
    pub(crate) pods: Vec<Pod>,
    pub(crate) wires: Wires,
    slots: Vec<Slot>,
    _stub: Process,
    stub_at: SocketAddr,
    started: usize,
    members: Arc<Mutex<Vec<Arc<Member>>>>,
}

impl Fleet {
    /// Starts the stub and pods, and waits until every one has its share.
    pub(crate) async fn start(site: Arc<Site>, number: u8, name: &'static str, kind: Kind) -> Result<Self, Failure> {
        let wires = Wires::new(site.namespaces && kind.loss == 0, number, kind.slots).await?;
        if let Wires::Relay(relay) = &wires {
            relay.loss.store(kind.loss, Ordering::Relaxed);
        }
        let listen = site.ground.upstream(matches!(wires, Wires::Relay(_))).to_string();
        let arguments = ["stub", "--listen", &listen, "--first-byte-ms", FIRST_BYTE_MS, "--body-ms", BODY_MS];
        let stub = start(&site, format!("{name}-stub"), None, &arguments).await?;
        let stub_at = stub.addr("stub")?;
        let slots = (0..kind.slots).map(|slot| wires.slot(slot)).collect::<Result<_, _>>()?;
        let members = Arc::default();
        let mut fleet =
            Self { name, site, kind, pods: Vec::new(), wires, slots, _stub: stub, stub_at, started: 0, members };
        // All are listed before the first of them looks, as a deployment's pods are.
        for slot in 0..kind.pods {
            fleet.list(slot)?;
        }
        for slot in 0..kind.pods {
            fleet.run(slot).await?;
        }
        fleet.until_all_share().await?;
        Ok(fleet)
    }

    /// Puts a place on the list that a name resolves to; nothing if there is none.
    pub(crate) fn list(&self, slot: usize) -> Result<(), Failure> {
        match self.kind.seeds {
            Seeds::Name => self.site.ground.list(&self.host(), self.slots[slot].ip),
            Seeds::Nowhere | Seeds::List => Ok(()),
        }
    }

    /// Strikes it off.
    pub(crate) fn unlist(&self, slot: usize) -> Result<(), Failure> {
        match self.kind.seeds {
            Seeds::Name => self.site.ground.unlist(&self.host(), self.slots[slot].ip, &self.site.folder),
            Seeds::Nowhere | Seeds::List => Ok(()),
        }
    }

    fn host(&self) -> String {
        format!("{}.outside", self.name)
    }

    /// Starts a pod at a place. It gets requests once it says that it is ready.
    pub(crate) async fn run(&mut self, slot: usize) -> Result<(), Failure> {
        let name = format!("{}-{slot}-{}", self.name, self.started);
        self.started += 1;
        let config = self.site.folder.write(&format!("{name}.yaml"), &self.config(slot)?)?;
        let namespace = self.slots[slot].namespace.as_deref();
        let process = start(&self.site, name, namespace, &["serve", "--config", &config]).await?;
        let (proxy, admin) = (process.addr("proxy")?, process.addr("admin")?);
        let member = Arc::new(Member {
            proxy: Callers::new(proxy),
            ready: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            slowest_ms: AtomicU64::new(0),
        });
        tokio::spawn(watch_over(Arc::clone(&member), admin));
        self.members().push(Arc::clone(&member));
        self.pods.push(Pod { process, slot, admin: Callers::new(admin), member });
        Ok(())
    }

    fn config(&self, slot: usize) -> Result<String, Failure> {
        let (own, ip) = (&self.slots[slot], self.slots[slot].ip);
        let seeds = match self.kind.seeds {
            Seeds::Nowhere => String::new(),
            Seeds::Name => format!("'{}:{}'", self.host(), own.advertise.port()),
            Seeds::List => self.slots.iter().map(|slot| format!("'{}'", slot.advertise)).collect::<Vec<_>>().join(", "),
        };
        let key = self.site.folder.path().join("key");
        let first = if self.kind.first_window_waits { "wait" } else { "admit" };
        let gossip = format!(
            "gossip: {{ cluster: {}, listen: '{}', advertise: '{}', seeds: [{seeds}], key_file: {}, \
             first_window: {first} }}\n",
            self.name,
            own.listen,
            own.advertise,
            key.display()
        );
        Ok(format!(
            "node: {{ name: {}-{slot} }}\n{}proxy: {{ listen: '{ip}:0', open: true, linger: 1s }}\n\
             admin: {{ listen: '{ip}:0' }}\ndeployments:\n  - id: m\n    model: m\n    upstream: http://{}/v1\n    \
             reserve: bound\n    edge: {EDGE_MS}ms\n    limits:\n      \
             - {{ unit: tokens, amount: {LIMIT}, window: {}ms }}\n",
            self.name,
            if self.kind.seeds == Seeds::Nowhere { "" } else { &gossip },
            self.stub_at,
            self.site.window.as_millis()
        ))
    }

    /// Waits until every pod has its share and reaches the others.
    pub(crate) async fn until_all_share(&self) -> Result<(), Failure> {
        let others = if self.kind.seeds == Seeds::Nowhere { 0 } else { self.pods.len() - 1 };
        for pod in &self.pods {
            until("a pod has its share", async || {
                let status = pod.status().await?;
                let peers = status["peers"].as_array().map_or(0, |peers| {
                    peers.iter().filter(|peer| peer["reachable"] == true && peer["gone_from_unix_ms"].is_null()).count()
                });
                Ok((status["has_share"] == true && status["ready"] == true && peers >= others).then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Waits until a pod gets requests.
    pub(crate) async fn until_ready(&self, pod: &Pod) -> Result<(), Failure> {
        until("a pod is ready", async || Ok(pod.member.ready.load(Ordering::Relaxed).then_some(()))).await
    }

    /// Tells a pod to stop and waits until it has, having drained.
    pub(crate) async fn terminate(&mut self, place: usize) -> Result<(), Failure> {
        let pod = self.pods.remove(place);
        let slot = pod.slot;
        match pod.terminate().await? {
            Some(0) => self.unlist(slot),
            code => Err(format!("a pod told to stop ended with {code:?}").into()),
        }
    }

    /// Waits for the next start of a window.
    pub(crate) async fn next_window(&self) -> u64 {
        let window = self.window_ms();
        let next = (unix_ms() / window + 1) * window;
        tokio::time::sleep(Duration::from_millis(next.saturating_sub(unix_ms()))).await;
        next
    }

    /// Waits for a part of a window.
    pub(crate) async fn part(&self, windows: f64) {
        tokio::time::sleep(self.site.window.mul_f64(windows)).await;
    }

    pub(crate) fn window_ms(&self) -> u64 {
        self.site.window.as_millis() as u64
    }

    fn members(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Member>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest that a ready pod has let the balancer wait, in ms.
    pub(crate) fn slowest_ms(&self) -> u64 {
        self.members().iter().map(|member| member.slowest_ms.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// Loads the fleet until it is told to stop.
    pub(crate) fn load(&self) -> (watch::Sender<bool>, JoinHandle<Met>) {
        let (stop, mut stopped) = watch::channel(false);
        let members = Arc::clone(&self.members);
        let per_second = OVERLOAD * LIMIT as f64 / self.site.window.as_secs_f64() / MEAN;
        let loading = tokio::spawn(async move {
            let met = Arc::new(Mutex::new(Met::default()));
            let mut requests = tokio::task::JoinSet::new();
            let send = |number| match chosen(&members, number) {
                Some(member) => drop(requests.spawn(request(member, Arc::clone(&met), number))),
                None => met.lock().unwrap_or_else(PoisonError::into_inner).turned_away += 1,
            };
            tokio::select! {
                biased;
                _ = stopped.changed() => {}
                () = open_loop(per_second, Duration::MAX, send) => {}
            }
            while requests.join_next().await.is_some() {}
            std::mem::take(&mut *met.lock().unwrap_or_else(PoisonError::into_inner))
        });
        (stop, loading)
    }

    /// Returns the stub's records once all of them are closed.
    pub(crate) async fn records(&self) -> Result<Vec<Value>, Failure> {
        let stub = Callers::new(self.stub_at);
        until("every answer has ended", async || {
            let Value::Array(records) = get(&stub, "/_ledger").await? else { return Err("no ledger".into()) };
            let open = records.iter().any(|record| record["completion_tokens"].is_null());
            Ok((!open).then_some(records))
        })
        .await
    }
}

impl Pod {
    pub(crate) async fn status(&self) -> Result<Value, Failure> {
        get(&self.admin, "/status").await
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Failure> {
        Ok(self.process.signal(signal)?)
    }

    /// Gives it no request any more, whatever it says: a balancer that knows better.
    pub(crate) fn withdraw(&self) {
        self.member.gone.store(true, Ordering::Relaxed);
        self.member.ready.store(false, Ordering::Relaxed);
    }

    /// Gives it so many requests at once, ready or not, and notes what becomes of them nowhere.
    pub(crate) fn surprise(&self, requests: u64) {
        for number in 0..requests {
            tokio::spawn(request(Arc::clone(&self.member), Arc::default(), number));
        }
    }

    /// Gives it requests again once it says that it is ready.
    pub(crate) fn restore(&self) -> Result<(), Failure> {
        self.member.gone.store(false, Ordering::Relaxed);
        tokio::spawn(watch_over(Arc::clone(&self.member), self.process.addr("admin")?));
        Ok(())
    }

    /// Begins an answer that lasts so long, and returns once it has begun.
    pub(crate) async fn begin(&self, lasts_ms: u64) -> Result<quotum_bench::Begun, Failure> {
        let mut ask = ask(true, LEAST);
        ask.headers.push(("x-stub-body-ms", lasts_ms.to_string()));
        self.member.proxy.send(&ask).await
    }

    /// Tells it to stop and returns its exit code.
    pub(crate) async fn terminate(self) -> Result<Option<i32>, Failure> {
        self.signal(Signal::TERM)?;
        self.end().await
    }

    /// Returns its exit code once it has ended.
    pub(crate) async fn end(mut self) -> Result<Option<i32>, Failure> {
        let begun = Instant::now();
        let code = loop {
            match self.process.ended()? {
                Some(code) => break code,
                None if begun.elapsed() > PATIENCE => return Err("a pod does not end".into()),
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        self.withdraw();
        Ok(code)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// Returns a pod that is ready. The load is uneven: half of all goes to the first.
fn chosen(members: &Mutex<Vec<Arc<Member>>>, number: u64) -> Option<Arc<Member>> {
    let members = members.lock().unwrap_or_else(PoisonError::into_inner);
    let ready: Vec<_> = members.iter().filter(|member| member.ready.load(Ordering::Relaxed)).collect();
    let lot = mix(!number) as usize;
    let place = if lot & 1 == 0 { 0 } else { (lot >> 1) % ready.len().max(1) };
    ready.get(place).map(|member| Arc::clone(member))
}

/// Starts the command where it belongs. Others run meanwhile: it takes a while on a busy machine.
async fn start(
    site: &Arc<Site>,
    name: String,
    namespace: Option<&str>,
    arguments: &[&str],
) -> Result<Process, Failure> {
    let program = site.quotum.to_str().ok_or("the path of quotum is not UTF-8")?.to_owned();
    let mut line: Vec<String> = Vec::new();
    if let Some(namespace) = namespace {
        line.extend(["nsenter".to_owned(), format!("--net=/run/netns/{namespace}")]);
    }
    line.push(program);
    line.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let site = Arc::clone(site);
    let started = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = line[1..].iter().map(String::as_str).collect();
        Process::start(&site.folder, &name, line[0].as_ref(), &arguments)
    });
    Ok(started.await??)
}

/// Asks a pod again and again whether it is ready.
async fn watch_over(member: Arc<Member>, admin: SocketAddr) {
    let admin = Callers::new(admin);
    let ask = Ask { path: "/readyz", headers: Vec::new(), body: Default::default() };
    while !member.gone.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let answer = tokio::time::timeout(PROBE_WAITS, admin.ask(&ask)).await;
        let ready = matches!(&answer, Ok(Ok(answer)) if answer.status() == 200);
        if ready {
            member.slowest_ms.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        }
        if !member.gone.load(Ordering::Relaxed) {
            member.ready.store(ready, Ordering::Relaxed);
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

async fn request(member: Arc<Member>, met: Arc<Mutex<Met>>, number: u64) {
    let lot = mix(number);
    let ask = ask(lot & 1 == 1, LEAST + (lot >> 1) % (CAP - LEAST + 1));
    let answer = tokio::time::timeout(PATIENCE, member.proxy.ask(&ask)).await;
    let mut met = met.lock().unwrap_or_else(PoisonError::into_inner);
    match answer {
        Ok(Ok(answer)) if answer.status() == 200 => met.answered += 1,
        Ok(Ok(answer)) if answer.headers().get("x-quotum-refused-by").is_some_and(|by| by == "quotum") => {
            met.refused += 1;
        }
        Ok(Ok(answer)) => {
            met.failed.push(format!("{}: {}", answer.status(), String::from_utf8_lossy(answer.body())));
        }
        Ok(Err(error)) => met.failed.push(error.to_string()),
        Err(_) => met.failed.push("no answer".into()),
    }
}

fn ask(stream: bool, completion: u64) -> Ask {
    let messages = json!([{"role": "user", "content": "x".repeat(CONTENT)}]);
    let body = json!({"model": "m", "messages": messages, "max_tokens": CAP, "stream": stream});
    let headers = vec![
        ("x-stub-id", unix_ms().to_string()),
        ("x-stub-prompt-tokens", PROMPT.to_string()),
        ("x-stub-completion-tokens", completion.to_string()),
    ];
    Ask { path: "/v1/chat/completions", headers, body: body.to_string().into() }
}

async fn get(from: &Callers, path: &'static str) -> Result<Value, Failure> {
    let answer = from.ask(&Ask { path, headers: Vec::new(), body: Default::default() }).await?;
    Ok(serde_json::from_slice(answer.body())?)
}

/// Asks again and again until there is something. Who is not there yet may come.
pub(crate) async fn until<T>(
    what: &str,
    condition: impl AsyncFn() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let begun = Instant::now();
    loop {
        let found = condition().await;
        match found {
            Ok(Some(found)) => return Ok(found),
            _ if begun.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok(None) => return Err(format!("it never came that {what}").into()),
            Err(error) => return Err(format!("it never came that {what}: {error}").into()),
        }
    }
}

pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
const fn mix(number: u64) -> u64 {
    let mut value = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

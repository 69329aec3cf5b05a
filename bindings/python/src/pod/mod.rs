//! A pod: one replica, however many workers it has.
//!
//! Knows who owns the pod's rights and how the other workers reach the owner. Must not know
//! Python or LiteLLM. The invariant it keeps: the owner is whoever holds the pod's name among
//! the machine's abstract sockets. The system gives it to one process at a time and takes it
//! back when that process ends, however it ends; so whoever gets the name knows that the owner
//! before is dead, and joins the fleet at its exclusive slot.

mod admin;
mod book;
mod door;
mod link;
mod message;
mod python;

use std::array;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quotum::cluster::{Cluster, ClusterConfig, ClusterStats, JoinError, Seeds};
use quotum::layer::Tokenizer;
use quotum::ledger::LimitId;
use quotum::telemetry::{self, Telemetry, Traffic};
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::book::Book;
use self::link::Link;
use self::message::{Ask, Declared, Refusal, Reply};
use crate::keys::KeyFile;
use crate::limiter::join;
use crate::settings;

pub(crate) use self::python::Pod;

/// How long a request waits for an owner: one that dies is followed within this.
const OWNER_WITHIN: Duration = Duration::from_millis(1_500);

/// How long an owner that lives may take to answer, beside what its limits may wait for
/// peers: none does, but one that is stopped, or a machine that has no memory left.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// For how long whatever keeps the gossip port from the owner is taken for what the system
/// still closes of the owner before, and not for another program.
const PORT_WITHIN: Duration = Duration::from_secs(1);

/// How soon a worker looks again when neither owning nor reaching the owner worked.
const AGAIN: Duration = Duration::from_millis(25);

/// How soon it looks again when something is wrong that waiting may not mend.
const AGAIN_WRONG: Duration = Duration::from_secs(1);

/// The worker number of the owner's own requests.
const OWN: u64 = 0;

/// Where this process stands in its pod.
#[derive(Clone, Debug)]
enum Seat {
    /// Neither owner nor linked to one, and why.
    Standing(Arc<str>),
    Owner(Arc<Book>),
    Guest(Link),
}

/// What the pod's task and its callers share.
#[derive(Debug)]
struct Shared {
    seat: watch::Sender<Seat>,
    declared: Mutex<Vec<Declared>>,
    config: ClusterConfig,
    key_file: Option<KeyFile>,
    cluster: Mutex<Option<Arc<Cluster>>>,
    telemetry: Arc<Telemetry>,
    /// How many other workers reach the owner, if this is it.
    workers: AtomicUsize,
    admin: Option<SocketAddr>,
}

impl Shared {
    fn new(config: ClusterConfig, key_file: Option<KeyFile>, admin: Option<SocketAddr>) -> Arc<Self> {
        let (seat, _) = watch::channel(Seat::Standing("it has just started".into()));
        Arc::new(Self {
            seat,
            declared: Mutex::default(),
            config,
            key_file,
            cluster: Mutex::default(),
            telemetry: Arc::default(),
            workers: AtomicUsize::new(0),
            admin,
        })
    }

    fn seat(&self) -> Seat {
        self.seat.borrow().clone()
    }

    fn declared(&self) -> Vec<Declared> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns what the prompts of any deployment are counted with.
    fn tokenizers(&self) -> Vec<Tokenizer> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Declared::tokenizer).collect()
    }

    /// Asks the owner, whoever that is; waits a moment for one.
    async fn ask(&self, ask: Ask) -> Reply {
        let deadline = Instant::now() + OWNER_WITHIN;
        let mut seats = self.seat.subscribe();
        loop {
            let seat = seats.borrow_and_update().clone();
            let why = match seat {
                Seat::Owner(book) => return self.known(self.answer(&book, ask, OWN).await),
                Seat::Guest(link) => match timeout(self.patience(&ask), link.ask(ask.clone())).await {
                    Ok(Some(reply)) => return self.known(reply),
                    Ok(None) => "the worker that owns them is gone".into(),
                    Err(_) => return Reply::Refused(Refusal::unowned("the worker that owns them does not answer")),
                },
                Seat::Standing(why) => why,
            };
            if !matches!(timeout_at(deadline, seats.changed()).await, Ok(Ok(()))) {
                return Reply::Refused(Refusal::unowned(&why));
            }
        }
    }

    /// Returns how long an answer is waited for: a decision may wait for peers, once a level.
    fn patience(&self, ask: &Ask) -> Duration {
        let (Ask::Reserve(request) | Ask::Room(request)) = ask else { return ANSWER_WITHIN };
        let declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = declared.iter().filter_map(|one| one.terms.wait).fold(0.0, f64::max);
        let levels = request.levels.iter().flatten().count() as f64;
        ANSWER_WITHIN + Duration::try_from_secs_f64(wait * levels).unwrap_or(Duration::MAX / 2)
    }

    /// Lets no request pass for a deployment that has limits here, and none at the owner: what
    /// it was told of them it could not take.
    fn known(&self, reply: Reply) -> Reply {
        let Reply::Granted { id: 0, deployment, .. } = &reply else { return reply };
        let declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        if !declared.iter().any(|one| one.id == *deployment) {
            return reply;
        }
        Reply::Wrong(format!("the worker that owns this pod's rights could not take in the limits of {deployment:?}"))
    }

    /// Answers as the owner.
    async fn answer(&self, book: &Arc<Book>, ask: Ask, worker: u64) -> Reply {
        match ask {
            Ask::Reserve(request) => book.reserve(request, worker).await,
            Ask::Room(request) => book.room(request).await,
            Ask::Settle { id, outcome } => {
                book.settle(id, outcome);
                Reply::Done
            }
            Ask::Late { id } => {
                book.late(id).await;
                Reply::Done
            }
            Ask::Declare(declared) => match book.declare(&declared) {
                Ok(()) => Reply::Done,
                Err(why) => Reply::Wrong(why),
            },
            Ask::Metrics => Reply::Text(self.metrics(book)),
            Ask::Status => Reply::Text(self.status(book)),
        }
    }

    fn metrics(&self, book: &Book) -> String {
        let cluster = self.cluster();
        if let Some(cluster) = &cluster {
            self.telemetry.fell_back(cluster.fallback().is_some());
        }
        let stats = cluster.map(|cluster| cluster.stats());
        self.telemetry.carried(stats.as_ref().map(traffic).unwrap_or_default());
        let rejected = stats.map(|stats| stats.frames_rejected).unwrap_or_default();
        self.telemetry.render(&book.limiter().status(), &BTreeMap::new(), &rejected)
    }

    fn status(&self, book: &Book) -> String {
        let mut shown = telemetry::status_json(&book.limiter().status());
        let workers = self.workers.load(Ordering::Relaxed) + 1;
        let fallback = self.cluster().and_then(|cluster| cluster.fallback());
        shown["discovery_fallback"] = json!(fallback.map(|fallback| {
            json!({
                "since_unix_ms": fallback.since.unix_ms(),
                "why": fallback.why,
                "meanwhile": fallback.meanwhile,
                "resolve": fallback.resolve,
            })
        }));
        shown["pod"] =
            json!({"owner": std::process::id(), "workers": workers, "open": book.open(), "late": book.late_ones()});
        shown.to_string()
    }

    fn cluster(&self) -> Option<Arc<Cluster>> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stand(&self, why: &str) {
        self.seat.send_replace(Seat::Standing(why.into()));
    }

    /// Takes and loses seats until the task is ended.
    async fn run(self: Arc<Self>) {
        let mut before = Before::Nothing;
        let mut told = String::new();
        let mut barred: Option<Instant> = None;
        loop {
            let outcome = match own_name(&self.config) {
                Ok(listener) => self.own(listener, &mut before, &mut barred).await,
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    barred = None;
                    self.visit(&mut before).await
                }
                Err(error) => Err(Trouble::Wrong(format!("the pod's local socket: {error}"))),
            };
            let pause = match outcome {
                Ok(()) => Duration::ZERO,
                Err(Trouble::Passing(why)) => {
                    self.stand(&why);
                    AGAIN
                }
                Err(Trouble::Wrong(why)) => {
                    self.stand(&why);
                    if told != why {
                        eprintln!("quotum: {why}");
                        told = why;
                    }
                    AGAIN_WRONG
                }
            };
            sleep(pause).await;
        }
    }

    /// Owns the pod's rights. Returns only if that does not work.
    async fn own(
        self: &Arc<Self>,
        listener: UnixListener,
        before: &mut Before,
        barred: &mut Option<Instant>,
    ) -> Result<(), Trouble> {
        let book = Arc::new(Book::new(&self.declared(), self.telemetry.clone()).map_err(Trouble::Wrong)?);
        let is_alone = self.config.seeds == Seeds::Alone;
        if is_alone {
            // Nobody else knows what a dead owner has spent.
            if matches!(before, Before::Guest) {
                book.forfeit();
            }
        } else {
            let joined = join(&book.limiter(), self.config.clone(), self.key_file.clone()).await;
            let cluster = joined.map_err(|error| match error {
                // The system may still be closing what the owner before had open.
                JoinError::Bind { .. } if barred.get_or_insert_with(Instant::now).elapsed() < PORT_WITHIN => {
                    Trouble::Passing(settings::explain(&error))
                }
                error => Trouble::Wrong(settings::explain(&error)),
            })?;
            *barred = None;
            *self.cluster.lock().unwrap_or_else(PoisonError::into_inner) = Some(cluster);
        }
        *before = Before::Owner;
        self.seat.send_replace(Seat::Owner(book.clone()));
        if let Some(at) = self.admin {
            tokio::spawn(admin::serve(at, self.clone(), book.clone()));
        }
        door::serve(listener, self.clone(), book).await;
        Ok(())
    }

    /// Reserves through the owner. Returns when it is gone.
    async fn visit(self: &Arc<Self>, before: &mut Before) -> Result<(), Trouble> {
        let address = name(&self.config).map_err(|error| Trouble::Wrong(error.to_string()))?;
        // Connecting to a local socket does not wait, but for an owner whose queue is full.
        let stream = std_unix::UnixStream::connect_addr(&address);
        let stream = stream.and_then(|stream| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        });
        let stream = stream.map_err(|error| Trouble::Passing(format!("the worker that owns them: {error}")))?;
        if !door::is_ours(&stream) {
            let why = "another user's process has the name of this pod's local socket; end it, or set QUOTUM_NODE";
            return Err(Trouble::Wrong(why.to_owned()));
        }
        let (link, gone) = link::open(stream);
        match timeout(OWNER_WITHIN * 4, link.ask(Ask::Declare(self.declared()))).await {
            Ok(Some(Reply::Done)) => {}
            Ok(Some(Reply::Wrong(why))) => return Err(Trouble::Wrong(why)),
            _ => return Err(Trouble::Passing("the worker that owns them does not answer".to_owned())),
        }
        *before = Before::Guest;
        self.seat.send_replace(Seat::Guest(link));
        gone.await;
        self.stand("the worker that owned them is gone");
        Ok(())
    }
}

/// Returns what gossip has carried, by its two ways.
fn traffic(stats: &ClusterStats) -> Vec<Traffic> {
    let all = [stats.frames_sent, stats.bytes_sent, stats.frames_received, stats.bytes_received];
    let chitchat = [
        stats.chitchat_frames_sent,
        stats.chitchat_bytes_sent,
        stats.chitchat_frames_received,
        stats.chitchat_bytes_received,
    ];
    let direct = array::from_fn(|place| all[place] - chitchat[place]);
    let by = |way, [sent, sent_bytes, received, received_bytes]: [u64; 4]| Traffic {
        way,
        sent,
        sent_bytes,
        received,
        received_bytes,
    };
    vec![by("direct", direct), by("chitchat", chitchat)]
}

/// What this process was in its pod so far.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nothing,
    Guest,
    Owner,
}

/// Why a seat was not taken.
#[derive(Debug)]
enum Trouble {
    /// It is expected to pass by itself.
    Passing(String),
    /// Somebody must mend it.
    Wrong(String),
}

/// Returns the name of a pod: whoever has another fleet, node or address is another pod.
fn name(config: &ClusterConfig) -> io::Result<std_unix::SocketAddr> {
    let ClusterConfig { cluster, node, listen, advertise, .. } = config;
    let what = format!("{cluster}\0{node}\0{listen}\0{advertise:?}");
    let user = rustix::process::getuid().as_raw();
    std_unix::SocketAddr::from_abstract_name(format!("quotum-{user}-{:016x}", LimitId::of(&what).bits()))
}

fn own_name(config: &ClusterConfig) -> io::Result<UnixListener> {
    let listener = std_unix::UnixListener::bind_addr(&name(config)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

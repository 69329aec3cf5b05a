//! chitchat: who is alive, and a second, slower way for rosters and rows.
//!
//! The only file that names chitchat. Knows its configuration, its keys and its faults.
//! Must not know frames or the ledger's rules: it hands out bytes to send, takes bytes that
//! came in authenticated frames, and turns what others published into messages and pauses. The
//! invariant it keeps: nothing that counts depends on chitchat. What it says is merged like
//! any other message, its liveness is shown and never summed, and if it dies it is started
//! again while the rest goes on.
//!
//! Every key is fixed and ASCII, and none is ever deleted: a key whose first character is
//! not ASCII panics every peer, and the collection of tombstones wipes a peer's map
//! (docs/decisions/0001-chitchat-0.11.md).

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use chitchat::transport::{Socket, Transport};
use chitchat::{
    Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, ChitchatMessage, Deserializable, FailureDetectorConfig,
    Serializable, spawn_chitchat,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::shards::{self, Shards};
use super::text;
use super::wire::{self, OLDEST_WIRE_VERSION};
use crate::ledger::{LimitId, Message, ReplicaId, RosterMessage, Row, Slot, Timestamp};

/// chitchat gossips this many times less often than we do: rows and requests go directly,
/// it keeps the tail, at a quarter of the cost.
pub(crate) const INTERVALS: u32 = 5;

/// The most replicas, alive or dead, that chitchat may know. Its digest takes 71 bytes for
/// each over IPv6 and is never cut; above 65,507 its arithmetic underflows and it panics.
pub(crate) const MAX_MEMBERS: usize = 900;

/// The most pauses that a replica publishes, 2.7 kB; those that last longest come first. One for each limit whose upstream refuses.
const MAX_PAUSES: usize = 128;

/// The most bytes of a roster in a value, about 230 members; a larger one goes by our own
/// messages alone.
const MAX_ROSTER_VALUE: usize = 16_384;

/// How long the dead are remembered: longer than two minute windows with all that is in
/// flight, so that a newcomer still hears what they spent.
const DEAD_FOR: Duration = Duration::from_secs(600);

/// The most messages that wait between the loop and chitchat, either way. It answers each
/// in microseconds and sends at most 15 an interval of its own.
const QUEUE: usize = 256;

/// How long to wait after chitchat ended before it is started again.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// Who this replica is, to chitchat.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) cluster: String,
    pub(crate) me: ReplicaId,
    pub(crate) slot: Slot,
    /// The newest wire version that it reads.
    pub(crate) wire: u8,
}

/// chitchat, kept running.
pub(crate) struct Membership {
    identity: Identity,
    interval: Duration,
    outgoing: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    sent: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    state: State,
    /// The version of each one's values that was last read.
    read: BTreeMap<ChitchatId, u64>,
    published: Published,
    /// Takes turns: whom chitchat is told to greet next.
    greeted: usize,
    /// How often chitchat was started. Part of its name for us: a peer that remembers higher
    /// versions and heartbeats of an earlier start would ignore those of a new one.
    starts: u8,
    live: usize,
    crowded: bool,
}

/// What of ours chitchat holds.
#[derive(Debug, Default)]
struct Published {
    /// Revision of the roster message.
    roster: Option<u64>,
    /// Bytes of it that are still to be paid for, an interval's allowance at a time.
    owed: usize,
    shards: Shards,
}

enum State {
    Running {
        handle: ChitchatHandle,
        incoming: mpsc::Sender<(SocketAddr, ChitchatMessage)>,
        ended: Pin<Box<dyn Future<Output = Option<String>> + Send>>,
    },
    Ended {
        restart: Instant,
    },
}

/// What others have published.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) messages: Vec<(ReplicaId, Message)>,
    /// Until when the upstream of a limit wants no requests. Not for the ledger: a pause is
    /// no right, and is believed for minutes only.
    pub(crate) pauses: Vec<(LimitId, Timestamp)>,
    /// The newest wire version that each says it reads, of everybody who is known, every time: a
    /// replica may become a peer after it was first heard of.
    pub(crate) versions: BTreeMap<ReplicaId, u8>,
}

/// What chitchat did.
#[derive(Debug)]
pub(crate) enum Event {
    /// It wants these bytes sent to this address.
    Send(SocketAddr, Vec<u8>),
    /// It ended, for this reason, and will be started again.
    Ended(String),
    /// It was started again.
    Started,
}

impl Membership {
    /// Starts chitchat.
    pub(crate) async fn start(identity: Identity, interval: Duration) -> Self {
        let (outgoing, sent) = mpsc::channel(QUEUE);
        let mut membership = Self {
            identity,
            interval: interval * INTERVALS,
            outgoing,
            sent,
            state: State::Ended { restart: Instant::now() },
            read: BTreeMap::new(),
            published: Published::default(),
            greeted: 0,
            starts: 0,
            live: 0,
            crowded: false,
        };
        membership.restart().await;
        membership
    }

    /// Returns whether chitchat runs.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Returns how many other replicas chitchat takes for alive: to be shown, not counted.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// Waits for something to do.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, nothing was taken; a restart under way begins again.
    pub(crate) async fn next(&mut self) -> Event {
        match &mut self.state {
            State::Running { ended, .. } => {
                let why = tokio::select! {
                    biased;
                    why = ended => why,
                    Some((to, bytes)) = self.sent.recv() => return Event::Send(to, bytes),
                };
                self.stop();
                Event::Ended(match std::mem::take(&mut self.crowded) {
                    true => format!("it knows more than {MAX_MEMBERS} replicas, alive or dead"),
                    false => why.unwrap_or_else(|| "it was shut down".into()),
                })
            }
            State::Ended { restart } => {
                tokio::time::sleep_until(*restart).await;
                self.restart().await;
                Event::Started
            }
        }
    }

    /// Returns bytes that chitchat has wanted sent, without waiting.
    pub(crate) fn try_next(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.sent.try_recv().ok()
    }

    /// Hands chitchat a message that came in an authenticated frame.
    ///
    /// Returns whether it was one; a message too many is dropped, as a network would.
    pub(crate) fn receive(&mut self, from: SocketAddr, bytes: &[u8]) -> bool {
        let Some(message) = decode(bytes) else {
            return false;
        };
        if let State::Running { incoming, .. } = &self.state {
            let _ = incoming.try_send((from, message));
        }
        true
    }

    /// Exchanges values: publishes ours, returns what others have published since the last
    /// time, and greets a peer that chitchat may not know.
    ///
    /// Called once every [`INTERVALS`] ticks. If chitchat is busy this very moment nothing
    /// happens; the next call makes up for it.
    pub(crate) fn exchange(
        &mut self,
        roster: &RosterMessage,
        rows: &[Row],
        pauses: &[(LimitId, Timestamp)],
        peers: &[(ReplicaId, SocketAddr)],
    ) -> Heard {
        let State::Running { handle, .. } = &self.state else {
            return Heard::default();
        };
        if let Some((_, addr)) = peers.get(self.greeted % peers.len().max(1)) {
            // chitchat has no list of seeds here: the roster finds peers, this tells it.
            let _ = handle.gossip(*addr);
            self.greeted = self.greeted.wrapping_add(1);
        }
        let chitchat = handle.chitchat();
        let Ok(mut chitchat) = chitchat.try_lock() else {
            return Heard::default();
        };
        let allowance = shards::allowance(self.interval, peers.len());
        publish(&mut chitchat, roster, rows, allowance, &mut self.published);
        chitchat.self_node_state().set(PAUSES, pauses_value(pauses));
        let heard = collect(&chitchat, &self.identity, &mut self.read);
        self.live = chitchat.live_nodes().count().saturating_sub(1);
        self.crowded = chitchat.node_states().len() > MAX_MEMBERS;
        drop(chitchat);
        if self.crowded {
            // A fresh start knows nobody, so the dead are shed first. `next` reports it.
            handle.abort();
        }
        heard
    }

    fn stop(&mut self) {
        if let State::Running { handle, .. } = &self.state {
            handle.abort();
        }
        self.live = 0;
        self.state = State::Ended { restart: Instant::now() + RESTART_AFTER };
    }

    async fn restart(&mut self) {
        let (incoming, received) = mpsc::channel(QUEUE);
        let transport = Channels { sent: self.outgoing.clone(), received: Mutex::new(Some(received)) };
        self.starts = self.starts.wrapping_add(1);
        self.read.clear();
        self.published = Published::default();
        match spawn_chitchat(self.config(), self.metadata(), &transport).await {
            Ok(handle) => {
                let watcher = handle.termination_watcher();
                let ended = Box::pin(async move { watcher.await.err().map(|error| error.to_string()) });
                self.state = State::Running { handle, incoming, ended };
            }
            // Opening our channels cannot fail; were it to, trying again is all there is.
            Err(_) => self.state = State::Ended { restart: Instant::now() + RESTART_AFTER },
        }
    }

    fn config(&self) -> ChitchatConfig {
        let failure_detector_config = FailureDetectorConfig {
            phi_threshold: 8.0,
            // The default of 5 s would take a crashed newcomer for alive for 20 s.
            initial_interval: self.interval * 2,
            dead_node_grace_period: DEAD_FOR,
            ..FailureDetectorConfig::default()
        };
        ChitchatConfig {
            chitchat_id: chitchat_id(self.identity.me, self.starts, self.identity.slot.addr),
            cluster_id: self.identity.cluster.clone(),
            gossip_interval: self.interval,
            listen_addr: self.identity.slot.addr,
            seed_nodes: Vec::new(),
            failure_detector_config,
            marked_for_deletion_grace_period: DEAD_FOR,
            catchup_callback: None,
            extra_liveness_predicate: None,
        }
    }

    fn metadata(&self) -> Vec<(String, String)> {
        vec![("node".into(), self.identity.slot.node.to_string()), (WIRE.into(), self.identity.wire.to_string())]
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership")
            .field("identity", &self.identity)
            .field("running", &self.is_running())
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

/// Writes what changed into our own values, as far as this interval's allowance goes: one for
/// rows, and as much again for the roster.
fn publish(chitchat: &mut Chitchat, roster: &RosterMessage, rows: &[Row], allowance: usize, published: &mut Published) {
    let own = chitchat.self_node_state();
    published.owed = published.owed.saturating_sub(allowance);
    // Not whenever `seen` changes: every join would then be told by everybody to everybody.
    if published.roster != Some(roster.revision) && published.owed == 0 {
        published.roster = Some(roster.revision);
        let mut bytes = Vec::new();
        let message = Message::Roster(Arc::new(roster.clone()));
        // Third replicas pass it on, so it is of the version that everybody reads.
        wire::encode(OLDEST_WIRE_VERSION, roster.from, [&message], &mut bytes);
        let text = text::encode(&bytes);
        if text.len() <= MAX_ROSTER_VALUE {
            published.owed = text.len();
            own.set(ROSTER, text);
        }
    }
    for (shard, value) in published.shards.publish(rows, allowance) {
        own.set(shards::name(shard), value);
    }
}

/// Returns the value of `pauses`: for each limit its id and the end, 8 bytes each.
fn pauses_value(pauses: &[(LimitId, Timestamp)]) -> String {
    let mut pauses = pauses.to_vec();
    pauses.sort_by_key(|(limit, until)| (std::cmp::Reverse(*until), *limit));
    pauses.truncate(MAX_PAUSES);
    let words = pauses.iter().flat_map(|(limit, until)| [limit.bits(), until.unix_ms()]);
    text::encode(&words.flat_map(u64::to_le_bytes).collect::<Vec<_>>())
}

/// Returns the pauses of a value; one that is not whole has none.
fn pauses(value: &str) -> Vec<(LimitId, Timestamp)> {
    let bytes = text::decode(value).filter(|bytes| bytes.len().is_multiple_of(16) && bytes.len() <= 16 * MAX_PAUSES);
    let bytes = bytes.unwrap_or_default();
    let (words, _) = bytes.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    words.chunks_exact(2).map(|pair| (LimitId::from_bits(pair[0]), Timestamp::from_unix_ms(pair[1]))).collect()
}

/// Returns what others have published since `read`.
fn collect(chitchat: &Chitchat, us: &Identity, read: &mut BTreeMap<ChitchatId, u64>) -> Heard {
    let mut heard = Heard::default();
    let mut still = BTreeMap::new();
    for (id, state) in chitchat.node_states() {
        let Some(from) = replica_id(id).filter(|from| *from != us.me) else {
            continue;
        };
        if let Some(announced) = state.get(WIRE) {
            let version = announced.parse().unwrap_or(OLDEST_WIRE_VERSION);
            // Each start of its chitchat says it: where they differ somebody lies, and is left
            // with making us write what everybody reads.
            heard.versions.entry(from).and_modify(|known| *known = version.min(*known)).or_insert(version);
        }
        let before = read.get(id).copied().unwrap_or(0);
        still.insert(id.clone(), state.max_version());
        if state.max_version() == before {
            continue;
        }
        // A reset can take versions back; then all is read again, which changes nothing.
        let since = if state.max_version() < before { 0 } else { before };
        let changed = state.key_values_including_deleted().filter(|(_, value)| value.version > since);
        for (key, value) in changed {
            if key == ROSTER || shards::is_shard(key) {
                heard.messages.extend(messages(from, us.wire, &value.value).into_iter().map(|message| (from, message)));
            } else if key == PAUSES {
                heard.pauses.extend(pauses(&value.value));
            }
        }
    }
    // Whoever chitchat has forgotten is forgotten here.
    *read = still;
    heard
}

/// Returns what a value of `from` says about `from`; everything else in it is ignored.
///
/// A value does not say of which version it is, and need not: no row of one is a row of the
/// other. The next release may write its oldest, which is our newest.
fn messages(from: ReplicaId, newest: u8, value: &str) -> Vec<Message> {
    let Some(bytes) = text::decode(value) else {
        return Vec::new();
    };
    let mut versions = OLDEST_WIRE_VERSION..=newest;
    let mut messages = versions.find_map(|version| wire::decode(version, from, &bytes).ok()).unwrap_or_default();
    messages.retain(|message| match message {
        Message::Row(row) => row.replica == from,
        Message::Roster(roster) => roster.from == from,
        Message::Request(_) => false,
    });
    messages
}

/// The high half of a replica's id, its start time among it, is the generation, the low half
/// and the number of the start the node id: 18 bytes of the digest in place of 34.
fn chitchat_id(me: ReplicaId, starts: u8, addr: SocketAddr) -> ChitchatId {
    let (high, low) = ((me.bits() >> 64) as u64, me.bits() as u64);
    ChitchatId::new(format!("{low:016x}{starts:02x}"), high, addr)
}

fn replica_id(id: &ChitchatId) -> Option<ReplicaId> {
    let low = u64::from_str_radix(id.node_id.get(..16)?, 16).ok()?;
    Some(ReplicaId::from_bits((u128::from(id.generation_id) << 64) | u128::from(low)))
}

/// Decodes with chitchat's own codec. Whoever sealed the bytes holds the cluster key, but a
/// bug there must not be a panic here: the codec asserts and underflows in places.
fn decode(bytes: &[u8]) -> Option<ChitchatMessage> {
    let decoded = catch_unwind(AssertUnwindSafe(|| {
        let mut rest = bytes;
        let message = ChitchatMessage::deserialize(&mut rest).ok()?;
        rest.is_empty().then_some(message)
    }));
    decoded.ok().flatten()
}

/// chitchat's transport: two queues, whose other ends the cluster loop holds.
struct Channels {
    sent: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    received: Mutex<Option<mpsc::Receiver<(SocketAddr, ChitchatMessage)>>>,
}

#[async_trait]
impl Transport for Channels {
    async fn open(&self, _: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let received = self.received.lock().map_or(None, |mut received| received.take());
        let received = received.ok_or_else(|| anyhow::anyhow!("the channels are open already"))?;
        Ok(Box::new(Channel { sent: self.sent.clone(), received }))
    }
}

struct Channel {
    sent: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    received: mpsc::Receiver<(SocketAddr, ChitchatMessage)>,
}

#[async_trait]
impl Socket for Channel {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        // A full queue loses the message, as a network would: chitchat must not wait for us.
        let _ = self.sent.try_send((to, message.serialize_to_vec()));
        Ok(())
    }

    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        self.received.recv().await.ok_or_else(|| anyhow::anyhow!("the cluster loop is gone"))
    }
}

const WIRE: &str = "wire";

const ROSTER: &str = "roster";

const PAUSES: &str = "pauses";

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;

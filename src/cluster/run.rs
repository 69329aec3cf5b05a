//! The one loop of a pod's gossip.
//!
//! Knows when each part has something to do, and moves what comes out of one into the next.
//! Must not know what any of it means. The invariant it keeps: a tick is never late by more
//! than one bounded batch of datagrams; and when the loop ends, whatever ended it, the
//! limiter has stopped admitting before the port is free.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Shared;
use super::complaints::Complaints;
use super::discovery::{Answer, Asking, Unanswered};
use super::events;
use super::fragment::{self, Kind};
use super::frame::{Frames, KeyRing, MAX_DATAGRAM, Nonce, Rejected};
use super::inbox::{Content, Inbox};
use super::lasting::{Lasting, Matter};
use super::membership::{Event, INTERVALS, Membership};
use super::outbox::{Outbox, Parcel};
use super::socket::{Datagrams, Net};
use crate::ledger::{Contact, Message, Target};
use crate::limiter::Limiter;

/// The most datagrams taken before the clock is looked at again: at 10 us each a tick is
/// less than a millisecond late.
const BATCH: usize = 64;

/// The most messages that are packed at once; what is left follows in the next round.
const PACK: usize = 1_024;

/// The most addresses whose frames are remembered as thrown away, for an exchange: any stranger can
/// send from another port.
const MAX_REJECTED: usize = 1_024;

/// After this many ticks in a row in which receiving failed, the socket is lost.
const LOST_AFTER: u32 = 16;

/// What the owner of a cluster asks of its loop.
#[derive(Debug)]
pub(crate) enum Command {
    /// Admit nothing more and hand rights over, until told to leave.
    HandOver,
    /// Leave, then say so.
    Leave(oneshot::Sender<()>),
}

/// What a loop is made of.
pub(crate) struct Parts<N: Net> {
    pub(crate) limiter: Limiter,
    pub(crate) interval: Duration,
    pub(crate) outbox: Outbox,
    pub(crate) advertise: SocketAddr,
    pub(crate) socket: N::Socket,
    pub(crate) frames: Frames,
    pub(crate) inbox: Inbox,
    pub(crate) membership: Membership,
    pub(crate) asking: Asking,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) keys: watch::Receiver<KeyRing>,
    pub(crate) shared: Arc<Shared>,
}

/// The loop, and what it remembers from one round to the next.
pub(crate) struct Run<N: Net> {
    parts: Parts<N>,
    nonces: Nonces,
    blockers: Lasting,
    silences: Lasting,
    /// Where frames came from that were thrown away since the last exchange, and why.
    rejected: BTreeMap<SocketAddr, &'static str>,
    /// It has not had its share yet, and is not leaving. Once it has, whatever takes it from it is said on its own.
    awaits_share: bool,
    complaints: Complaints,
    next_tick: Instant,
    ticks: u32,
    /// Who waits for us to have left; `Some` once we are to go as soon as we have.
    leaving: Option<Vec<oneshot::Sender<()>>>,
    /// Receiving failed in this tick: it is tried again in the next.
    deaf: bool,
    /// Ticks in a row in which it failed.
    deaf_for: u32,
    buffer: Box<[u8]>,
}

/// Why the loop woke up.
enum Wake {
    Command(Option<Command>),
    Keys,
    Work,
    Deadline,
    Directory(Result<Answer, Unanswered>),
    Membership(Event),
    Datagram(io::Result<(usize, SocketAddr)>),
}

impl<N: Net> Run<N> {
    pub(crate) fn new(parts: Parts<N>) -> Self {
        Self {
            parts,
            nonces: Nonces::new(),
            blockers: Lasting::of(Matter::Share),
            silences: Lasting::of(Matter::Peer),
            rejected: BTreeMap::new(),
            awaits_share: true,
            complaints: Complaints::default(),
            next_tick: Instant::now(),
            ticks: 0,
            leaving: None,
            deaf: false,
            deaf_for: 0,
            // One byte more than a frame may have, so that a longer one is seen to be longer.
            buffer: vec![0; MAX_DATAGRAM + 1].into(),
        }
    }

    /// Runs until this pod has left, its socket is lost or the [`Cluster`](super::Cluster) is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            if Instant::now() >= self.next_tick {
                self.tick().await;
                if self.has_left() || self.is_lost() {
                    return;
                }
            }
            match self.wake().await {
                Wake::Command(Some(Command::HandOver)) => self.hand_over(),
                Wake::Command(Some(Command::Leave(done))) => self.leave(done),
                Wake::Command(None) => return,
                Wake::Keys => self.rekey(),
                Wake::Work => {}
                Wake::Deadline => self.parts.limiter.with_ledger(|ledger, now| ledger.handle_timeout(now)),
                Wake::Directory(answer) => self.directory(answer),
                Wake::Membership(event) => self.membership(event).await,
                Wake::Datagram(datagram) => self.receive(Some(datagram)),
            }
            // Whatever woke us, what has arrived is taken: no branch can starve it.
            self.receive(None);
            self.flush().await;
        }
    }

    /// Waits for the next thing to do. Datagrams come last in the order: all others are rare,
    /// so they cannot starve them, and a burst of datagrams cannot starve the others.
    async fn wake(&mut self) -> Wake {
        let deadline = self.deadline();
        let Self { parts, buffer, deaf, .. } = self;
        tokio::select! {
            biased;
            command = parts.commands.recv() => Wake::Command(command),
            Ok(()) = parts.keys.changed() => Wake::Keys,
            () = poll_fn(|cx| parts.limiter.poll_work(cx)) => Wake::Work,
            () = tokio::time::sleep_until(deadline) => Wake::Deadline,
            answer = parts.asking.next(|| parts.limiter.now()) => Wake::Directory(answer),
            event = parts.membership.next() => Wake::Membership(event),
            datagram = parts.socket.recv_from(buffer), if !*deaf => Wake::Datagram(datagram),
        }
    }

    fn deadline(&self) -> Instant {
        let wait = self.parts.limiter.with_ledger(|ledger, now| ledger.poll_timeout().map(|at| at.since(now)));
        wait.map_or(self.next_tick, |wait| self.next_tick.min(Instant::now() + wait))
    }

    async fn tick(&mut self) {
        let now = Instant::now();
        self.next_tick += self.parts.interval;
        if self.next_tick <= now {
            // We slept through some: what is lost is lost, hurrying makes nothing fresher.
            self.next_tick = now + self.parts.interval;
        }
        self.ticks = self.ticks.wrapping_add(1);
        self.deaf_for = if self.deaf { self.deaf_for + 1 } else { 0 };
        self.deaf = false;
        self.parts.limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
        if self.ticks.is_multiple_of(INTERVALS) {
            self.exchange();
            let (looks, limiter) = (self.awaits_share, &self.parts.limiter);
            let rejected = std::mem::take(&mut self.rejected);
            let (blocked, silent, has_share) = limiter.with_ledger(|ledger, now| {
                ledger.handle_rejected(rejected, now);
                (ledger.blocked(now), ledger.silent(now), looks && ledger.has_share(now))
            });
            self.blockers.look(blocked, now);
            self.silences.look(silent, now);
            if has_share {
                self.awaits_share = false;
                info!(event = "share_received", "has its share of every window that runs");
            }
        }
        self.flush().await;
        // A peer that came by in this tick is greeted in it.
        self.refresh_peers();
        let heartbeats = self.parts.outbox.tick();
        self.send(heartbeats).await;
        for _ in 0..BATCH {
            let Some((to, bytes)) = self.parts.membership.try_next() else { break };
            let parcels = self.parts.outbox.pack_chitchat(to, &bytes);
            self.send(parcels).await;
        }
        let (peers, running) = (self.parts.membership.live(), self.parts.membership.is_running());
        let healthy = running && self.deaf_for == 0;
        let unsent = self.parts.outbox.unsent();
        self.parts.shared.with(|stats| {
            (stats.peers, stats.healthy, stats.messages_unsent) = (peers, healthy, unsent);
        });
    }

    /// Exchanges values with chitchat.
    fn exchange(&mut self) {
        let limiter = &self.parts.limiter;
        let (roster, rows, peers) =
            limiter.with_ledger(|ledger, _| (ledger.roster_message(), ledger.own_rows(), ledger.peers()));
        let heard = self.parts.membership.exchange(&roster, &rows, &limiter.own_pauses(), &peers);
        self.parts.outbox.set_versions(heard.versions);
        heard.pauses.into_iter().for_each(|(limit, until)| limiter.hear_pause(limit, until));
        if !heard.messages.is_empty() {
            limiter.with_ledger(|ledger, now| {
                heard.messages.into_iter().for_each(|(from, message)| ledger.handle_message(from, message, now));
            });
        }
    }

    fn directory(&mut self, answer: Result<Answer, Unanswered>) {
        let Answer { listed, gone } = match answer {
            Ok(answer) => answer,
            Err(error) => {
                debug!(%error, "the directory gave no answer");
                let Unanswered { why, resolve } = error;
                self.parts.limiter.with_ledger(|ledger, now| ledger.handle_no_listing(why, resolve, now));
                return;
            }
        };
        let advertise = self.parts.advertise;
        let settled = self.parts.limiter.with_ledger(|ledger, now| {
            if let Some(addrs) = &listed {
                ledger.handle_listing(addrs, now);
            }
            // What is listed is read first: whoever is not listed and gone will not be waited for.
            ledger.handle_gone(&gone, now);
            listed.is_some_and(|addrs| addrs.contains(&advertise)) && ledger.unresolved().is_empty()
        });
        if settled {
            self.parts.asking.settled();
        }
    }

    async fn membership(&mut self, event: Event) {
        match event {
            Event::Send(to, bytes) => {
                let parcels = self.parts.outbox.pack_chitchat(to, &bytes);
                self.send(parcels).await;
            }
            Event::Ended(why) => {
                warn!(event = "failure_detector_restarted", %why, "the failure detector ended; it is started again");
                self.parts.shared.with(|stats| stats.healthy = false);
            }
            Event::Started => self.parts.shared.with(|stats| stats.membership_restarts += 1),
        }
    }

    /// Takes a datagram, if one is given, and what else has arrived, up to a bound.
    fn receive(&mut self, first: Option<io::Result<(usize, SocketAddr)>>) {
        let mut heard: Vec<(Contact, Vec<Message>)> = Vec::new();
        let mut next = first;
        for _ in 0..BATCH {
            if self.deaf {
                break;
            }
            let datagram = next.take().unwrap_or_else(|| self.parts.socket.try_recv_from(&mut self.buffer));
            match datagram {
                Ok((length, from)) => heard.extend(self.open(length, from)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    debug!(%error, "receiving failed");
                    self.deaf = true;
                }
            }
        }
        if heard.is_empty() {
            return;
        }
        self.parts.limiter.with_ledger(|ledger, now| {
            for (contact, messages) in heard {
                ledger.handle_contact(contact, now);
                messages.into_iter().for_each(|message| ledger.handle_message(contact.from, message, now));
            }
        });
    }

    /// Opens a datagram; counts it, whatever it is. Nothing is ever sent because of one that
    /// could not be opened.
    fn open(&mut self, length: usize, from: SocketAddr) -> Option<(Contact, Vec<Message>)> {
        let datagram = &mut self.buffer[..length];
        let received = self.parts.inbox.receive(datagram, self.parts.limiter.now()).and_then(|received| {
            let messages = match received.content {
                Content::Nothing => Vec::new(),
                Content::Messages(messages) => messages,
                Content::Chitchat(bytes) if self.parts.membership.receive(from, &bytes) => Vec::new(),
                Content::Chitchat(_) => return Err(Rejected::Payload),
            };
            Ok((received.contact, received.kind, messages))
        });
        self.parts.shared.with(|stats| match &received {
            Ok((_, kind, _)) => {
                stats.frames_received += 1;
                stats.bytes_received += length as u64;
                if *kind == Some(Kind::Chitchat) {
                    stats.chitchat_frames_received += 1;
                    stats.chitchat_bytes_received += length as u64;
                }
            }
            Err(rejected) => *stats.frames_rejected.entry(rejected.reason()).or_default() += 1,
        });
        if let Err(rejected) = &received {
            if let Some(why) = rejected.apart().filter(|_| self.rejected.len() < MAX_REJECTED) {
                self.rejected.insert(from, why);
            }
            // A wrong key must not be silent, and a flood must not fill the log.
            match self.complaints.note(rejected.reason(), Instant::now()) {
                Some(times) => {
                    let event = "frame_rejected";
                    warn!(event, %from, %rejected, times, "a frame was thrown away; counted, and said once a minute");
                }
                None => debug!(%from, %rejected, "a frame was thrown away"),
            }
        }
        let (contact, _, messages) = received.ok()?;
        self.parts.outbox.heard(contact.from, contact.sent_at);
        Some((contact, messages))
    }

    /// Sends what the ledger wants sent, and logs what it wants known.
    async fn flush(&mut self) {
        loop {
            let outbox = &mut self.parts.outbox;
            let (transmits, notes) = self.parts.limiter.with_ledger(|ledger, _| {
                let transmits: Vec<_> = std::iter::from_fn(|| ledger.poll_transmit()).take(PACK).collect();
                let notes: Vec<_> = std::iter::from_fn(|| ledger.poll_note()).take(PACK).collect();
                if !transmits.is_empty() {
                    outbox.set_peers(&ledger.peers());
                }
                for transmit in &transmits {
                    if let Target::Replica(id) = transmit.to {
                        outbox.set_address(id, || ledger.address_of(id));
                    }
                }
                (transmits, notes)
            });
            for note in notes {
                events::say(&note);
            }
            if transmits.is_empty() {
                return;
            }
            let last = transmits.len() < PACK;
            let parcels = self.parts.outbox.pack(transmits);
            self.send(parcels).await;
            if last {
                return;
            }
        }
    }

    fn refresh_peers(&mut self) {
        let peers = self.parts.limiter.with_ledger(|ledger, _| ledger.peers());
        self.parts.outbox.set_peers(&peers);
    }

    async fn send(&mut self, parcels: Vec<Parcel>) {
        for parcel in parcels {
            let chitchats = fragment::kind(&parcel.payload) == Some(Kind::Chitchat);
            let sent = match self.nonces.next() {
                Ok(nonce) => {
                    let frame = parcel.seal(&self.parts.frames, self.parts.limiter.now(), nonce);
                    debug_assert!(frame.len() <= MAX_DATAGRAM, "{} bytes in one datagram", frame.len());
                    self.parts.socket.send_to(&frame, parcel.to).await.map(|()| frame.len())
                }
                Err(error) => Err(error),
            };
            self.parts.shared.with(|stats| match &sent {
                Ok(length) => {
                    stats.frames_sent += 1;
                    stats.bytes_sent += *length as u64;
                    if chitchats {
                        stats.chitchat_frames_sent += 1;
                        stats.chitchat_bytes_sent += *length as u64;
                    }
                }
                Err(_) => stats.frames_unsent += 1,
            });
            if let Err(error) = sent {
                debug!(to = %parcel.to, %error, "sending failed");
            }
        }
    }

    fn rekey(&mut self) {
        let keys = self.parts.keys.borrow_and_update().clone();
        info!(event = "key_rotated", ?keys, "the keys of the fleet changed: the first one seals, all of them open");
        self.parts.frames.rekey(keys.clone());
        self.parts.inbox.rekey(keys);
    }

    fn hand_over(&mut self) {
        // Windows that begin from now on are its own no more.
        self.awaits_share = false;
        self.parts.limiter.with_ledger(|ledger, now| ledger.leave(now));
    }

    fn leave(&mut self, done: oneshot::Sender<()>) {
        match &mut self.leaving {
            Some(waiting) => waiting.push(done),
            None => {
                self.hand_over();
                self.leaving = Some(vec![done]);
            }
        }
    }

    fn has_left(&mut self) -> bool {
        // Looked at after a tick, so that everybody was told at least once.
        self.leaving.is_some() && self.parts.limiter.with_ledger(|ledger, now| ledger.has_left(now))
    }

    fn is_lost(&self) -> bool {
        let lost = self.deaf_for >= LOST_AFTER;
        if lost {
            warn!(event = "gossip_lost", "the gossip socket is lost; this pod stops admitting");
        }
        lost
    }
}

impl<N: Net> Drop for Run<N> {
    /// Stops admitting. The socket is a field, so it is closed after this.
    fn drop(&mut self) {
        self.parts.shared.with(|stats| (stats.healthy, stats.peers) = (false, 0));
        // The loop may be ending because of a panic, with the ledger's lock poisoned.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            self.parts.limiter.with_ledger(|ledger, now| ledger.leave(now));
            self.parts.limiter.detach();
        }));
        for waiting in self.leaving.take().into_iter().flatten() {
            let _ = waiting.send(());
        }
    }
}

/// Random nonces, fetched 64 at a time: one system call a frame would cost as much as its seal.
struct Nonces {
    ahead: [Nonce; 64],
    left: usize,
}

impl Nonces {
    fn new() -> Self {
        Self { ahead: [[0; 24]; 64], left: 0 }
    }

    fn next(&mut self) -> io::Result<Nonce> {
        if self.left == 0 {
            getrandom::fill(self.ahead.as_flattened_mut()).map_err(io::Error::other)?;
            self.left = self.ahead.len();
        }
        self.left -= 1;
        Ok(self.ahead[self.left])
    }
}

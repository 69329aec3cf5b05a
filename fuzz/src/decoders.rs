//! The decoders of what comes from outside, over the network and in files, each with what must hold of any bytes.
//!
//! Knows how bytes become something. Must not know where they came from: the fuzzer makes them
//! up, `tests/corpus.rs` reads and changes those that it kept. The invariant of every function:
//! it returns.

use bytes::Bytes;
use quotum::cluster::KeyRing;
use quotum::cluster::fragment::{Assembled, Assembler, MAX_SPLIT};
use quotum::cluster::frame::{Frames, MAX_PAYLOAD};
use quotum::cluster::inbox::{Content, Inbox};
use quotum::cluster::wire::{self, OLDEST_WIRE_VERSION, WIRE_VERSION};
use quotum::layer::{
    AnthropicMessages, Dialect, OpenAiChat, OpenAiCompletions, OpenAiEmbeddings, OpenAiResponses, Report,
};
use quotum::ledger::{Contact, Directory, Gone, Message, ReplicaId, RosterSettings, Slot, Timestamp};
use quotum::{Claim, Clock, Limiter, Quota};

const NOW: Timestamp = Timestamp::from_unix_ms(1_763_856_065_000);
const US: ReplicaId = ReplicaId::from_bits(1 << 80);
const PEER: ReplicaId = ReplicaId::from_bits(2 << 80);

/// The key with which the corpus is sealed.
pub fn keys() -> KeyRing {
    KeyRing::of([1; 32])
}

/// A datagram as it arrives, and then the same bytes as a payload that a key holder sealed: the
/// second reaches what lies behind the seal.
pub fn frame(bytes: &[u8]) {
    let mut inbox = Inbox::new(Frames::new(keys(), "test", US));
    let opened = inbox.receive(&mut bytes.to_vec(), NOW);
    if let Ok(received) = opened {
        assert_ne!(received.contact.from, US, "nobody else is us");
    }
    let payload = &bytes[..bytes.len().min(MAX_PAYLOAD)];
    for version in OLDEST_WIRE_VERSION..=WIRE_VERSION {
        let mut sealed = Frames::new(keys(), "test", PEER).seal(version, Some(US), NOW, None, [7; 24], payload);
        if let Ok(received) = inbox.receive(&mut sealed, NOW) {
            assert_eq!(received.contact, Contact { from: PEER, sent_at: NOW, echo: None });
            if let Content::Messages(messages) = received.content {
                assert!(!payload.is_empty() || messages.is_empty());
            }
        }
    }
}

/// Payloads of several senders, one after another: each is a byte of who and of which version,
/// two of how long, and itself. What comes out is never longer than what can be sent.
pub fn fragment(bytes: &[u8]) {
    let (mut assembler, mut rest, mut now) = (Assembler::default(), bytes, NOW);
    while let Some(([who, high, low], behind)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(behind.len());
        let (payload, left) = behind.split_at(length);
        rest = left;
        now = now.next();
        let (from, version) = (ReplicaId::from_bits((who & 0x7f).into()), OLDEST_WIRE_VERSION + (who >> 7));
        if let Ok(Assembled::Whole(_, whole)) = assembler.accept(from, version, payload, now) {
            assert!(whole.len() <= MAX_SPLIT.max(payload.len()));
        }
    }
}

/// A clock that stands still.
struct Still;

impl Clock for Still {
    fn now(&self) -> Timestamp {
        NOW
    }
}

/// Messages of a key holder, in each version: rows, requests for rights, rosters. What is
/// understood is written again in the same bytes, or in the other version with the same
/// meaning, and a ledger that hears it goes on. That it may lie, and what that costs, is in
/// SECURITY.md.
pub fn row(bytes: &[u8]) {
    for version in OLDEST_WIRE_VERSION..=WIRE_VERSION {
        let Ok(messages) = wire::decode(version, PEER, bytes) else { continue };
        for other in OLDEST_WIRE_VERSION..=WIRE_VERSION {
            let mut again = Vec::new();
            wire::encode(other, PEER, &messages, &mut again);
            assert_eq!(wire::decode(other, PEER, &again).as_ref(), Ok(&messages));
            assert!(other != version || again == bytes);
        }
        hear(messages);
    }
}

fn hear(messages: Vec<Message>) {
    let quota = Quota::tokens(100).per_minute();
    let Ok(limiter) = Limiter::builder().clock(Still).deployment("gpt", [quota]).build() else { return };
    let slot = Slot { node: "us".into(), addr: ([10, 0, 0, 1], 7946).into(), exclusive: true };
    let settings = RosterSettings { directory: Directory::Name, ..RosterSettings::default() };
    limiter.attach(US, slot, settings, std::time::Duration::from_millis(100)).expect("it joins once");
    limiter.with_ledger(|ledger, now| {
        ledger.handle_contact(Contact { from: PEER, sent_at: NOW, echo: Some(NOW) }, now);
        messages.into_iter().for_each(|message| ledger.handle_message(PEER, message, now));
        ledger.handle_tick(now);
        while ledger.poll_transmit().is_some() {}
    });
    let _ = limiter.status();
    let Ok(handle) = limiter.handle("gpt") else { return };
    for _ in 0..5 {
        let Ok(mut permit) = handle.try_acquire(Claim::tokens(30)) else { break };
        permit.start();
        permit.settle(40);
    }
    limiter.with_ledger(|ledger, now| ledger.handle_tick(now));
}

/// A request or an answer of an API, whole or one event of a stream.
pub fn usage(bytes: &[u8]) {
    let dialects: [&dyn Dialect; 5] =
        [&OpenAiChat, &OpenAiCompletions, &OpenAiEmbeddings, &OpenAiResponses, &AnthropicMessages];
    for dialect in dialects {
        let event = dialect.event(bytes);
        let _ = dialect.text_bytes(bytes);
        for report in [dialect.report(bytes), event.report] {
            let Report::Told(tally) = report else { continue };
            if let Some(usage) = tally.usage() {
                assert!(usage.cached <= usage.prompt && usage.total >= usage.completion);
            }
        }
        if let Ok(call) = dialect.call(Bytes::copy_from_slice(bytes)) {
            assert!(call.choices > 0 && !call.body.is_empty());
        }
    }
}

/// A config file, ours or LiteLLM's: understood or refused with a place, and shown without secrets.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // It may name files, and some of those of a machine never end.
    if text.contains("/dev") || text.contains("/proc") || text.contains("/sys") {
        return;
    }
    match quotum::config::parse(text, "fuzz.yaml", &|_| None, &quotum::config::Flags::default()) {
        Ok(config) => assert!(!config.deployments.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// An API server's list of pods, and the lines of a watch: a proof names an address that a pod had, and an instant.
pub fn kube(bytes: &[u8]) {
    let answer = quotum::cluster::discovery::kube::read(bytes, 7946);
    assert!(answer.listed.iter().flatten().all(|addr| addr.port() == 7946));
    for gone in answer.gone {
        let Gone::Address { addr, started_by } = gone else { panic!("an API server knows no ids of replicas") };
        assert!(addr.port() == 7946 && started_by.unix_ms() > 0);
    }
}

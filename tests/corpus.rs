//! What the fuzzer found worth keeping, replayed, and changed a little at random: no decoder of
//! anything from outside panics, hangs or believes what cannot be.

#![cfg(all(feature = "server", feature = "kube"))]
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

#[allow(dead_code, unreachable_pub, reason = "the fuzzer uses the rest")]
#[path = "../fuzz/src/decoders.rs"]
mod decoders;

/// How many changed inputs each target is given.
const CHANGED: u32 = 2_000;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 10, "{} has hardly anything in it", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// One change, as a fuzzer makes them.
#[derive(Clone, Debug)]
enum Change {
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Repeat(prop::sample::Index, prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        1 => index().prop_map(Change::Cut),
        1 => (index(), index()).prop_map(|(from, to)| Change::Repeat(from, to)),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            break;
        }
        match change {
            Change::Set(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Change::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Change::Repeat(from, to) => {
                let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
                bytes.extend_from_within(from.min(to)..from.max(to));
            }
            Change::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
        }
    }
    bytes
}

fn attack(target: &str, decode: fn(&[u8])) {
    let corpus = corpus(target);
    corpus.iter().for_each(|bytes| decode(bytes));
    let config = Config { cases: CHANGED, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let inputs = (any::<prop::sample::Index>(), prop::collection::vec(change(), 1..8));
    let result = runner.run(&inputs, |(which, changes)| {
        decode(&changed(which.get(&corpus).clone(), &changes));
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{target}: {error}"));
}

#[test]
fn any_datagram_is_opened_or_counted() {
    attack("frame", decoders::frame);
}

#[test]
fn any_fragments_are_put_together_or_dropped() {
    attack("fragment", decoders::fragment);
}

#[test]
fn any_messages_of_a_key_holder_are_read_or_refused() {
    attack("row", decoders::row);
}

#[test]
fn any_config_file_is_understood_or_refused() {
    attack("config", decoders::config);
}

#[test]
fn any_word_of_an_api_server_is_a_listing_or_a_proof_or_nothing() {
    attack("kube", decoders::kube);
}

#[test]
fn any_answer_of_an_upstream_is_understood_or_not_believed() {
    attack("usage", decoders::usage);
}

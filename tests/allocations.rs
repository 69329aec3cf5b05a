//! A hit allocates nothing, and the test would notice if it did.
//!
//! Allocations are counted for each thread, so tests may run side by side.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use allocation_counter::measure;
use quotum::{Claim, Handle, Limiter, Permit, Quota, Timestamp, Unit};

/// In the middle of every window: an edge would be charged to two of them, and the first
/// request of a window opens it, which allocates.
const NOON: u64 = 1_800_000_000_000 + 30_000;

/// Requests measured; one allocation in the odd request would show.
const REQUESTS: usize = 1_000;

#[derive(Debug)]
struct Stopped;

impl quotum::Clock for Stopped {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_ms(NOON)
    }
}

fn limiter() -> Limiter {
    let quotas = [Quota::tokens(1_000_000_000).per_minute(), Quota::requests(1_000_000).per_minute()];
    let limiter = Limiter::builder().clock(Stopped).deployment("one", quotas[..1].to_vec());
    let limiter = limiter.deployment("two", quotas).build().expect("the configuration is right");
    for deployment in ["one", "two"] {
        let handle = limiter.handle(deployment).expect("configured above");
        // Opens the window.
        handle.try_acquire(Claim::tokens(1)).expect("the quota is large enough").settle(1);
    }
    limiter
}

/// Returns how many allocations so many requests make.
fn allocations(deployment: &str, request: impl Fn(&Handle)) -> u64 {
    let handle = limiter().handle(deployment).expect("configured above");
    measure(|| (0..REQUESTS).for_each(|_| request(&handle))).count_total
}

fn reserve(handle: &Handle) -> Permit<'_> {
    handle.try_acquire(Claim::tokens(100)).expect("the quota is large enough")
}

#[test]
fn a_hit_that_settles_allocates_nothing() {
    assert_eq!(allocations("one", |handle| reserve(handle).settle(100)), 0);
}

#[test]
fn a_hit_with_two_claims_allocates_nothing() {
    assert_eq!(allocations("two", |handle| reserve(handle).settle(100)), 0);
}

#[test]
fn giving_back_allocates_nothing() {
    assert_eq!(allocations("two", |handle| reserve(handle).settle(60)), 0, "a settlement below the estimate");
    assert_eq!(allocations("two", |handle| reserve(handle).settle(140)), 0, "a settlement above it, covered");
    assert_eq!(allocations("two", |handle| reserve(handle).refund()), 0, "a refund");
    assert_eq!(allocations("two", |handle| drop(reserve(handle))), 0, "a permit that was dropped");
    let actual = Claim::tokens(90).with(Unit::Requests, 1);
    assert_eq!(allocations("two", |handle| reserve(handle).settle_claim(actual)), 0, "a settlement in every unit");
}

#[test]
fn an_acquire_that_hits_allocates_nothing() {
    let count = allocations("two", |handle| {
        let mut acquire = pin!(handle.acquire(Claim::tokens(100)));
        let Poll::Ready(permit) = acquire.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("a hit does not wait");
        };
        permit.expect("the quota is large enough").settle(100);
    });
    assert_eq!(count, 0);
}

#[test]
fn keeping_a_permit_beyond_its_handle_allocates_nothing() {
    assert_eq!(allocations("one", |handle| reserve(handle).into_owned().settle(100)), 0);
}

#[test]
fn the_counter_counts() {
    // A refusal tells where the limit stood, in a box: the miss may allocate.
    let handle = limiter().handle("one").expect("configured above");
    let refused = measure(|| assert!(handle.try_acquire(Claim::tokens(u64::MAX)).is_err()));
    assert!(refused.count_total > 0);
}

//! The contenders of the bench `admit`.
//!
//! Knows how each limiter is asked, with the same claim, keys and order. Must not know how
//! time is measured. The invariant it keeps: every quota admits every request of the bench,
//! and every answer is looked at, so that all of them do the work of a hit.

use std::fmt;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::RateLimiter;
use limitador::limit::{Context, Limit, Namespace};
use quotum::{Claim, Handle, Limiter, Quota};

/// Tokens asked for by one request. Small, because governor's finest quota is one token a
/// nanosecond, and every request must be admitted.
const TOKENS: u32 = 4;

/// Keys of the contenders that look one up, as deployments of one pod: they take turns.
const KEYS: usize = 64;

/// Something that admits requests.
pub struct Contender<'a> {
    name: &'static str,
    rival: Option<&'static str>,
    run: Box<dyn Fn(usize, usize) + Sync + 'a>,
}

impl<'a> Contender<'a> {
    /// Returns a contender that does `n` operations when it is called with a thread's number
    /// and `n`. It is compared with the contender of the name `rival`.
    pub fn new(name: &'static str, rival: Option<&'static str>, run: impl Fn(usize, usize) + Sync + 'a) -> Self {
        Self { name, rival, run: Box::new(run) }
    }

    /// Returns the name in the table.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the name of the contender this one is measured by, if it is measured.
    pub const fn rival(&self) -> Option<&'static str> {
        self.rival
    }

    pub(crate) fn run(&self, thread: usize, n: usize) {
        (self.run)(thread, n);
    }
}

impl fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contender").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Returns all contenders, in the order of the table.
pub fn contenders() -> Vec<Contender<'static>> {
    const DIRECT: &str = "governor `check_n`";
    const KEYED: &str = "governor keyed `check_key_n`";
    let names: Vec<String> = (0..KEYS).map(|key| format!("gpt-4o-region-{key:02}")).collect();
    vec![
        quotum_decision("quotum decision alone", DIRECT),
        quotum_settle("quotum acquire + settle", DIRECT),
        governor_direct(DIRECT),
        governor_one("governor `check`", DIRECT),
        quotum_by_key("quotum by key, acquire + settle", KEYED, names.clone()),
        quotum_owned("quotum by key, `handle()`", KEYED, names.clone()),
        governor_keyed(KEYED, names.clone()),
        limitador("limitador in-memory, by key", KEYED, names),
    ]
}

/// try_acquire; the request starts and its reservation stays charged: nothing to settle.
fn quotum_decision(name: &'static str, rival: &'static str) -> Contender<'static> {
    let handle = handle();
    Contender::new(name, Some(rival), move |_, n| {
        for _ in 0..n {
            let mut permit = handle.try_acquire(black_box(claim())).expect("the quota is large enough");
            permit.start();
            black_box(&permit); // A caller holds it.
        }
    })
}

/// try_acquire, then a settlement that uses exactly what was reserved.
fn quotum_settle(name: &'static str, rival: &'static str) -> Contender<'static> {
    let handle = handle();
    Contender::new(name, Some(rival), move |_, n| {
        for _ in 0..n {
            let permit = handle.try_acquire(black_box(claim())).expect("the quota is large enough");
            permit.settle(black_box(u64::from(TOKENS)));
        }
    })
}

/// As above, with the deployment looked up by its id first.
fn quotum_by_key(name: &'static str, rival: &'static str, names: Vec<String>) -> Contender<'static> {
    let limiter = limiter(&names);
    Contender::new(name, Some(rival), move |thread, n| {
        for name in turns(&names, thread, n) {
            let handle = limiter.get(black_box(name)).expect("it was configured");
            let permit = handle.try_acquire(black_box(claim())).expect("the quota is large enough");
            permit.settle(black_box(u64::from(TOKENS)));
        }
    })
}

/// As above, through a handle of its own: two reference counts move.
fn quotum_owned(name: &'static str, rival: &'static str, names: Vec<String>) -> Contender<'static> {
    let limiter = limiter(&names);
    Contender::new(name, Some(rival), move |thread, n| {
        for name in turns(&names, thread, n) {
            let handle = limiter.handle(black_box(name)).expect("it was configured");
            let permit = handle.try_acquire(black_box(claim())).expect("the quota is large enough");
            permit.settle(black_box(u64::from(TOKENS)));
        }
    })
}

fn governor_direct(name: &'static str) -> Contender<'static> {
    let limiter = RateLimiter::direct(governor_quota());
    Contender::new(name, None, move |_, n| {
        for _ in 0..n {
            limiter.check_n(black_box(tokens())).expect("fits").expect("the quota is large enough");
        }
    })
}

fn governor_one(name: &'static str, rival: &'static str) -> Contender<'static> {
    let limiter = RateLimiter::direct(governor_quota());
    Contender::new(name, Some(rival), move |_, n| {
        for _ in 0..n {
            limiter.check().expect("the quota is large enough");
        }
    })
}

fn governor_keyed(name: &'static str, names: Vec<String>) -> Contender<'static> {
    let limiter = RateLimiter::keyed(governor_quota());
    Contender::new(name, None, move |thread, n| {
        for name in turns(&names, thread, n) {
            let answer = limiter.check_key_n(black_box(name), black_box(tokens()));
            answer.expect("fits").expect("the quota is large enough");
        }
    })
}

/// One limit a namespace, and no conditions: the least that limitador can be asked.
fn limitador(name: &'static str, rival: &'static str, names: Vec<String>) -> Contender<'static> {
    let limiter = limitador::RateLimiter::new(KEYS as u64 * 2);
    let namespaces: Vec<Namespace> = names.iter().map(|name| Namespace::from(name.as_str())).collect();
    for namespace in &namespaces {
        limiter.add_limit(Limit::new(namespace.clone(), u64::MAX / 2, 86_400, [], []));
    }
    let context = Context::default();
    Contender::new(name, Some(rival), move |thread, n| {
        for namespace in turns(&namespaces, thread, n) {
            let answer = limiter.check_rate_limited_and_update(black_box(namespace), &context, u64::from(TOKENS));
            assert!(!black_box(answer.expect("memory does not fail")).limited, "the quota is large enough");
        }
    })
}

/// Every key in turn; threads begin at different ones.
fn turns<T>(keys: &[T], thread: usize, n: usize) -> impl Iterator<Item = &T> {
    keys.iter().cycle().skip(thread * keys.len() / 2 % keys.len()).take(n)
}

fn handle() -> Handle {
    limiter(&["gpt-4o".to_owned()]).handle("gpt-4o").expect("it was configured")
}

fn limiter(names: &[String]) -> Limiter {
    let quota = Quota::tokens(Quota::MAX_AMOUNT).per(Duration::from_secs(86_400));
    let builder = names.iter().fold(Limiter::builder(), |builder, name| builder.deployment(name, [quota]));
    builder.build().expect("the configuration is right")
}

fn claim() -> Claim {
    Claim::tokens(u64::from(TOKENS))
}

/// One token a nanosecond: as fast as governor counts.
fn governor_quota() -> governor::Quota {
    governor::Quota::per_second(NonZeroU32::MAX)
}

const fn tokens() -> NonZeroU32 {
    NonZeroU32::new(TOKENS).expect("not zero")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_admits_every_request() {
        for contender in contenders() {
            // A refusal panics.
            contender.run(0, 2_000);
            contender.run(1, 2_000);
        }
    }

    #[test]
    fn every_rival_is_a_contender() {
        let all = contenders();
        for rival in all.iter().filter_map(Contender::rival) {
            assert!(all.iter().any(|contender| contender.name() == rival), "{rival}");
        }
    }
}

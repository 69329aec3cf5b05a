//! Which deployment serves a request for a model.
//!
//! Knows weights, turns, and which upstream asked for a pause. Must not know limits or
//! how requests are sent. The invariant it keeps: every deployment comes once in a
//! request's order, the one whose turn it is first, those without weight last.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use tokio::time::Instant;

use super::date;

/// The longest pause that is kept at an upstream's word: a wrong or a hostile one must not
/// close a deployment for good, and one request an hour finds out.
const LONGEST_PAUSE: Duration = Duration::from_secs(3_600);

/// The most turns before they repeat: weights finer than this are rounded.
const MAX_TURNS: u64 = 1_000;

/// The deployments behind one model name.
#[derive(Debug)]
pub(super) struct Routes<T> {
    /// Those with a weight first.
    all: Vec<Route<T>>,
    weighted: usize,
    /// Whose turn it is to be first, over and over.
    turns: Vec<usize>,
    next: AtomicUsize,
}

/// One deployment among those of its model.
#[derive(Debug)]
pub(super) struct Route<T> {
    pub(super) to: T,
    since: Instant,
    /// When the upstream's pause ends, in milliseconds after `since`.
    paused_until_ms: AtomicU64,
}

impl<T> Routes<T> {
    /// Returns the routes to these deployments. A weight says how often its deployment
    /// is first; one of zero takes only what no other has room for.
    pub(super) fn new(deployments: impl IntoIterator<Item = (T, u32)>) -> Self {
        let mut deployments: Vec<(T, u32)> = deployments.into_iter().collect();
        deployments.sort_by_key(|(_, weight)| *weight == 0);
        let weights: Vec<u32> = deployments.iter().map(|(_, weight)| *weight).filter(|weight| *weight > 0).collect();
        let since = Instant::now();
        let all: Vec<_> =
            deployments.into_iter().map(|(to, _)| Route { to, since, paused_until_ms: AtomicU64::new(0) }).collect();
        // Where none has a weight, all have the same.
        let weights = if weights.is_empty() { vec![1; all.len()] } else { weights };
        Self { all, weighted: weights.len(), turns: turns(&weights), next: AtomicUsize::new(0) }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Returns the order in which the next request looks at the deployments.
    pub(super) fn in_turn(&self) -> InTurn<'_, T> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.turns.len().max(1);
        InTurn { routes: self, first: self.turns.get(turn).copied().unwrap_or(0), seen: 0 }
    }
}

impl<T> Route<T> {
    /// Keeps requests away for as long as the upstream asked for.
    pub(super) fn pause(&self, length: Duration) {
        let until = self.since.elapsed() + length.min(LONGEST_PAUSE);
        let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        self.paused_until_ms.fetch_max(until_ms, Ordering::Relaxed);
    }

    /// Returns how long the upstream still wants no requests.
    pub(super) fn paused(&self) -> Option<Duration> {
        let until = self.paused_until_ms.load(Ordering::Relaxed);
        if until == 0 {
            return None;
        }
        let left = Duration::from_millis(until).checked_sub(self.since.elapsed())?;
        (!left.is_zero()).then_some(left)
    }
}

/// The order of one request.
#[derive(Debug)]
pub(super) struct InTurn<'a, T> {
    routes: &'a Routes<T>,
    first: usize,
    seen: usize,
}

impl<'a, T> Iterator for InTurn<'a, T> {
    type Item = &'a Route<T>;

    fn next(&mut self) -> Option<&'a Route<T>> {
        let (place, weighted) = (self.seen, self.routes.weighted);
        self.seen += 1;
        let place = if place < weighted { (self.first + place) % weighted } else { place };
        self.routes.all.get(place)
    }
}

/// Returns whose turn it is, for as many turns as there are weights: in proportion, and
/// nobody twice in a row who need not be (nginx's smooth weighted round robin).
fn turns(weights: &[u32]) -> Vec<usize> {
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    let scaled = |weight: u32| match total > MAX_TURNS {
        true => (u64::from(weight) * MAX_TURNS / total).max(1),
        false => u64::from(weight),
    };
    let weights: Vec<i64> = weights.iter().map(|weight| scaled(*weight) as i64).collect();
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0; weights.len()];
    let turn = |_| {
        for (credit, weight) in credits.iter_mut().zip(&weights) {
            *credit += weight;
        }
        // The first of equals: `max_by_key` would take the last.
        let richest = (0..credits.len()).rev().max_by_key(|place| credits[*place]).unwrap_or(0);
        credits[richest] -= total;
        richest
    };
    (0..total).map(turn).collect()
}

/// Returns how long an upstream that refuses wants to be left alone, if it says so.
pub(super) fn asked_pause(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    let seconds = |number: f64| Duration::try_from_secs_f64(number).unwrap_or(LONGEST_PAUSE);
    if let Some(ms) = text("retry-after-ms").and_then(number) {
        return Some(seconds(ms / 1_000.0));
    }
    let after = text(header::RETRY_AFTER.as_str())?;
    if let Some(number) = number(after) {
        return Some(seconds(number));
    }
    // Both by the upstream's clock: ours may differ.
    let (until, now) = (date::http(after)?, date::http(text(header::DATE.as_str())?)?);
    until.checked_sub(now).filter(|left| *left > 0).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(routes: &Routes<char>) -> String {
        routes.in_turn().map(|route| route.to).collect()
    }

    #[test]
    fn weights_say_who_is_first() {
        let routes = Routes::new([('a', 3), ('b', 1)]);
        let firsts: String = (0..8).map(|_| order(&routes).remove(0)).collect();
        assert_eq!(firsts, "aabaaaba");
        let routes = Routes::new([('a', 1), ('b', 1), ('c', 1)]);
        assert_eq!([order(&routes), order(&routes), order(&routes), order(&routes)], ["abc", "bca", "cab", "abc"]);
    }

    #[test]
    fn without_a_weight_a_deployment_comes_last() {
        let routes = Routes::new([('s', 0), ('a', 1), ('b', 1), ('t', 0)]);
        assert_eq!([order(&routes), order(&routes)], ["abst", "bast"]);
        assert_eq!(order(&Routes::new([('a', 0), ('b', 0)])), "ab");
    }

    #[test]
    fn great_weights_are_rounded_and_nobody_is_forgotten() {
        let turns = turns(&[u32::MAX, u32::MAX, 1]);
        assert_eq!(turns.len(), 999);
        assert_eq!(turns.iter().filter(|place| **place == 2).count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends() {
        let routes = Routes::new([('a', 1)]);
        let route = routes.in_turn().next().unwrap();
        assert_eq!(route.paused(), None);
        route.pause(Duration::from_secs(7));
        route.pause(Duration::from_secs(5));
        assert_eq!(route.paused(), Some(Duration::from_secs(7)));
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(route.paused(), None);
        route.pause(Duration::MAX);
        assert_eq!(route.paused(), Some(LONGEST_PAUSE));
    }

    #[test]
    fn every_way_to_ask_for_a_pause_is_read() {
        let asked = |headers: &[(&'static str, &'static str)]| {
            let pairs = headers.iter().map(|(name, value)| {
                (axum::http::HeaderName::from_static(name), axum::http::HeaderValue::from_static(value))
            });
            asked_pause(&pairs.collect())
        };
        let ms = Duration::from_millis;
        assert_eq!(asked(&[("retry-after", "7")]), Some(ms(7_000)));
        assert_eq!(asked(&[("retry-after", "1.5")]), Some(ms(1_500)));
        assert_eq!(asked(&[("retry-after", "7"), ("retry-after-ms", "6400")]), Some(ms(6_400)));
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(asked(&[date, ("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")]), Some(ms(30_000)));
        for nonsense in ["", "soon", "-1", "0", "NaN", "inf", "Sun, 06 Nov 1994 08:49:37 GMT"] {
            assert_eq!(asked(&[date, ("retry-after", nonsense)]), None, "{nonsense}");
        }
        assert_eq!(asked(&[]), None);
    }
}

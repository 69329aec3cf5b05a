//! A pod's status as JSON: what `/status` shows of the limiter and the cluster.
//!
//! Knows the names of /status. Must not know how it is asked for. The invariant it keeps:
//! whoever shows a status, the proxy or a binding, shows the same one.

use serde_json::{Value, json};

use crate::ledger::{Blocked, LimitStatus, PeerStatus};
use crate::{Mode, Standing, Status};

/// Returns what a status says of this replica, its peers and its limits.
pub fn status_json(status: &Status) -> Value {
    json!({
        "replica": status.replica.to_string(),
        "node": status.node,
        "addr": status.addr.map(|addr| addr.to_string()),
        "ready": status.ready,
        "joined_at_unix_ms": status.joined.map(|at| at.unix_ms()),
        "has_share": status.has_share,
        "leaving": status.leaving,
        "blocked": blocked(&status.blocked),
        "silent": blocked(&status.silent),
        "declared_gone": status.declared_gone,
        "clock_behind_ms": u64::try_from(status.clock_behind.as_millis()).unwrap_or(u64::MAX),
        "duplicate_node": duplicates(status),
        "peers": status.peers.iter().map(peer).collect::<Vec<_>>(),
        "limits": status.limits.iter().map(limit_json).collect::<Vec<_>>(),
        "held_for_peers": status.held,
        "ignored": {
            "closed_window": status.ignored.closed_window,
            "future_window": status.ignored.future_window,
            "unknown_key": status.ignored.unknown_key,
            "stale_request": status.ignored.stale_request,
            "too_many_replicas": status.ignored.too_many_replicas,
            "too_many_keys": status.ignored.too_many_keys,
            "impossible_gift": status.ignored.impossible_gift,
        },
    })
}

/// Returns what a status says of one limit.
pub fn limit_json(limit: &LimitStatus) -> Value {
    let quotas = limit.quotas.iter().map(|(standing, counts, over)| {
        let mut quota = standing_json(standing);
        quota["admitted_total"] = json!(counts.admitted);
        quota["refunded_total"] = json!(counts.refunded);
        quota["overshoot_total"] = json!(counts.overshoot);
        quota["uncovered_total"] = json!(counts.uncovered);
        quota["overshoot_bound"] = json!(over.map(|over| over.bound));
        quota["overshoot_expected"] = json!(over.map(|over| over.expected));
        quota
    });
    json!({
        "limit_id": limit.name,
        "mode": mode(limit.mode),
        "quotas": quotas.collect::<Vec<_>>(),
        "switches": limit.switches.iter().map(|switch| json!({
            "from": switch.from.map(|quota| quota.to_string()),
            "to": switch.to.to_string(),
            "at_unix_ms": switch.at.unix_ms(),
        })).collect::<Vec<_>>(),
        "parked": limit.parked,
        "refused": limit.refused,
        "observed": limit.observed,
        "mismatches": limit.mismatches.iter().map(|other| json!({
            "peer": other.peer.to_string(),
            "theirs": other.theirs.to_string(),
        })).collect::<Vec<_>>(),
    })
}

fn blocked(blocked: &[Blocked]) -> Vec<Value> {
    blocked.iter().map(|block| json!({"who": block.who, "why": block.why, "resolve": block.resolve})).collect()
}

/// Returns the live peers elsewhere that have this replica's node name.
fn duplicates(status: &Status) -> Vec<String> {
    let other = |peer: &&PeerStatus| peer.node == status.node && status.addr.is_some_and(|addr| addr != peer.addr);
    let live = status.peers.iter().filter(|peer| peer.reachable && peer.gone.is_none());
    live.filter(other).map(|peer| peer.id.to_string()).collect()
}

fn peer(peer: &PeerStatus) -> Value {
    json!({
        "replica": peer.id.to_string(),
        "node": peer.node,
        "addr": peer.addr.to_string(),
        "reachable": peer.reachable,
        "staleness_ms": peer.staleness.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        "skew_ms": peer.skew_ms,
        "gone_from_unix_ms": peer.gone.map(|at| at.unix_ms()),
    })
}

/// Returns a mode as the config writes it.
fn mode(mode: Mode) -> Value {
    match mode {
        Mode::Elastic { beta } => json!({"elastic": {"beta": beta.as_part()}}),
        Mode::Sum { margin } => json!({"sum": {"margin": margin.to_string()}}),
        other => json!(other.name()),
    }
}

fn standing_json(standing: &Standing) -> Value {
    json!({
        "unit": standing.quota.unit().name(),
        "limit": standing.limit,
        "vested": standing.vested,
        "quota": standing.quota.to_string(),
        "window_ms": standing.quota.window().ms(),
        "version": format!("{:016x}", standing.quota.version()),
        "window_start_unix_ms": standing.window_start.unix_ms(),
        "used": standing.used,
        "margin_reachable": standing.margin_reachable,
        "margin_unreachable": standing.margin_unreachable,
        "spendable": standing.spendable,
        "debt": standing.debt,
        "resets_in_ms": u64::try_from(standing.resets_in.as_millis()).unwrap_or(u64::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limiter;

    #[test]
    fn live_peers_of_the_same_node_name_elsewhere_are_named() {
        let mut status = Limiter::builder().node("pod-a").build().unwrap().status();
        assert_eq!(status.node, "pod-a");
        let addr = |host| ([10, 0, 0, host], 7946).into();
        status.addr = Some(addr(1));
        for (number, node, host, reachable) in
            [(2, "pod-a", 2, true), (3, "pod-b", 3, true), (4, "pod-a", 4, false), (5, "pod-a", 1, true)]
        {
            let id = crate::ledger::ReplicaId::new(crate::Timestamp::from_unix_ms(number), u128::from(number));
            let (addr, node) = (addr(host), node.into());
            status.peers.push(PeerStatus { id, node, addr, reachable, staleness: None, skew_ms: None, gone: None });
        }
        assert_eq!(status_json(&status)["duplicate_node"], json!([status.peers[0].id.to_string()]));
    }
}

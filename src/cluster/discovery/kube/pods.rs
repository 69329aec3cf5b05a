//! The fleet's pods as the API server tells them: who is listed, and whose process has ended.
//!
//! Knows what a pod object says and what of it is a proof. Must not know how it is asked for. The
//! invariant it keeps: a proof is a container's end as its kubelet reported it. That an object is
//! missing, deleted, on a lost node or marked as failed by a controller proves nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use crate::cluster::discovery::Answer;
use crate::ledger::{Gone, Timestamp};

/// The most ends that are remembered of pods that are no more: a rolling update of the largest
/// fleet leaves as many as it has pods.
const MAX_ENDED: usize = 1_024;

/// What the kubelet writes when it did not find the container any more: that nobody saw it end.
const NOT_SEEN: &str = "ContainerStatusUnknown";

/// A pod as the API server writes it; all that matters here of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Pod {
    pub(super) metadata: Metadata,
    pub(super) status: Status,
}

/// Which pod, and which version of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Metadata {
    pub(super) uid: String,
    pub(super) resource_version: String,
}

/// What its kubelet says of it, or a controller in its place.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    #[serde(rename = "podIP")]
    pub(super) pod_ip: String,
    pub(super) container_statuses: Option<Vec<Container>>,
    /// Native sidecars are among them.
    init_container_statuses: Option<Vec<Container>>,
    /// What `kubectl debug` has added.
    ephemeral_container_statuses: Option<Vec<Container>>,
}

/// One container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Container {
    state: State,
    last_state: State,
}

impl Container {
    /// When it ended, if it has and somebody saw it.
    fn ended(&self) -> Option<Timestamp> {
        self.state.terminated.as_ref()?.at()
    }
}

/// What it does, or did last.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct State {
    terminated: Option<Terminated>,
}

/// How it ended.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Terminated {
    finished_at: Option<String>,
    reason: Option<String>,
}

impl Terminated {
    /// When it ended, if somebody saw it.
    fn at(&self) -> Option<Timestamp> {
        if self.reason.as_deref() == Some(NOT_SEEN) {
            return None;
        }
        let at: jiff::Timestamp = self.finished_at.as_deref()?.parse().ok()?;
        u64::try_from(at.as_millisecond()).ok().filter(|ms| *ms > 0).map(Timestamp::from_unix_ms)
    }
}

impl Pod {
    fn ip(&self) -> Option<IpAddr> {
        self.status.pod_ip.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
    }

    fn containers(&self) -> &[Container] {
        self.status.container_statuses.as_deref().unwrap_or_default()
    }

    /// Returns what is there beside its containers, and may be a process at its address as well.
    fn others(&self) -> impl Iterator<Item = &Container> {
        let Status { init_container_statuses, ephemeral_container_statuses, .. } = &self.status;
        [init_container_statuses, ephemeral_container_statuses].into_iter().flatten().flatten()
    }

    /// Whether nothing of it runs any more, and when the last container ended.
    fn ended(&self) -> Option<Timestamp> {
        // Init containers are over before the others have begun.
        if self.containers().is_empty() {
            return None;
        }
        let ends = self.containers().iter().chain(self.others()).map(Container::ended);
        ends.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// Up to when every process at its address is known to have ended. Of several containers one
    /// cannot tell which is ours, so all of them must have.
    fn ended_by(&self) -> Option<Timestamp> {
        let before = || match self.containers() {
            [only] if self.others().all(|other| other.ended().is_some()) => only.last_state.terminated.as_ref()?.at(),
            _ => None,
        };
        self.ended().or_else(before)
    }
}

/// One thing that the API server said.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The pod is there, or changed.
    Is(Pod),
    /// Its object is gone; this is how it was last.
    Was(Pod),
}

/// What is known of the pods.
#[derive(Debug)]
pub(super) struct Pods {
    port: u16,
    /// By their uid.
    there: BTreeMap<String, Pod>,
    /// At which address which processes have ended, by uid: told again with every answer, as a
    /// replica may be heard of after its end.
    ended: BTreeMap<String, (SocketAddr, Timestamp)>,
}

impl Pods {
    /// Returns none, all of which gossip at this port.
    pub(super) fn new(port: u16) -> Self {
        Self { port, there: BTreeMap::new(), ended: BTreeMap::new() }
    }

    /// Takes the whole list. Who is not on it any more has proven nothing by that.
    pub(super) fn list(&mut self, pods: Vec<Pod>) {
        self.there.clear();
        for pod in pods {
            self.take(Event::Is(pod));
        }
    }

    /// Takes what happened. Returns whether an answer says something new by it.
    pub(super) fn take(&mut self, event: Event) -> bool {
        let before = (self.listed(), self.ended.clone());
        let (Event::Is(pod) | Event::Was(pod)) = &event;
        let uid = pod.metadata.uid.clone();
        if let (Some(ip), Some(by)) = (pod.ip(), pod.ended_by()) {
            let end = self.ended.entry(uid.clone()).or_insert((SocketAddr::new(ip, self.port), by));
            end.1 = end.1.max(by);
        }
        match event {
            Event::Is(pod) => _ = self.there.insert(uid, pod),
            Event::Was(_) => _ = self.there.remove(&uid),
        }
        while self.ended.len() > MAX_ENDED {
            let oldest =
                self.ended.iter().filter(|(uid, _)| !self.there.contains_key(*uid)).min_by_key(|(_, end)| end.1);
            let Some((oldest, _)) = oldest.or_else(|| self.ended.iter().next()) else { break };
            let oldest = oldest.clone();
            self.ended.remove(&oldest);
        }
        before != (self.listed(), self.ended.clone())
    }

    /// Returns the addresses of all pods in which something may run.
    fn listed(&self) -> Vec<SocketAddr> {
        let running = self.there.values().filter(|pod| pod.ended().is_none());
        running.filter_map(|pod| Some(SocketAddr::new(pod.ip()?, self.port))).collect()
    }

    /// Returns what a directory answers.
    pub(super) fn answer(&self) -> Answer {
        let gone = self.ended.values().map(|(addr, by)| Gone::Address { addr: *addr, started_by: *by });
        Answer { listed: Some(self.listed()), gone: gone.collect() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, ip: &str, containers: Value) -> Pod {
        let object = json!({
            "metadata": {"uid": uid, "resourceVersion": "7", "name": "quotum-x", "labels": {"a": "b"}},
            "spec": {"containers": [{"name": "quotum"}]},
            "status": {"phase": "Running", "podIP": ip, "containerStatuses": containers},
        });
        serde_json::from_value(object).unwrap()
    }

    fn running() -> Value {
        json!([{"name": "quotum", "state": {"running": {"startedAt": "2026-11-22T20:00:00Z"}}, "lastState": {}}])
    }

    fn terminated(at: &str, reason: &str) -> Value {
        json!([{"name": "quotum", "state": {"terminated": {"exitCode": 0, "reason": reason, "finishedAt": at}}}])
    }

    fn addr(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), 7946)
    }

    const AT: &str = "2026-11-22T20:00:10Z";

    fn at() -> Timestamp {
        Timestamp::from_unix_ms(1_795_377_610_000)
    }

    #[test]
    fn pods_with_an_address_are_listed_ready_or_not() {
        let mut pods = Pods::new(7946);
        pods.list(vec![pod("a", "10.0.0.1", running()), pod("b", "", Value::Null), pod("c", "fd00::3", Value::Null)]);
        assert_eq!(pods.answer(), Answer::listing([addr("10.0.0.1"), addr("fd00::3")]));
        assert!(pods.take(Event::Is(pod("b", "10.0.0.2", Value::Null))), "the kubelet has told its address");
        assert!(!pods.take(Event::Is(pod("b", "10.0.0.2", running()))), "nothing that matters changed");
        assert_eq!(pods.answer().listed.unwrap().len(), 3);
    }

    #[test]
    fn a_container_that_its_kubelet_saw_end_is_a_proof_and_stays_one() {
        let mut pods = Pods::new(7946);
        pods.list(vec![pod("a", "10.0.0.1", running()), pod("b", "10.0.0.2", running())]);
        assert!(pods.take(Event::Is(pod("a", "10.0.0.1", terminated(AT, "Completed")))));
        let proof = Gone::Address { addr: addr("10.0.0.1"), started_by: at() };
        let expected = Answer { listed: Some(vec![addr("10.0.0.2")]), gone: vec![proof] };
        assert_eq!(pods.answer(), expected);
        pods.take(Event::Was(pod("a", "10.0.0.1", terminated(AT, "Completed"))));
        assert_eq!(pods.answer(), expected, "who is heard of later must be found dead, too");
        pods.list(vec![pod("b", "10.0.0.2", running())]);
        assert_eq!(pods.answer(), expected);
    }

    #[test]
    fn an_object_that_is_gone_proves_nothing() {
        let mut pods = Pods::new(7946);
        pods.list(vec![pod("a", "10.0.0.1", running()), pod("b", "10.0.0.2", running())]);
        // Deleted by force: its process may run on for as long as its node is cut off.
        assert!(pods.take(Event::Was(pod("a", "10.0.0.1", running()))));
        assert_eq!(pods.answer(), Answer::listing([addr("10.0.0.2")]));
        // Missing in a new list, after the watch broke.
        pods.list(vec![]);
        assert_eq!(pods.answer(), Answer::listing([]));
    }

    #[test]
    fn a_lost_node_and_a_controllers_verdict_prove_nothing() {
        let mut pods = Pods::new(7946);
        let mut failed = pod("a", "10.0.0.1", running());
        pods.list(vec![failed.clone()]);
        // The garbage collector of pods on lost nodes sets the phase and a condition.
        let object = json!({
            "metadata": {"uid": "a"},
            "status": {
                "phase": "Failed", "reason": "NodeLost", "podIP": "10.0.0.1",
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}],
                "containerStatuses": running(),
            },
        });
        failed = serde_json::from_value(object).unwrap();
        pods.take(Event::Is(failed));
        assert_eq!(pods.answer(), Answer::listing([addr("10.0.0.1")]));
        // The kubelet came back and did not find the container.
        pods.take(Event::Is(pod("a", "10.0.0.1", terminated(AT, NOT_SEEN))));
        pods.take(Event::Was(pod("a", "10.0.0.1", json!([{"state": {"terminated": {"exitCode": 137}}}]))));
        pods.take(Event::Was(pod("a", "10.0.0.1", terminated("a while ago", "Error"))));
        pods.take(Event::Was(pod("a", "10.0.0.1", json!([]))));
        assert_eq!(pods.answer().gone, []);
    }

    #[test]
    fn a_container_started_again_proves_that_its_last_run_ended() {
        let mut pods = Pods::new(7946);
        let again = json!([{
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": AT}},
        }]);
        pods.list(vec![pod("a", "10.0.0.1", again.clone())]);
        let proof = Gone::Address { addr: addr("10.0.0.1"), started_by: at() };
        assert_eq!(pods.answer(), Answer { listed: Some(vec![addr("10.0.0.1")]), gone: vec![proof] });
        // Of two, nobody can tell whose end it was.
        let beside = json!([again[0], running()[0]]);
        let mut pods = Pods::new(7946);
        pods.list(vec![pod("a", "10.0.0.1", beside)]);
        assert_eq!(pods.answer(), Answer::listing([addr("10.0.0.1")]));
    }

    #[test]
    fn whatever_else_may_run_at_an_address_must_have_ended_as_well() {
        let last = json!({"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": AT}});
        let again = json!({"state": {"running": {}}, "lastState": last});
        let proves = |main: &Value, others: &str, other: &Value| {
            let mut pods = Pods::new(7946);
            let status = json!({"podIP": "10.0.0.1", "containerStatuses": main, others: other});
            let pod = json!({"metadata": {"uid": "a"}, "status": status});
            pods.list(vec![serde_json::from_value(pod).unwrap()]);
            !pods.answer().gone.is_empty()
        };
        let waits = json!([{"state": {"waiting": {"reason": "PodInitializing"}}, "lastState": last}]);
        // A native sidecar; what `kubectl debug` has added.
        for others in ["initContainerStatuses", "ephemeralContainerStatuses"] {
            for main in [json!([again]), terminated(AT, "Error")] {
                assert!(!proves(&main, others, &running()), "{others}: it runs");
                assert!(!proves(&main, others, &json!([again])), "{others}: it runs again");
                assert!(!proves(&main, others, &waits), "{others}: it may be started by now");
                assert!(!proves(&main, others, &terminated(AT, NOT_SEEN)), "{others}: nobody saw it end");
                assert!(proves(&main, others, &terminated(AT, "Completed")), "{others}: it is over");
            }
            assert!(!proves(&Value::Null, others, &terminated(AT, "Completed")), "{others}: none has begun");
            assert!(!proves(&running(), others, &json!([again])), "{others}: the other one runs on");
        }
    }

    #[test]
    fn ends_of_pods_that_are_no_more_are_bounded() {
        let mut pods = Pods::new(7946);
        for number in 0..=2 * MAX_ENDED {
            let ip = IpAddr::from(u32::try_from(number).unwrap().to_be_bytes()).to_string();
            pods.take(Event::Was(pod(&format!("{number}"), &ip, terminated(AT, "Error"))));
        }
        assert_eq!(pods.answer().gone.len(), MAX_ENDED);
    }
}

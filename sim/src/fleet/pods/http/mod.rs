//! The proxy of every pod over simulated TCP: callers, pods and upstreams on hosts of their own.
//!
//! Knows how the server of `quotum serve` is started in a pod's process, and who sends it
//! what. Must not know faults between pods or what a plan is meant to show. The invariant it
//! keeps: nothing of the server is replaced but the two ends of its connections and the order
//! to stop.

mod callers;
mod judge;
mod net;

use std::cell::RefCell;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use quotum::cluster::Cluster;
use quotum::config::{self, Config, Flags};
use quotum::server::pod::Serving;
use quotum::server::stub::{self, Behaviour, Record, Stub};
use quotum::server::{Client, Pod};
use quotum::{Builder, Limiter, Quota};
use tokio::sync::mpsc;

use self::callers::{Ask, Heard, Told};
use self::judge::{Judge, Sent};
use self::net::{Dial, PORT, Port};
use crate::canary::Canary;
use crate::fault::Fault;
use crate::fleet::lives::DEPLOYMENT;
use crate::fleet::replica::{Process, SharedClock};
use crate::fleet::world::World;
use crate::rng::Rng;
use crate::scenario::{Http, Plan};
use crate::workload::{End, Request};

/// Everything around the pods' proxies.
pub(super) struct Web {
    plan: Http,
    config: Arc<Config>,
    canary: Option<Canary>,
    clock: SharedClock,
    upstreams: Vec<Arc<Stub>>,
    asks: mpsc::UnboundedSender<Ask>,
    told: Told,
    judge: Judge,
    rng: Rng,
    /// Upstreams that cannot be reached, or whose answers do not come.
    away: Vec<(usize, bool)>,
}

impl fmt::Debug for Web {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Web").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// What a pod's process serves with.
#[derive(Clone, Debug)]
pub(super) struct Site {
    config: Arc<Config>,
    canary: Option<Canary>,
}

impl Site {
    /// Serves callers from now on: `quotum serve` without its files and signals.
    pub(super) async fn serve(&self, limiter: &Limiter, cluster: &Arc<Cluster>) -> Result<Serving, String> {
        let canary = self.canary;
        let client = |timeouts: config::Timeouts| Client::over(Dial { within: timeouts.connect, canary });
        let pod = Pod::new(&self.config, limiter.clone(), Some(Arc::clone(cluster)), &client);
        let pod = pod.map_err(|error| error.to_string())?;
        let port = Port::bind().await.map_err(|error| error.to_string())?;
        Ok(pod.serve(port))
    }
}

impl Web {
    /// Puts the upstreams and the callers on their hosts.
    pub(super) fn new(plan: &Plan, canary: Option<Canary>, sim: &mut turmoil::Sim<'static>) -> Option<Self> {
        let http = plan.http.clone()?;
        let clock = SharedClock::default();
        let mut upstreams = Vec::new();
        for number in 0..http.upstreams {
            let stub = Stub::with_clock(Behaviour { bytes_per_token: 1, ..Behaviour::default() }, clock.clone());
            upstreams.push(Arc::clone(&stub));
            sim.host(upstream(number), move || {
                let stub = Arc::clone(&stub);
                async move {
                    stub::serve(stub, Port::bind().await?, std::future::pending()).await;
                    Ok(())
                }
            });
        }
        let (asks, received) = mpsc::unbounded_channel();
        let told = Told::default();
        let started = Rc::new(RefCell::new(Some((received, Rc::clone(&told)))));
        sim.host(CALLERS, move || {
            let started = started.take();
            async move {
                match started {
                    Some((received, told)) => callers::run(received, told).await,
                    None => Ok(()),
                }
            }
        });
        let config = config::parse(&written(plan, &http), "plan", &|_| None, &Flags::default());
        let config = config.unwrap_or_else(|error| panic!("a plan's configuration is one: {error}"));
        let loses = plan.faults.iter().any(|scheduled| matches!(scheduled.fault, Fault::UpstreamAway { .. }));
        let judge = Judge::new(plan.quotas[0], plan.edge.as_millis() as u64, loses);
        let (config, rng) = (Arc::new(config), Rng::stream(plan.seed, "http"));
        Some(Self { plan: http, config, canary, clock, upstreams, asks, told, judge, rng, away: Vec::new() })
    }

    /// What a process that starts now serves with.
    pub(super) fn site(&self) -> Site {
        Site { config: Arc::clone(&self.config), canary: self.canary }
    }

    /// What limiters are built of.
    pub(in crate::fleet) fn builder(&self) -> Builder {
        quotum::server::builder(&self.config.deployments)
    }

    fn records(&self) -> Vec<Vec<Record>> {
        self.upstreams.iter().map(|stub| stub.records()).collect()
    }
}

/// The host that all callers are on.
const CALLERS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));

/// The host of an upstream.
fn upstream(number: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 98, 0, 1 + number as u8))
}

/// The name of the deployment that an upstream serves.
fn deployment(number: usize) -> String {
    if number == 0 { DEPLOYMENT.to_owned() } else { format!("{DEPLOYMENT}-{number}") }
}

/// The file that an operator would write for this plan.
fn written(plan: &Plan, http: &Http) -> String {
    let ms = |duration: std::time::Duration| format!("{}ms", duration.as_millis());
    let quota = plan.quotas[0];
    let window = ms(quota.window().duration());
    let deployments: Vec<String> = (0..http.upstreams)
        .map(|number| {
            format!(
                "  - {{ id: {}, model: m, upstream: 'http://{}/v1', order: {}, wait: {}, edge: {}, tokenizer: bytes,\n      \
                 timeouts: {{ connect: 1s, first_byte: {}, idle: {} }},\n      \
                 limits: [{{ unit: tokens, amount: {}, window: {window} }}] }}\n",
                deployment(number),
                upstream(number),
                1 + number,
                ms(plan.wait),
                ms(plan.edge),
                ms(http.first_byte),
                ms(http.idle),
                quota.amount(),
            )
        })
        .collect();
    format!(
        "proxy: {{ linger: {}, drain: {} }}\ndeployments:\n{}",
        ms(http.linger),
        ms(http.drain),
        deployments.concat()
    )
}

impl World {
    fn web(&mut self) -> Option<&mut Web> {
        self.pods.as_mut()?.web.as_mut()
    }

    /// Whether callers still send to a pod that leaves: they hear late that it goes.
    pub(in crate::fleet) fn is_still_asked(&self, replica: usize) -> bool {
        let Some(http) = &self.plan.http else { return false };
        let replica = &self.replicas[replica];
        let running = replica.process.as_ref().is_some_and(|process| process.is_running());
        running && replica.leaving.is_some_and(|since| self.at < since + http.lag)
    }

    /// A caller sends a request to a pod.
    pub(in crate::fleet) fn ask_over_tcp(&mut self, replica: usize, request: &Request) {
        let (at, to) = (self.at, SocketAddr::new(self.replicas[replica].addr.ip(), PORT));
        let canary = self.options.canary;
        let Some(web) = self.web() else { return };
        let (http, rng) = (web.plan.clone(), &mut web.rng);
        let stream = rng.chance(http.streams);
        let stalls = rng.chance(http.stalls);
        let hangs = rng.chance(http.hangs);
        let first_byte = (request.hold as f64 * rng.unit() * http.before_first) as u64 / 1_000;
        let fault = match () {
            () if stalls && stream => "stall",
            () if hangs => "hang",
            () if request.end == End::Unsettled => "no-usage",
            () if canary == Some(Canary::UsageForgotten) => "zero-usage",
            () => "",
        };
        let hold = std::time::Duration::from_micros(request.hold);
        let hangs_up = (request.end == End::Cancelled).then(|| hold.mul_f64(rng.unit()));
        let hangs_up = request.leaves_after.map(std::time::Duration::from_micros).or(hangs_up);
        let output = request.output.min(request.reserved_output);
        let mut headers = vec![
            ("x-stub-id", request.number.to_string()),
            ("x-stub-prompt-tokens", request.prompt.to_string()),
            ("x-stub-completion-tokens", output.to_string()),
            ("x-stub-first-byte-ms", first_byte.to_string()),
            ("x-stub-body-ms", (request.hold / 1_000 - first_byte).to_string()),
        ];
        if !fault.is_empty() {
            headers.push(("x-stub-fault", fault.to_owned()));
        }
        let prompt = "a".repeat(request.prompt as usize);
        let body = format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}],"max_tokens":{},"stream":{stream}}}"#,
            request.reserved_output.max(1)
        );
        let regular = ["", "zero-usage"].contains(&fault) && hangs_up.is_none();
        web.judge.open.insert(request.number, Sent { request: *request, at, replica, regular, stream });
        let ask = Ask { number: request.number, to, body, headers, fresh: rng.chance(0.3), hangs_up };
        // The callers' host never ends.
        let _ = web.asks.send(ask);
        self.trace.note(&[16, replica as u64, request.number, at]);
        self.line(Some(replica), || {
            format!("is sent request {} of {}, {fault:?}, {hangs_up:?}", request.number, request.reserved())
        });
    }

    /// Before a step: the upstreams' clock is true.
    pub(super) fn set_web_clock(&mut self) {
        let ms = self.true_ms();
        if let Some(web) = self.web() {
            web.clock.set(ms);
        }
    }

    /// After a step: takes note of what callers have heard.
    pub(super) fn listen_to_callers(&mut self) {
        let Some(web) = self.web() else { return };
        let told = web.told.take();
        for (number, heard) in told {
            let Some(sent) = self.web().and_then(|web| web.judge.heard(number, heard)) else { continue };
            self.trace.note(&[17, number, self.at, code(heard)]);
            self.line(Some(sent.replica), || format!("request {number}: {heard:?}"));
            self.note_heard(number, sent, heard);
            let canary = self.options.canary;
            if canary == Some(Canary::SentAgain) && heard == Heard::Whole(504) && self.at < self.quiet_from() {
                self.ask_over_tcp(sent.replica, &sent.request);
            }
        }
    }

    fn note_heard(&mut self, number: u64, sent: Sent, heard: Heard) {
        match heard {
            Heard::Whole(200) => {
                self.oracle.figures.admitted += 1;
                self.reach(if sent.stream { "streamed to its end" } else { "answered" });
            }
            Heard::Whole(429) => {
                self.oracle.figures.refused += 1;
                self.reach("refused");
            }
            Heard::Whole(504) => self.reach("the upstream was too slow"),
            Heard::Whole(502 | 503) => self.reach("the upstream failed"),
            Heard::HungUp => self.reach("the caller hung up"),
            _ => {}
        }
        if sent.at + 1_000 < self.at && self.replicas[sent.replica].leaving.is_some() && heard == Heard::Whole(200) {
            self.reach("answered while the pod left");
        }
        // A pod that ended for good takes its connections with it; a stall ends by cutting off.
        let is_excused = !sent.regular
            || self.replicas[sent.replica].died.is_some() && !self.replicas[sent.replica].left_in_order
            || self.plan.http.as_ref().is_some_and(|http| http.upstream_fails);
        let is_answer = matches!(heard, Heard::Whole(_) | Heard::HungUp);
        if !is_answer && !is_excused {
            self.oracle.violated(self.at, "every request is answered", || {
                format!("request {number} to replica {} came to {heard:?}", sent.replica)
            });
        }
        if let Heard::Whole(status) = heard
            && ![200, 429].contains(&status)
            && !is_excused
        {
            self.oracle.violated(self.at, "every request is answered", || format!("request {number}: {status}"));
        }
    }

    /// What a pod has charged, as its ledger has it.
    pub(in crate::fleet) fn note_charges(&mut self, replica: usize) {
        let quota = self.plan.quotas[0];
        let Some(process) = self.replicas[replica].process.as_ref().filter(|process| process.is_running()) else {
            return;
        };
        let limiter = process.limiter.clone();
        let Some(web) = self.web() else { return };
        for number in 0..web.plan.upstreams {
            for (window, charged) in charges(&limiter, &deployment(number), quota) {
                web.judge.charged(replica, number, window, charged);
            }
        }
    }

    /// Compares what the upstreams were sent with limits and charges.
    pub(in crate::fleet) fn check_upstreams(&mut self) {
        for replica in 0..self.replicas.len() {
            self.note_charges(replica);
        }
        let Some(web) = self.web() else { return };
        if let Some((invariant, text)) = web.judge.wrong(&web.records()) {
            self.oracle.violated(self.at, invariant, || text);
        }
    }

    /// How many windows the upstreams' counts were held against, where they judge.
    pub(in crate::fleet) fn windows_of_upstreams(&mut self) -> Option<u64> {
        let web = self.web()?;
        Some(web.judge.windows(&web.records()))
    }

    /// At the end nobody waits, nothing is parked, and everything has settled.
    pub(in crate::fleet) fn check_web_end(&mut self) {
        let now_ms = self.true_ms();
        self.check_upstreams();
        let Some(web) = self.web() else { return };
        let records = web.records();
        let settled = web.judge.settled(&records, now_ms);
        for (upstream, records) in records.iter().enumerate() {
            for record in records {
                let used = record.completion_tokens.unwrap_or(0);
                self.trace.note(&[18, upstream as u64, record.arrived_unix_ms, u64::from(record.status), used]);
                self.trace.note_bytes(record.id.as_bytes());
            }
            if upstream > 0 && !records.is_empty() {
                self.reach("spilled over");
            }
            if records.iter().any(|record| record.status == 429) {
                self.reach("the upstream refused");
            }
        }
        match settled {
            Ok(0) => {}
            Ok(_) => self.reach("settled to the token"),
            Err((invariant, text)) => self.oracle.violated(self.at, invariant, || text),
        }
        for replica in 0..self.replicas.len() {
            if self.has_parked_callers(replica) {
                self.oracle.violated(self.at, "nobody is left parked", || format!("at replica {replica}"));
            }
        }
    }

    /// Whether callers of a pod's proxy wait for rights.
    pub(in crate::fleet) fn has_parked_callers(&self, replica: usize) -> bool {
        let process = self.replicas[replica].process.as_ref().filter(|process| process.is_running());
        let parks = |process: &Process| process.limiter.status().limits.iter().any(|limit| limit.parked > 0);
        self.plan.http.is_some() && process.is_some_and(parks)
    }

    /// An upstream cannot be reached from any pod, or only its answers get lost; or it is again.
    pub(in crate::fleet) fn cut_upstream(&mut self, number: usize, only_answers: bool, cut: bool) {
        let Some(pods) = &mut self.pods else { return };
        let Some(web) = &mut pods.web else { return };
        if cut {
            web.away.push((number, only_answers));
        } else {
            web.away.retain(|other| *other != (number, only_answers));
        }
        let hosts: Vec<IpAddr> = pods.hosts.keys().copied().collect();
        hosts.into_iter().for_each(|host| pods.link_upstreams(host));
    }

    /// An upstream answers everything so from now on.
    pub(in crate::fleet) fn fail_upstream(&mut self, number: usize, fault: &'static str) {
        if let Some(stub) = self.web().and_then(|web| web.upstreams.get(number)) {
            stub.fail(fault);
        }
    }
}

impl super::Pods {
    /// The links of a host to the upstreams are what they should be now.
    pub(super) fn link_upstreams(&mut self, host: IpAddr) {
        let Some(web) = &self.web else { return };
        for number in 0..web.upstreams.len() {
            self.sim.repair(host, upstream(number));
            if web.away.contains(&(number, false)) {
                self.sim.partition(host, upstream(number));
            } else if web.away.contains(&(number, true)) {
                self.sim.partition_oneway(upstream(number), host);
            }
        }
    }
}

fn charges(limiter: &Limiter, deployment: &str, quota: Quota) -> Vec<(u64, i64)> {
    let windows = limiter.with_ledger(|ledger, _| ledger.open_windows_of(deployment, quota));
    let number = |start| quota.grid().window_at(start).number();
    windows
        .into_iter()
        .map(|(start, reserved, refunded, _)| (number(start), reserved as i64 - refunded as i64))
        .collect()
}

/// What was heard, as a number of the trace.
fn code(heard: Heard) -> u64 {
    match heard {
        Heard::Whole(status) => u64::from(status),
        Heard::Broken(status) => 1_000 + u64::from(status),
        Heard::Nothing => 1,
        Heard::HungUp => 2,
    }
}

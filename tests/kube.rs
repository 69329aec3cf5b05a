//! Discovery on Kubernetes against a small API server that speaks the real protocol: consistent
//! lists, watches from a version, bookmarks, versions that are too old, refusals, broken connections.

#![cfg(feature = "kube")]
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quotum::cluster::discovery::kube::{Kube, KubeConfig};
use quotum::cluster::discovery::{Answer, Discovery};
use quotum::cluster::{Cluster, ClusterConfig, KeyRing, Net, Seeds, UdpDatagrams, UdpNet};
use quotum::ledger::{Gone, Timestamp};
use quotum::{Limiter, Quota};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Far more than anything here takes: it bounds a failure, it asserts nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// The version at which the API server starts to count.
const FIRST: u64 = 1_000;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mood {
    #[default]
    Well,
    /// The service account may not ask.
    Forbids,
    /// It may list, and not watch.
    ForbidsToWatch,
    /// A load balancer without an API server behind it.
    Broken,
}

/// What the API server keeps, and what was asked of it.
#[derive(Debug, Default)]
struct Kept {
    version: u64,
    pods: BTreeMap<String, Value>,
    /// Every event with its version.
    events: Vec<(u64, &'static str, Value)>,
    /// Events up to this one are forgotten.
    compacted: u64,
    mood: Mood,
    /// Watches that began before are cut off.
    generation: u64,
    /// Whether an old version is told by the status of the answer, or by an event.
    gone_by_status: bool,
    requests: Vec<String>,
}

/// An API server for pods of one namespace.
#[derive(Clone)]
struct ApiServer {
    kept: Arc<Mutex<Kept>>,
    changed: watch::Sender<()>,
    addr: SocketAddr,
}

impl ApiServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let kept = Arc::new(Mutex::new(Kept { version: FIRST, ..Kept::default() }));
        let this = Self { kept, changed: watch::Sender::new(()), addr };
        let server = this.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                // A caller that hung up is no failure of the API server's.
                tokio::spawn(async move { server.serve(stream).await.ok() });
            }
        });
        this
    }

    fn change<T>(&self, change: impl FnOnce(&mut Kept) -> T) -> T {
        let result = change(&mut self.kept.lock().unwrap());
        self.changed.send_replace(());
        result
    }

    fn event(&self, what: &'static str, uid: &str, status: Value) {
        self.change(|kept| {
            kept.version += 1;
            let version = kept.version.to_string();
            let object = json!({
                "kind": "Pod", "apiVersion": "v1",
                "metadata": {"name": uid, "uid": uid, "namespace": "ns", "resourceVersion": version},
                "spec": {"containers": [{"name": "quotum", "image": "quotum"}]},
                "status": status,
            });
            match what {
                "DELETED" => _ = kept.pods.remove(uid),
                _ => _ = kept.pods.insert(uid.to_owned(), object.clone()),
            }
            kept.events.push((kept.version, what, object));
        });
    }

    fn requests(&self, containing: &str) -> usize {
        self.kept.lock().unwrap().requests.iter().filter(|request| request.contains(containing)).count()
    }

    /// Serves one request, as `connection: close`.
    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let line = head.lines().next().unwrap().to_owned();
        let (path, query) = line.split(' ').nth(1).unwrap().split_once('?').unwrap();
        let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        assert_eq!(path, "/api/v1/namespaces/ns/pods");
        assert_eq!(query["labelSelector"], "app%3Dquotum");
        let mood = self.change(|kept| {
            kept.requests.push(head.clone());
            kept.mood
        });
        match mood {
            Mood::Forbids | Mood::ForbidsToWatch if mood == Mood::Forbids || query.get("watch") == Some(&"1") => {
                return answer(&mut stream, "403 Forbidden", &json!({"kind": "Status", "code": 403})).await;
            }
            Mood::Broken => return answer(&mut stream, "503 Service Unavailable", &json!("no endpoints")).await,
            Mood::Well | Mood::Forbids | Mood::ForbidsToWatch => {}
        }
        if query.get("watch") != Some(&"1") {
            assert!(!query.contains_key("resourceVersion"), "a list of what is remembered is not consistent");
            let list = self.change(|kept| {
                json!({
                    "kind": "PodList", "apiVersion": "v1",
                    "metadata": {"resourceVersion": kept.version.to_string()},
                    "items": kept.pods.values().collect::<Vec<_>>(),
                })
            });
            return answer(&mut stream, "200 OK", &list).await;
        }
        assert_eq!(query["allowWatchBookmarks"], "true");
        assert!(query["timeoutSeconds"].parse::<u64>().unwrap() <= 30, "an answer must not be older than that");
        self.watch(stream, query["resourceVersion"].parse().unwrap()).await
    }

    async fn watch(&self, mut stream: TcpStream, mut version: u64) -> io::Result<()> {
        let mut changed = self.changed.subscribe();
        let (generation, compacted, by_status) =
            self.change(|kept| (kept.generation, kept.compacted, kept.gone_by_status));
        let gone = json!({"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410});
        if version < compacted && by_status {
            return answer(&mut stream, "410 Gone", &gone).await;
        }
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        if version < compacted {
            chunk(&mut stream, &json!({"type": "ERROR", "object": gone})).await?;
            return stream.write_all(b"0\r\n\r\n").await;
        }
        loop {
            let (events, now, current) = {
                let kept = self.kept.lock().unwrap();
                let events: Vec<_> = kept.events.iter().filter(|(at, ..)| *at > version).cloned().collect();
                (events, kept.version, kept.generation)
            };
            if current != generation {
                return Ok(()); // In the middle of a chunked answer.
            }
            for (at, what, object) in events {
                chunk(&mut stream, &json!({"type": what, "object": object})).await?;
                version = at;
            }
            if now > version {
                // Something happened to pods that the selector leaves out.
                let object = json!({"kind": "Pod", "metadata": {"resourceVersion": now.to_string()}});
                chunk(&mut stream, &json!({"type": "BOOKMARK", "object": object})).await?;
                version = now;
            }
            changed.changed().await.map_err(io::Error::other)?;
        }
    }
}

async fn answer(stream: &mut TcpStream, status: &str, body: &Value) -> io::Result<()> {
    let body = body.to_string();
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
    stream.write_all(head.as_bytes()).await
}

/// Writes a line of a watch, torn into two chunks wherever it is.
async fn chunk(stream: &mut TcpStream, line: &Value) -> io::Result<()> {
    let line = format!("{line}\n");
    let (one, other) = line.split_at(line.len() / 2);
    for part in [one, other] {
        stream.write_all(format!("{:x}\r\n{part}\r\n", part.len()).as_bytes()).await?;
        stream.flush().await?;
    }
    Ok(())
}

fn running(ip: &str) -> Value {
    json!({"phase": "Running", "podIP": ip, "containerStatuses": [{"state": {"running": {}}, "lastState": {}}]})
}

fn terminated(ip: &str, at: &str) -> Value {
    let end = json!({"exitCode": 137, "reason": "Error", "finishedAt": at});
    json!({"phase": "Failed", "podIP": ip, "containerStatuses": [{"state": {"terminated": end}, "lastState": {}}]})
}

/// The machine's network, where the headless name resolves to these.
#[derive(Debug, Default)]
struct TestNet(Vec<IpAddr>, Mutex<Option<UdpSocket>>);

impl Net for TestNet {
    type Socket = UdpDatagrams;

    async fn bind(&self, _: SocketAddr) -> io::Result<UdpDatagrams> {
        let socket = self.1.lock().unwrap().take().ok_or(io::ErrorKind::AddrInUse)?;
        UdpDatagrams::from_std(socket)
    }

    async fn lookup(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        Ok(self.0.clone())
    }

    async fn local_ip_towards(&self, peer: SocketAddr) -> io::Result<IpAddr> {
        UdpNet.local_ip_towards(peer).await
    }
}

fn kube(server: &ApiServer, port: u16, names: &[&str]) -> Arc<Kube<TestNet>> {
    let config = KubeConfig {
        api: format!("http://{}", server.addr),
        namespace: "ns".into(),
        selector: "app=quotum".into(),
        token_file: None,
        ca_file: None,
    };
    let names = names.iter().map(|name| name.parse().unwrap()).collect();
    Arc::new(Kube::new(Arc::new(TestNet(names, Mutex::default())), "quotum", port, config).unwrap())
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("it never came that {what}"))
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    within(what, async {
        while !condition() {
            looks.tick().await;
        }
    })
    .await;
}

/// Asks until the answer lists these and no others, and returns it.
async fn listing(kube: &Kube<TestNet>, ips: &[&str]) -> Answer {
    let mut expected: Vec<SocketAddr> = ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 7946)).collect();
    expected.sort();
    within(&format!("{ips:?} are listed"), async {
        loop {
            let answer = kube.ask(Timestamp::from_unix_ms(0)).await.unwrap();
            let mut listed = answer.listed.clone().unwrap();
            listed.sort();
            if listed == expected {
                return answer;
            }
        }
    })
    .await
}

const AT: &str = "2026-11-22T20:00:10Z";

fn proof(ip: &str) -> Gone {
    let addr = SocketAddr::new(ip.parse().unwrap(), 7946);
    Gone::Address { addr, started_by: Timestamp::from_unix_ms(1_795_377_610_000) }
}

#[tokio::test]
async fn pods_are_listed_then_watched_and_only_an_end_that_was_seen_is_a_proof() {
    let server = ApiServer::start().await;
    server.event("ADDED", "a", running("10.0.0.1"));
    let kube = kube(&server, 7946, &[]);
    assert_eq!(listing(&kube, &["10.0.0.1"]).await.gone, []);
    server.event("ADDED", "b", json!({"phase": "Pending"}));
    server.event("ADDED", "c", running("10.0.0.3"));
    listing(&kube, &["10.0.0.1", "10.0.0.3"]).await;
    server.event("MODIFIED", "b", running("10.0.0.2"));
    listing(&kube, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
    // Deleted by force, while its process may still run.
    server.event("DELETED", "c", running("10.0.0.3"));
    assert_eq!(listing(&kube, &["10.0.0.1", "10.0.0.2"]).await.gone, []);
    server.event("MODIFIED", "b", terminated("10.0.0.2", AT));
    server.event("DELETED", "b", terminated("10.0.0.2", AT));
    assert_eq!(listing(&kube, &["10.0.0.1"]).await.gone, [proof("10.0.0.2")]);
    assert_eq!(server.requests("watch=1"), 1);
    assert_eq!(server.requests(""), 2, "one list and one watch");
}

#[tokio::test]
async fn beside_a_native_sidecar_that_runs_on_the_end_of_the_main_container_proves_nothing() {
    let server = ApiServer::start().await;
    let end = json!({"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": AT}});
    let runs = json!({"state": {"running": {}}, "lastState": {}});
    let again = json!({"state": {"running": {}}, "lastState": end});
    let over = json!({"state": end, "lastState": {}});
    // An init container with `restartPolicy: Always` is listed among those that are over before the pod runs.
    let pod = |main: &Value, sidecar: &Value| {
        let (main, init) = (json!([main]), json!([over, sidecar]));
        json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": main, "initContainerStatuses": init})
    };
    server.event("ADDED", "a", pod(&runs, &runs));
    let kube = kube(&server, 7946, &[]);
    assert_eq!(listing(&kube, &["10.0.0.1"]).await.gone, []);
    server.event("MODIFIED", "a", pod(&again, &runs));
    server.event("ADDED", "b", running("10.0.0.2"));
    assert_eq!(listing(&kube, &["10.0.0.1", "10.0.0.2"]).await.gone, [], "the main container was started again");
    server.event("MODIFIED", "a", pod(&over, &runs));
    server.event("ADDED", "c", running("10.0.0.3"));
    let answer = listing(&kube, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
    assert_eq!(answer.gone, [], "sidecars are ended after the main container");
    server.event("MODIFIED", "a", pod(&over, &over));
    assert_eq!(listing(&kube, &["10.0.0.2", "10.0.0.3"]).await.gone, [proof("10.0.0.1")]);
}

#[tokio::test]
async fn a_broken_watch_goes_on_where_it_was_and_misses_nothing() {
    let server = ApiServer::start().await;
    server.event("ADDED", "a", running("10.0.0.1"));
    server.event("ADDED", "b", running("10.0.0.2"));
    let kube = kube(&server, 7946, &[]);
    listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    server.event("ADDED", "c", running("10.0.0.3"));
    listing(&kube, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
    // It breaks, and a pod comes and goes before anybody watches again.
    server.change(|kept| kept.generation += 1);
    server.event("MODIFIED", "b", terminated("10.0.0.2", AT));
    server.event("DELETED", "b", terminated("10.0.0.2", AT));
    assert_eq!(listing(&kube, &["10.0.0.1", "10.0.0.3"]).await.gone, [proof("10.0.0.2")]);
    let watches = server.requests("watch=1");
    assert_eq!((server.requests("") - watches, watches), (1, 2), "no second list");
}

#[tokio::test]
async fn a_version_that_is_too_old_is_listed_anew_and_what_was_missed_proves_nothing() {
    for gone_by_status in [true, false] {
        let server = ApiServer::start().await;
        server.event("ADDED", "a", running("10.0.0.1"));
        server.event("ADDED", "b", running("10.0.0.2"));
        let kube = kube(&server, 7946, &[]);
        listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
        server.event("ADDED", "c", running("10.0.0.3"));
        listing(&kube, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
        server.change(|kept| kept.generation += 1);
        server.event("MODIFIED", "b", terminated("10.0.0.2", AT));
        server.event("DELETED", "b", terminated("10.0.0.2", AT));
        server.change(|kept| {
            kept.gone_by_status = gone_by_status;
            kept.compacted = kept.version;
            kept.generation += 1;
        });
        assert_eq!(listing(&kube, &["10.0.0.1", "10.0.0.3"]).await.gone, [], "nobody saw it end");
        server.event("ADDED", "d", running("10.0.0.4"));
        listing(&kube, &["10.0.0.1", "10.0.0.3", "10.0.0.4"]).await;
    }
}

#[tokio::test]
async fn a_bookmark_is_where_the_watch_goes_on() {
    let server = ApiServer::start().await;
    server.event("ADDED", "a", running("10.0.0.1"));
    let kube = kube(&server, 7946, &[]);
    listing(&kube, &["10.0.0.1"]).await;
    server.event("ADDED", "b", running("10.0.0.2"));
    listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    // Others' pods changed; then what was before is forgotten, and the watch breaks.
    let version = server.change(|kept| {
        kept.version += 500;
        kept.version
    });
    listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    server.change(|kept| {
        kept.compacted = version;
        kept.generation += 1;
    });
    server.event("ADDED", "c", running("10.0.0.3"));
    listing(&kube, &["10.0.0.1", "10.0.0.2", "10.0.0.3"]).await;
    assert_eq!(server.requests(&format!("resourceVersion={version}")), 1);
}

#[tokio::test]
async fn without_permission_the_headless_name_goes_on_alone() {
    let goes_on = async |mood| {
        let server = ApiServer::start().await;
        server.change(|kept| kept.mood = mood);
        server.event("ADDED", "a", running("10.0.0.1"));
        let kube = kube(&server, 7946, &["10.0.0.8", "10.0.0.9"]);
        assert_eq!(kube.fallback(), None, "nothing was asked yet");
        assert_eq!(listing(&kube, &["10.0.0.8", "10.0.0.9"]).await.gone, []);
        assert_eq!(kube.towards().await.unwrap().unwrap().port(), 7946);
        let fallback = kube.fallback().unwrap();
        server.change(|kept| kept.mood = Mood::Well);
        watching(&kube, &["10.0.0.1"]).await;
        fallback
    };
    let (forbidden, broken) = tokio::join!(goes_on(Mood::Forbids), goes_on(Mood::Broken));
    assert!(forbidden.why.contains("refuses to list pods: 403"), "{forbidden:?}");
    assert!(forbidden.resolve.contains("allow this pod's service account to list and watch pods"), "{forbidden:?}");
    assert!(broken.why.contains("503"), "{broken:?}");
    assert!(broken.resolve.contains("see whether the API server is up"), "{broken:?}");
    assert!(broken.meanwhile.contains("the headless name goes on alone"), "{broken:?}");
}

/// Asks until the API server is watched again and lists these.
async fn watching(kube: &Kube<TestNet>, ips: &[&str]) {
    within("the API server is watched", async {
        while kube.fallback().is_some() {
            kube.ask(Timestamp::from_unix_ms(0)).await.unwrap();
        }
    })
    .await;
    listing(kube, ips).await;
}

#[tokio::test]
async fn an_api_server_that_goes_away_is_told_with_since_when_and_the_latest_reason() {
    let server = ApiServer::start().await;
    server.event("ADDED", "a", running("10.0.0.1"));
    let kube = kube(&server, 7946, &["10.0.0.8"]);
    listing(&kube, &["10.0.0.1"]).await;
    server.event("ADDED", "b", running("10.0.0.2"));
    listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    assert_eq!(kube.fallback(), None);
    let mut asked = 0;
    let mut fell_back = async |mood: Mood, why: &str| {
        server.change(|kept| {
            kept.mood = mood;
            kept.generation += 1;
        });
        within(&format!("it falls back because of {why}"), async {
            while !kube.fallback().is_some_and(|fallback| fallback.why.contains(why)) {
                asked += 1;
                kube.ask(Timestamp::from_unix_ms(asked)).await.unwrap();
            }
        })
        .await;
        (asked, kube.fallback().unwrap().since)
    };
    let (asked, since) = fell_back(Mood::Broken, "503").await;
    assert_eq!(since, Timestamp::from_unix_ms(asked), "the question that was not answered");
    // Who may list and not watch has not come back: one fallback, with the reason of now.
    assert_eq!(fell_back(Mood::ForbidsToWatch, "refuses to watch pods: 403").await.1, since);
    server.change(|kept| kept.mood = Mood::Well);
    watching(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    let (asked, again) = fell_back(Mood::Broken, "503").await;
    assert_eq!(again, Timestamp::from_unix_ms(asked), "another one");
}

#[tokio::test]
async fn the_token_is_read_again_and_sent_to_the_api_server() {
    let server = ApiServer::start().await;
    server.event("ADDED", "a", running("10.0.0.1"));
    let path = std::env::temp_dir().join(format!("quotum-kube-token-{}", std::process::id()));
    let config = KubeConfig {
        api: format!("http://{}", server.addr),
        namespace: "ns".into(),
        selector: "app=quotum".into(),
        token_file: Some(path.clone()),
        ca_file: None,
    };
    assert!(!format!("{config:?}").contains("first"));
    std::fs::write(&path, "first\n").unwrap();
    let kube = Kube::new(Arc::new(TestNet::default()), "quotum", 7946, config.clone()).unwrap();
    listing(&kube, &["10.0.0.1"]).await;
    std::fs::write(&path, "second\n").unwrap();
    server.event("ADDED", "b", running("10.0.0.2"));
    listing(&kube, &["10.0.0.1", "10.0.0.2"]).await;
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        (server.requests("authorization: Bearer first"), server.requests("authorization: Bearer second")),
        (1, 1)
    );
    let missing = KubeConfig { ca_file: Some("/nothing/there".into()), ..config };
    let error = Kube::new(Arc::new(TestNet::default()), "quotum", 7946, missing).unwrap_err();
    assert!(error.contains("/nothing/there"), "{error}");
}

/// Whole replicas on addresses of loopback, all at one port, as pods are.
#[tokio::test]
async fn pods_join_by_the_api_server_and_a_crashed_one_is_proven_gone() {
    let server = ApiServer::start().await;
    let first = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = first.local_addr().unwrap().port();
    let second = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 2), port)).unwrap();
    let mut fleet = Vec::new();
    for (name, socket) in [("a", first), ("b", second)] {
        let addr = socket.local_addr().unwrap();
        server.event("ADDED", name, running(&addr.ip().to_string()));
        let limiter = Limiter::builder()
            .deployment("model", [Quota::tokens(900).per(Duration::from_secs(3_600)).at_once()])
            .build()
            .unwrap();
        // The name knows nobody: what is found is found by the API server.
        let config = ClusterConfig {
            listen: addr,
            advertise: Some(addr),
            node: name.into(),
            interval: Duration::from_millis(20),
            keys: KeyRing::of([7; 32]),
            ..ClusterConfig::new(Seeds::By(kube(&server, port, &[])))
        };
        let net = TestNet(Vec::new(), Mutex::new(Some(socket)));
        fleet.push((limiter.clone(), Cluster::join(&limiter, config, net).await.unwrap(), addr));
        for (limiter, ..) in &fleet {
            until("it has joined", || limiter.status().joined.is_some()).await;
            until("it hears the others", || {
                limiter.status().peers.iter().filter(|peer| peer.reachable).count() == fleet.len() - 1
            })
            .await;
        }
    }
    let (_, crashed, addr) = fleet.pop().unwrap();
    let (limiter, ..) = &fleet[0];
    let (id, ip) = (crashed.me(), addr.ip().to_string());
    drop(crashed);
    // Later than its id by more than two clocks may differ.
    let at = jiff_text(id.started().unix_ms() + 3_600_000);
    assert!(limiter.status().peers.iter().all(|peer| peer.gone.is_none()));
    server.event("MODIFIED", "b", terminated(&ip, &at));
    until("the kubelet's word is believed", || {
        limiter.status().peers.iter().any(|peer| peer.id == id && peer.gone.is_some())
    })
    .await;
}

/// An instant as Kubernetes writes it.
fn jiff_text(ms: u64) -> String {
    jiff::Timestamp::from_millisecond(i64::try_from(ms).unwrap()).unwrap().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

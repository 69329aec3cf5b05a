//! Fleets of the `quotum` command as their operators meet them: real processes on loopback,
//! a stub upstream that counts for itself, and what status and metrics say when pods die,
//! strangers send, or somebody configured another limit.

#![cfg(feature = "server")]
#![allow(missing_docs)]

mod process;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use process::fleet::{Fleet, LIMIT, PORT_IN_USE, Running, free_ports};
use process::{Folder, PATIENCE, ask, send, until};
use serde_json::{Value, json};

#[test]
fn three_pods_hold_one_limit_by_the_upstreams_own_count() {
    let fleet = Fleet::start(&[LIMIT; 3]);
    // All at once first: each goes on until it has been refused.
    std::thread::scope(|scope| {
        for pod in &fleet.pods {
            scope.spawn(|| while pod.serves() {});
        }
    });
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!(count <= LIMIT, "{count}");
    assert!(count >= LIMIT * 97 / 100, "{count}");
    let answer = fleet.pods[0].chat("");
    assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("x-quotum-refused-by: quotum"), "{answer}");
    for pod in &fleet.pods {
        // What one refused another has spent.
        until("it knows what all have used", || {
            pod.metric(r#"quotum_used{deployment="a",unit="tokens",window="8640000s"}"#) == count as f64
        });
    }
}

#[test]
fn after_kill_9_the_others_serve_and_show_it_and_a_new_process_takes_the_slot() {
    let mut fleet = Fleet::start(&[LIMIT; 3]);
    for pod in &fleet.pods {
        assert!(pod.serves());
    }
    let dead = fleet.pods.pop().unwrap();
    let id = dead.addr("replica").to_owned();
    drop(dead);
    for pod in &fleet.pods {
        assert!(pod.serves());
        until("its silence is seen", || pod.peer(&id)["reachable"] == false);
        assert_eq!(pod.peer(&id)["gone_from_unix_ms"], Value::Null, "silence proves nothing");
        until("metrics say so", || pod.metric(r#"quotum_peers{reachable="false"}"#) == 1.0);
        assert_eq!(pod.metric(r#"quotum_peers{reachable="true"}"#), 1.0);
        let unreachable = r#"quotum_rights_unreachable{deployment="a",unit="tokens",window="8640000s"}"#;
        assert!(pod.metric(unreachable) > 0.0);
        assert!(ask(pod.addr("admin"), "GET", "/readyz", "", "").starts_with("HTTP/1.1 200"));
        assert!(pod.serves());
    }
    fleet.pods.push(fleet.run(2).unwrap_or_else(|code| panic!("{code:?}: {}", fleet.log(2))));
    let newcomer = &fleet.pods[2];
    until("it is ready", || ask(newcomer.addr("admin"), "GET", "/readyz", "", "").starts_with("HTTP/1.1 200"));
    until("it serves with the rights of the others", || newcomer.serves());
    for pod in &fleet.pods[..2] {
        until("the slot proves the death", || pod.peer(&id)["gone_from_unix_ms"].is_u64());
        assert_eq!(pod.peer(newcomer.addr("replica"))["reachable"], true);
    }
    fleet.exhaust();
    let count = fleet.upstreams_count();
    // The dead one used 30 of its third.
    assert!(count <= LIMIT - LIMIT / 3 + 30, "{count}");
    assert!(count >= LIMIT / 2, "{count}");
}

#[test]
fn what_strangers_send_is_counted_by_reason_and_changes_nothing() {
    let fleet = Fleet::start(&[LIMIT; 2]);
    let target = &fleet.gossip[0];
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(b"hello", target).unwrap();
    stranger.send_to(&[0x5a; 1_201], target).unwrap();
    stranger.send_to(&[], target).unwrap();
    // Pods that list ours, one without a key and one with another.
    let outsiders: Vec<_> = ["", &"a5".repeat(32)].into_iter().map(|key| outsider(&fleet, target, key)).collect();
    let rejected = |reason| fleet.pods[0].metric(&format!(r#"quotum_frames_rejected_total{{reason="{reason}"}}"#));
    for (reason, at_least) in [("foreign", 2.0), ("too_long", 1.0), ("unsealed", 1.0), ("key", 1.0)] {
        until(reason, || rejected(reason) >= at_least);
    }
    assert_eq!(rejected("seal"), 0.0);
    assert_eq!(fleet.pods[1].metric(r#"quotum_frames_rejected_total{reason="foreign"}"#), 0.0);
    let status = fleet.pods[0].status();
    assert_eq!(status["peers"].as_array().unwrap().len(), 1, "{status}");
    assert_eq!(status["gossip"]["healthy"], true);
    for metric in ["sent", "sent_bytes", "received", "received_bytes"] {
        for way in ["direct", "chitchat"] {
            let name = format!(r#"quotum_gossip_{metric}_total{{way="{way}"}}"#);
            until(&name, || fleet.pods[0].metric(&name) > 0.0);
        }
    }
    for outsider in &outsiders {
        assert_eq!(outsider.status()["ready"], false, "nobody has answered it");
    }
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!((LIMIT * 97 / 100..=LIMIT).contains(&count), "{count}");
    let log = fleet.log(0);
    assert!(log.contains("a frame was thrown away"), "an operator reads of it: {log}");
}

/// A pod that is not of the fleet but sends to it.
fn outsider(fleet: &Fleet, target: &str, key: &str) -> Running {
    let config = fleet.configure(9, LIMIT);
    let key = (!key.is_empty()).then(|| fleet.folder.write("other-key", key));
    loop {
        let own = free_ports(1).remove(0);
        let seeds = format!("{own},{target}");
        let mut arguments = vec!["serve", "--config", &config, "--gossip-listen", &own, "--gossip-advertise", &own];
        arguments.extend(["--seeds", &seeds, "--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        if let Some(key) = &key {
            arguments.extend(["--gossip-key-file", key]);
        }
        match Running::start(&fleet.folder, "outsider", &arguments) {
            Ok(pod) => return pod,
            Err(PORT_IN_USE) => {}
            Err(code) => panic!("{code:?}: {}", fleet.folder.read("outsider.log")),
        }
    }
}

#[test]
fn another_limit_for_the_same_deployment_is_named_and_the_larger_holds() {
    let fleet = Fleet::start(&[LIMIT, LIMIT, LIMIT / 2]);
    let other = fleet.pods[2].addr("replica");
    for pod in &fleet.pods {
        assert!(pod.serves());
    }
    for (pod, theirs) in [(0, LIMIT / 2), (1, LIMIT / 2), (2, LIMIT)] {
        let pod = &fleet.pods[pod];
        let peer = if theirs == LIMIT { fleet.pods[0].addr("replica") } else { other };
        until("metrics name the peer", || {
            pod.metric(&format!(r#"quotum_config_mismatch{{deployment="a",peer="{peer}"}}"#)) == 1.0
        });
        let status = pod.status();
        let mismatches = status["limits"][0]["mismatches"].as_array().unwrap();
        let named = mismatches.iter().find(|mismatch| mismatch["peer"] == peer).unwrap();
        assert!(named["theirs"].as_str().unwrap().contains(&format!("{theirs} tokens")), "{named}");
    }
    let admin = format!("http://{}", fleet.pods[0].addr("admin"));
    let command = Command::new(env!("CARGO_BIN_EXE_quotum")).args(["status", "--admin", &admin]).output().unwrap();
    let text = String::from_utf8(command.stdout).unwrap();
    assert!(text.contains(&format!("{other} has another limit")), "{text}");
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!(count <= LIMIT, "{count}");
}

/// Starts a pod alone on loopback that looks for others there; starts over if its port is taken.
fn lone(folder: &Folder, ip: &str, seeds: impl Fn(&str, &str) -> String) -> (Running, String) {
    loop {
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        let own = socket.local_addr().unwrap().to_string();
        let seeds = seeds(&own, own.rsplit_once(':').unwrap().1);
        drop(socket);
        let mut arguments = vec!["serve", "--gossip-listen", &own, "--gossip-advertise", &own, "--seeds", &seeds];
        arguments.extend(["--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        match Running::start(folder, "lone", &arguments) {
            Ok(pod) => return (pod, own),
            Err(PORT_IN_USE) => {}
            Err(code) => panic!("{code:?}: {}", folder.read("lone.log")),
        }
    }
}

/// What blocks a pod is in /status, in `quotum status`, in the metrics and once in the log,
/// each with what resolves it.
fn is_shown_everywhere(pod: &Running, log: impl Fn() -> String, who: &str, why: &str, resolve: &str) {
    until(&format!("{why} is in /status"), || {
        let status = pod.status();
        let text = |block: &Value, field: &str| block[field].as_str().unwrap().to_owned();
        status["blocked"].as_array().unwrap().iter().any(|block| {
            text(block, "who") == who && text(block, "why").contains(why) && text(block, "resolve").contains(resolve)
        })
    });
    let admin = format!("http://{}", pod.addr("admin"));
    let command = Command::new(env!("CARGO_BIN_EXE_quotum")).args(["status", "--admin", &admin]).output().unwrap();
    let text = String::from_utf8(command.stdout).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with(&format!("blocked {who}: ")));
    assert!(lines.any(|line| line.contains(why) && line.contains(resolve)), "{text}");
    assert_eq!(pod.metric(&format!(r#"quotum_roster_blocked{{replica="{who}"}}"#)), 1.0);
    let said = || log().lines().filter(|line| line.contains("held up by") && line.contains(why)).count();
    until("it is in the log", || said() > 0);
    assert_eq!(said(), 1, "{}", log());
    assert!(log().lines().any(|line| line.contains("held up by") && line.contains(resolve)), "{}", log());
}

#[test]
fn a_listed_address_that_never_answers_is_shown_everywhere() {
    let folder = Folder::new();
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let (pod, _) = lone(&folder, "127.0.0.1", |own, _| format!("{own},{silent}"));
    let resolve = format!("quotum forget {silent}");
    is_shown_everywhere(&pod, || folder.read("lone.log"), &silent, "no replica has ever answered", &resolve);
    let admin = format!("http://{}", pod.addr("admin"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_quotum"));
    let forgotten = command.args(["forget", &silent, "--admin", &admin]).status().unwrap();
    assert!(forgotten.success(), "what is told is what helps");
    until("nothing blocks it", || pod.status()["blocked"] == json!([]));
    until("it has joined", || pod.status()["joined_at_unix_ms"].is_u64());
}

#[test]
fn a_name_that_does_not_resolve_is_shown_everywhere() {
    let folder = Folder::new();
    let (pod, own) = lone(&folder, "127.0.0.1", |_, port| format!("quotum.invalid:{port}"));
    let why = "quotum.invalid gives no answer";
    is_shown_everywhere(&pod, || folder.read("lone.log"), &own, why, "getent ahosts quotum.invalid");
}

#[test]
fn a_name_without_my_own_address_is_shown_everywhere() {
    let folder = Folder::new();
    let (pod, own) = lone(&folder, "127.0.0.2", |_, port| format!("localhost:{port}"));
    let why = "does not list this replica's own address";
    is_shown_everywhere(&pod, || folder.read("lone.log"), &own, why, "publishNotReadyAddresses");
}

#[test]
fn a_live_peer_that_the_static_list_lacks_is_shown_everywhere() {
    let fleet = Fleet::start(&[LIMIT]);
    let stranger = outsider(&fleet, &fleet.gossip[0], &"5a".repeat(32));
    let who = stranger.addr("gossip").to_owned();
    let resolve = format!("add {who} to gossip.seeds");
    is_shown_everywhere(&fleet.pods[0], || fleet.log(0), &who, "does not name", &resolve);
}

#[test]
fn a_second_process_in_a_slot_is_69_and_does_not_hurt_the_first() {
    let fleet = Fleet::start(&[LIMIT; 2]);
    assert_eq!(fleet.run(0).err(), Some(PORT_IN_USE));
    assert!(fleet.log(0).contains(&fleet.gossip[0]), "{}", fleet.log(0));
    let proxy = fleet.pods[0].addr("proxy");
    let arguments = ["serve", "--proxy-listen", proxy, "--admin-listen", "127.0.0.1:0"];
    assert_eq!(Running::start(&fleet.folder, "second", &arguments).err(), Some(PORT_IN_USE));
    let log = fleet.folder.read("second.log");
    assert!(log.contains(proxy) && log.contains("proxy"), "{log}");
    for pod in &fleet.pods {
        assert!(pod.serves());
        assert_eq!(pod.status()["peers"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn a_pod_told_to_stop_ends_its_stream_hands_over_and_says_goodbye() {
    let mut fleet = Fleet::start(&[LIMIT; 2]);
    for pod in &fleet.pods {
        assert!(pod.serves());
    }
    let mut leaver = fleet.pods.remove(0);
    let id = leaver.addr("replica").to_owned();
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": true});
    let body = body.to_string();
    let lasts = "x-stub-body-ms: 1500\r\nx-stub-completion-tokens: 90\r\nx-stub-prompt-tokens: 5\r\n";
    let mut stream = send(leaver.addr("proxy"), "POST", "/v1/chat/completions", lasts, &body);
    stream.read_exact(&mut [0; 1]).unwrap();
    until("its readiness was seen", || fleet.log(0).contains(r#""event":"ready""#));
    leaver.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(leaver.child.wait().unwrap().code(), Some(0), "{}", fleet.log(0));
    let pod = &fleet.pods[0];
    for event in ["started", "joined", "ready", "draining", "left"] {
        let field = format!(r#""event":"{event}""#);
        assert_eq!(fleet.log(0).matches(&field).count(), 1, "{event} is one line: {}", fleet.log(0));
    }
    assert!(!fleet.log(0).contains("key_rotated"), "the keys of the start are no change: {}", fleet.log(0));
    until("the goodbye is heard", || pod.peer(&id)["gone_from_unix_ms"].is_u64());
    let gone = format!(r#""event":"peer_gone","replica":"{id}""#);
    until("its log says so", || fleet.log(1).contains(&gone));
    // 30 by each, 95 by the stream: the other one has all that is left.
    let spendable = r#"quotum_spendable{deployment="a",unit="tokens",window="8640000s"}"#;
    until("it has every right", || pod.metric(spendable) == (LIMIT - 30 - 30 - 95) as f64);
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!((LIMIT * 97 / 100..=LIMIT).contains(&count), "{count}");
}

#[test]
fn requests_that_never_come_whole_do_not_keep_a_pod_from_stopping() {
    let mut fleet = Fleet::start(&[LIMIT]);
    let mut pod = fleet.pods.remove(0);
    let beginnings: [&[u8]; 4] = [
        b"",
        b"POST /v1/chat",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: ",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ];
    let connections = beginnings.map(|beginning| {
        let mut stream = TcpStream::connect(pod.addr("proxy")).unwrap();
        stream.write_all(beginning).unwrap();
        stream
    });
    assert!(pod.serves());
    pod.signal("TERM");
    assert_eq!(pod.ended(), Some(0), "{}", fleet.log(0));
    drop(connections);
}

#[test]
fn a_full_disk_for_the_log_stops_nothing() {
    let fleet = Fleet::start(&[LIMIT]);
    let config = fleet.configure(1, LIMIT);
    let mut command = Command::new(env!("CARGO_BIN_EXE_quotum"));
    command.args(["serve", "--config", &config, "--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    command.env_clear().env("RUST_LOG", "trace").stdin(Stdio::null()).stdout(Stdio::piped());
    // Every write to it fails as on a full disk.
    command.stderr(fs::File::options().write(true).open("/dev/full").unwrap());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut pod = Running { child, line: serde_json::from_str(&line).unwrap() };
    assert!(pod.serves());
    pod.signal("TERM");
    assert_eq!(pod.ended(), Some(0));
}

#[test]
fn the_key_is_rotated_while_the_pods_serve_and_is_shown_nowhere() {
    let fleet = Fleet::start(&[LIMIT; 3]);
    let (old, new) = ("5a".repeat(32), "c3".repeat(32));
    let steps = [format!("{old}\n{new}\n"), format!("{new}\n{old}\n"), format!("{new}\n")];
    let told = |number: usize| fleet.log(number).matches("the key file changed").count();
    for (step, keys) in (1..).zip(&steps) {
        fleet.folder.write("key", keys);
        for (number, pod) in fleet.pods.iter().enumerate() {
            // Those that were not told yet may look by themselves: any order must do.
            pod.signal("HUP");
            until("it reads the file again", || told(number) == step);
            assert!(pod.serves());
            fleet.until_it_reaches(pod, 2);
        }
    }
    fleet.folder.write("key", "no key\n");
    fleet.pods[0].signal("HUP");
    until("a wrong file is named", || fleet.log(0).contains("line 1 of the key file is not 64 hex digits"));
    fleet.until_it_reaches(&fleet.pods[0], 2);
    for (number, pod) in fleet.pods.iter().enumerate() {
        for reason in ["key", "seal", "unsealed"] {
            assert_eq!(pod.metric(&format!(r#"quotum_frames_rejected_total{{reason="{reason}"}}"#)), 0.0, "{reason}");
        }
        let shown = ["/status", "/metrics"].map(|path| ask(pod.addr("admin"), "GET", path, "", ""));
        for text in shown.iter().chain([&fleet.log(number)]) {
            assert!(!text.contains(&old) && !text.contains(&new) && !text.contains("no key\\n"), "{text}");
        }
    }
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!((LIMIT * 97 / 100..=LIMIT).contains(&count), "{count}");
}

#[test]
fn a_pod_told_to_stop_lingers_for_those_who_have_not_heard_and_a_second_signal_ends_it() {
    let mut fleet = Fleet::start_with(&[LIMIT; 2], "proxy: { linger: 1h }\n");
    let mut pod = fleet.pods.remove(0);
    assert!(pod.serves());
    pod.signal("TERM");
    until("it wants no traffic", || ask(pod.addr("admin"), "GET", "/readyz", "", "").starts_with("HTTP/1.1 503"));
    assert!(pod.serves(), "who has not heard of it yet is served");
    assert!(ask(pod.addr("admin"), "GET", "/livez", "", "").starts_with("HTTP/1.1 200"));
    pod.signal("TERM");
    assert_eq!(pod.ended(), Some(143), "{}", fleet.log(0));
}

#[test]
fn a_stream_longer_than_the_drain_is_cut_and_the_rights_are_handed_over() {
    let mut fleet = Fleet::start_with(&[LIMIT; 2], "proxy: { drain: 1s }\n");
    let mut leaver = fleet.pods.remove(0);
    let id = leaver.addr("replica").to_owned();
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": true});
    let endless = "x-stub-body-ms: 600000\r\nx-stub-completion-tokens: 90\r\n";
    let mut stream = send(leaver.addr("proxy"), "POST", "/v1/chat/completions", endless, &body.to_string());
    stream.read_exact(&mut [0; 1]).unwrap();
    leaver.signal("TERM");
    assert_eq!(leaver.ended(), Some(0), "{}", fleet.log(0));
    assert!(fleet.log(0).contains("longer than proxy.drain"), "{}", fleet.log(0));
    let pod = &fleet.pods[0];
    until("the goodbye is heard", || pod.peer(&id)["gone_from_unix_ms"].is_u64());
    let spendable = r#"quotum_spendable{deployment="a",unit="tokens",window="8640000s"}"#;
    // What the stream had reserved stays charged; it is less than 250 tokens.
    until("it has every other right", || pod.metric(spendable) > (LIMIT - 250) as f64);
}

#[test]
fn rolling_replacement_of_every_pod_under_load_loses_at_most_a_fiftieth_and_is_never_over() {
    let mut fleet = Fleet::start(&[LIMIT; 3]);
    // A pod that leaves before it was ever asked takes no share and hands none over, while the others
    // have counted it: its share of the running window is lost. Not mended yet.
    for pod in &fleet.pods {
        assert!(pod.serves());
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    let proxies: std::sync::Mutex<Vec<String>> =
        std::sync::Mutex::new(fleet.pods.iter().map(|pod| pod.addr("proxy").to_owned()).collect());
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}).to_string();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let used = "x-stub-prompt-tokens: 10\r\nx-stub-completion-tokens: 20\r\n";
            // Slow enough that budget is left when the last pod has been replaced.
            while !stop.load(Ordering::Relaxed) {
                let all = proxies.lock().unwrap().clone();
                for proxy in all {
                    ask_if_there(&proxy, &format!("x-stub-body-ms: 300\r\n{used}"), &body);
                }
            }
        });
        for number in 0..3 {
            let mut old = fleet.pods.remove(0);
            // As a service that has heard of it.
            proxies.lock().unwrap().retain(|proxy| proxy != old.addr("proxy"));
            old.signal("TERM");
            assert_eq!(old.ended(), Some(0), "{}", fleet.log(number));
            let new = fleet.run(number).unwrap_or_else(|code| panic!("{code:?}: {}", fleet.log(number)));
            until("it is ready", || ask(new.addr("admin"), "GET", "/readyz", "", "").starts_with("HTTP/1.1 200"));
            proxies.lock().unwrap().push(new.addr("proxy").to_owned());
            fleet.pods.push(new);
        }
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap();
    });
    fleet.exhaust();
    let count = fleet.upstreams_count();
    assert!((LIMIT * 98 / 100..=LIMIT).contains(&count), "{count}");
}

/// As [`ask`], of a pod that may be going; `None` if it does not answer.
fn ask_if_there(addr: &str, headers: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(addr).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn a_restart_of_the_whole_fleet_waits_for_the_next_window_if_told_to() {
    let settings = "gossip: { first_window: wait }\n";
    let mut fleet = Fleet::start(&[LIMIT; 2]);
    for pod in &fleet.pods {
        assert!(pod.serves());
    }
    let before = fleet.upstreams_count();
    // All at once, without a word.
    fleet.pods.clear();
    fleet.settings = settings.into();
    for number in 0..2 {
        fleet.configure(number, LIMIT);
        let pod = fleet.run(number).unwrap_or_else(|code| panic!("{code:?}: {}", fleet.log(number)));
        fleet.pods.push(pod);
    }
    for pod in &fleet.pods {
        until("it has joined", || pod.status()["joined_at_unix_ms"].is_u64());
        assert_eq!(pod.status()["has_share"], false, "nobody knows what was spent of this window");
        assert!(pod.chat("").starts_with("HTTP/1.1 429"));
    }
    assert_eq!(fleet.upstreams_count(), before);
}

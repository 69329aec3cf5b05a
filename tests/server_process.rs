//! The `quotum` command as its users meet it: real processes on loopback.

#![cfg(feature = "server")]
#![allow(missing_docs)]

mod process;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream, UdpSocket};

use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use process::{Folder, ask, send, until};
use serde_json::{Value, json};

const DEPLOYMENT: &str = "deployments:\n  - id: a\n    model: m\n    upstream: STUB/v1\n    api_key: sk-upstream\n    \
    limits:\n      - { unit: tokens, amount: 100000, window: 100d, at_once: true }\n";

fn quotum() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quotum"));
    command.env_clear().stdin(Stdio::null());
    command
}

/// A process that has said where it listens, ended when it is dropped.
struct Running {
    child: Child,
    out: BufReader<ChildStdout>,
    line: Value,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = quotum().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let line = serde_json::from_str(&line).unwrap_or_else(|_| {
            let mut errors = String::new();
            child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
            panic!("it printed {line:?} and {errors}");
        });
        Self { child, out, line }
    }

    fn addr(&self, what: &str) -> String {
        self.line[what].as_str().unwrap().to_owned()
    }

    fn signal(&self, name: &str) {
        process::signal(&self.child, name);
    }

    /// Waits for its end; returns the code, what it printed after its line, and its log.
    fn ended(mut self) -> (Option<i32>, String, String) {
        let (mut printed, mut log) = (String::new(), String::new());
        self.out.read_to_string(&mut printed).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), printed, log)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stub and a pod before it.
fn stub_and_pod(folder: &Folder, config: &str) -> (Running, Running) {
    let stub = Running::start(&["stub", "--listen", "127.0.0.1:0"]);
    let listen = "proxy: { listen: '127.0.0.1:0' }\nadmin: { listen: '127.0.0.1:0' }\n";
    let text = format!("{listen}{config}").replace("STUB", &format!("http://{}", stub.addr("stub")));
    let pod = Running::start(&["serve", "--config", &folder.write("quotum.yaml", &text)]);
    (stub, pod)
}

fn chat(stream: bool) -> String {
    json!({"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}], "max_tokens": 50, "stream": stream})
        .to_string()
}

fn failed(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_pod_serves_says_where_and_drains_when_told_to_stop() {
    let folder = Folder::new();
    let (_stub, pod) = stub_and_pod(&folder, DEPLOYMENT);
    assert!(pod.line["gossip"].is_null());
    assert_eq!(pod.line["replica"].as_str().unwrap().len(), 32);
    let (proxy, admin) = (pod.addr("proxy"), pod.addr("admin"));
    assert!(ask(&admin, "GET", "/readyz", "", "").starts_with("HTTP/1.1 200"));
    assert!(ask(&proxy, "POST", "/v1/chat/completions", "", &chat(false)).contains("\"usage\""));

    // In flight when the signal comes: begun, and told to last.
    let slow = "x-stub-body-ms: 700\r\n";
    let mut stream = send(&proxy, "POST", "/v1/chat/completions", slow, &chat(true));
    let mut first = [0; 1];
    stream.read_exact(&mut first).unwrap();
    pod.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let (code, printed, log) = pod.ended();
    assert_eq!((code, printed.as_str()), (Some(0), ""), "{log}");
    for secret in ["secret prompt", "sk-upstream"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[test]
fn a_stream_that_the_upstream_cuts_says_so_before_it_breaks() {
    let folder = Folder::new();
    let (_stub, pod) = stub_and_pod(&folder, DEPLOYMENT);
    let answer = ask(&pod.addr("proxy"), "POST", "/v1/chat/completions", "x-stub-fault: cut\r\n", &chat(true));
    assert!(answer.contains(r#""code":"upstream_cut""#), "{answer}");
    // Without the last, empty chunk: whoever reads no events sees that it is not whole.
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
}

#[test]
fn a_second_signal_ends_a_pod_at_once() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let folder = Folder::new();
        let (_stub, pod) = stub_and_pod(&folder, DEPLOYMENT);
        let slow = "x-stub-body-ms: 600000\r\n";
        let mut stream = send(&pod.addr("proxy"), "POST", "/v1/chat/completions", slow, &chat(true));
        stream.read_exact(&mut [0; 1]).unwrap();
        let admin = pod.addr("admin");
        pod.signal("TERM");
        // The first one has been heard once it is not ready any more.
        while ask(&admin, "GET", "/readyz", "", "").starts_with("HTTP/1.1 200") {}
        pod.signal(signal);
        assert_eq!(pod.ended().0, Some(code));
    }
}

#[test]
fn without_a_config_a_stub_is_served() {
    let pod = Running::start(&["serve", "--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    let body = chat(false).replace("\"m\"", "\"stub\"");
    assert!(ask(&pod.addr("proxy"), "POST", "/v1/chat/completions", "", &body).starts_with("HTTP/1.1 200"));
}

/// Returns the lines of a log with this event; every line must have one.
fn events(log: &str, event: &str) -> Vec<Value> {
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let named = lines.inspect(|line| assert!(line["event"].is_string() && line["message"].is_string(), "{line}"));
    named.filter(|line| line["event"] == event).collect()
}

#[test]
fn a_line_that_cannot_be_printed_stops_no_pod_and_stands_in_the_log() {
    let listen = ["--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--node", "pod-one"];
    let mut pod = quotum();
    pod.arg("serve").args(listen).env("RUST_LOG", "info,quotum=loud");
    let mut pod = pod.stdout(fs::File::create("/dev/full").unwrap()).stderr(Stdio::piped()).spawn().unwrap();
    let mut errors = BufReader::new(pod.stderr.take().unwrap());
    let mut log = String::new();
    while !log.contains("not_announced") {
        assert!(errors.read_line(&mut log).unwrap() > 0, "it ended: {log}");
    }
    let told = events(&log, "not_announced").remove(0);
    assert!(told["error"].as_str().unwrap().contains("No space left"), "{told}");
    let line = told["message"].as_str().unwrap();
    let line: Value = serde_json::from_str(&line[line.find('{').unwrap()..]).unwrap();
    assert!(ask(line["admin"].as_str().unwrap(), "GET", "/livez", "", "").starts_with("HTTP/1.1 200"));
    process::signal(&pod, "TERM");
    errors.read_to_string(&mut log).unwrap();
    assert_eq!(pod.wait().unwrap().code(), Some(0), "{log}");
    assert_eq!(events(&log, "started")[0]["node"], "pod-one");
    assert_eq!(events(&log, "log_filter_refused").len(), 1, "{log}");
    assert_eq!(events(&log, "open_files").len() + events(&log, "open_files_low").len(), 1, "{log}");
}

#[test]
fn a_pod_with_too_few_files_says_so_and_how_often_and_serves_who_is_let_in() {
    let folder = Folder::new();
    let log = folder.path("log");
    let limited =
        r#"ulimit -Sn 20; ulimit -Hn 60; exec "$0" serve --proxy-listen 127.0.0.1:0 --admin-listen 127.0.0.1:0"#;
    let mut pod = Command::new("sh");
    pod.env_clear().args(["-c", limited, env!("CARGO_BIN_EXE_quotum")]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut pod = pod.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(pod.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line: Value = serde_json::from_str(&line).unwrap();
    let proxy = line["proxy"].as_str().unwrap();
    let callers: Vec<_> = (0..80).map(|_| TcpStream::connect(proxy).unwrap()).collect();
    until("a connection could not be accepted", || folder.read("log").contains("accept_failed"));
    drop(callers);
    assert!(ask(proxy, "GET", "/v1/models", "", "").starts_with("HTTP/1.1 200"));
    process::signal(&pod, "KILL");
    pod.wait().unwrap();
    let log = folder.read("log");
    let low = events(&log, "open_files_low").remove(0);
    assert_eq!((&low["was"], &low["limit"], &low["needed"]), (&json!(20), &json!(60), &json!(10_100)));
    assert_eq!(events(&log, "accept_failed").len(), 1, "{log}");
}

#[test]
fn an_upstream_that_fails_is_said_once_and_so_is_that_it_works_again() {
    let folder = Folder::new();
    let (_stub, pod) = stub_and_pod(&folder, DEPLOYMENT);
    let proxy = pod.addr("proxy");
    for fault in ["500", "503", "", "cut", "500", "500", "500", "503", "500", "500", "", ""] {
        let _ = ask(&proxy, "POST", "/v1/chat/completions", &format!("x-stub-fault: {fault}\r\n"), &chat(true));
    }
    pod.signal("TERM");
    let (_, _, log) = pod.ended();
    let failing = events(&log, "upstream_failing");
    assert_eq!(failing.len(), 1, "{log}");
    let said = [&failing[0]["level"], &failing[0]["deployment"], &failing[0]["outcome"], &failing[0]["status"]];
    assert_eq!(said, [&json!("WARN"), &json!("a"), &json!("server_error"), &json!(503)]);
    assert_eq!(failing[0]["in_a_row"], 5);
    assert_eq!(events(&log, "upstream_works").len(), 1, "{log}");
}

#[test]
fn no_credential_and_no_prompt_is_logged_at_any_level() {
    let folder = Folder::new();
    let credentials = folder.write("credentials", "sk-caller\n");
    let stub = Running::start(&["stub", "--listen", "127.0.0.1:0"]);
    let text = format!(
        "proxy: {{ listen: '127.0.0.1:0', credentials_file: '{credentials}' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n{DEPLOYMENT}"
    );
    let text = text.replace("STUB", &format!("http://{}", stub.addr("stub")));
    let config = folder.write("quotum.yaml", &text);
    let log = folder.path("log");
    let mut child = quotum();
    child.args(["serve", "--config", &config]).env("RUST_LOG", "trace").stdout(Stdio::piped());
    let mut child = child.stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let proxy = serde_json::from_str::<Value>(&line).unwrap()["proxy"].as_str().unwrap().to_owned();
    for fault in ["none", "500", "400", "cut", "garbage"] {
        for stream in [false, true] {
            let headers = format!("authorization: Bearer sk-caller\r\nx-stub-fault: {fault}\r\n");
            let _ = ask(&proxy, "POST", "/v1/chat/completions", &headers, &chat(stream));
        }
    }
    let wrong = "authorization: Bearer sk-wrong\r\n";
    assert!(ask(&proxy, "POST", "/v1/chat/completions", wrong, &chat(false)).starts_with("HTTP/1.1 401"));
    assert!(
        ask(&proxy, "POST", "/v1/chat/completions", "x-api-key: sk-caller\r\n", "{\"a secret prompt")
            .starts_with("HTTP/1.1 400")
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(&log).unwrap();
    for secret in ["secret prompt", "sk-upstream", "sk-caller", "sk-wrong"] {
        let line = log.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} in {}", line.unwrap_or_default());
    }
}

#[test]
fn a_bad_config_is_64_with_file_line_and_field() {
    let folder = Folder::new();
    let file = folder.write("bad.yaml", &DEPLOYMENT.replace("STUB", "http://h").replace("100000", "-1"));
    for command in [&["check-config", &file][..], &["serve", "--config", &file]] {
        let (code, told) = failed(&quotum().args(command).output().unwrap());
        assert_eq!(code, Some(64));
        assert!(
            told.contains("bad.yaml:7:33: deployments[0].limits[0].amount: -1 would let nothing through"),
            "{told}"
        );
    }
    let file = folder.write("good.yaml", &DEPLOYMENT.replace("STUB", "http://h"));
    assert!(quotum().args(["check-config", &file]).output().unwrap().status.success());
    assert_eq!(quotum().args(["serve", "--no-such-flag"]).output().unwrap().status.code(), Some(64));
}

#[test]
fn a_port_in_use_and_an_unreadable_key_file_are_69() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for flags in [
        ["--proxy-listen", &taken, "--admin-listen", "127.0.0.1:0"],
        ["--admin-listen", &taken, "--proxy-listen", "127.0.0.1:0"],
    ] {
        let (code, told) = failed(&quotum().arg("serve").args(flags).output().unwrap());
        assert_eq!(code, Some(69), "{told}");
        assert!(told.contains(&taken), "{told}");
    }
    let gossip = UdpSocket::bind("127.0.0.1:0").unwrap();
    let gossip = gossip.local_addr().unwrap().to_string();
    let flags = ["--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--seeds", &gossip];
    let gossiping = ["--gossip-listen", &gossip, "--gossip-advertise", &gossip];
    let (code, told) = failed(&quotum().arg("serve").args(flags).args(gossiping).output().unwrap());
    assert_eq!(code, Some(69), "{told}");
    let (code, told) = failed(&quotum().args(["serve", "--gossip-key-file", "/nonexistent/key"]).output().unwrap());
    assert_eq!(code, Some(69));
    assert!(told.contains("--gossip-key-file: /nonexistent/key cannot be read"), "{told}");
    let (code, told) = failed(&quotum().args(["stub", "--listen", &taken]).output().unwrap());
    assert_eq!(code, Some(69), "{told}");
    assert!(told.contains(&taken), "{told}");
}

#[test]
fn status_and_forget_speak_with_a_pod() {
    let folder = Folder::new();
    let (_stub, pod) = stub_and_pod(&folder, &format!("node: {{ name: pod-one }}\n{DEPLOYMENT}"));
    let admin = pod.addr("admin");
    for admin in [&admin, &format!("http://{admin}"), &format!("http://{admin}/")] {
        let status = quotum().args(["status", "--admin", admin]).output().unwrap();
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        assert!(status.status.success() && text.contains("100000 tokens"), "{text}");
        assert!(text.contains("node pod-one  ready"), "a pod that is alone has a name, too: {text}");
    }
    // What cannot be printed is not there; what nobody reads any more is no mistake.
    for arguments in [&["status", "--json", "--admin", &admin][..], &["status", "--admin", &admin], &["--help"]] {
        let full = fs::File::create("/dev/full").unwrap();
        let (code, told) = failed(&quotum().args(arguments).stdout(full).output().unwrap());
        let expected =
            if arguments == ["--help"] { (Some(0), "") } else { (Some(1), "standard output cannot be written") };
        assert!(code == expected.0 && told.contains(expected.1), "{arguments:?}: {code:?} {told}");
    }
    let mut unread = quotum();
    unread.args(["status", "--json", "--admin", &admin]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut unread = unread.spawn().unwrap();
    drop(unread.stdout.take());
    let (code, told) = failed(&unread.wait_with_output().unwrap());
    assert_eq!((code, told.as_str()), (Some(0), ""));
    let (code, told) = failed(&quotum().args(["forget", "10.0.0.9:7946", "--admin", &admin]).output().unwrap());
    assert_eq!(code, Some(1));
    assert!(told.contains("not on this replica's roster"), "{told}");
}

/// Returns the only quota in a pod's status once `done` holds for the status.
fn quota_when(pod: &Running, done: impl Fn(&Value, &Value) -> bool) -> Value {
    // So many that a pod that never gets there fails the test instead of hanging it.
    for _ in 0..100_000 {
        let answer = ask(&pod.addr("admin"), "GET", "/status", "", "");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let status: Value = serde_json::from_str(body).unwrap();
        let quota = &status["limits"][0]["quotas"][0];
        if done(&status, quota) {
            return quota.clone();
        }
        std::thread::yield_now();
    }
    panic!("the pod never got there");
}

#[test]
fn a_pod_that_leaves_hands_its_rights_over() {
    let folder = Folder::new();
    // Bound together, so that they differ; somebody else may still take one first.
    let pods = loop {
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let gossip = sockets.map(|socket| socket.local_addr().unwrap().to_string());
        let seeds = gossip.join(",");
        let config = folder.write("quotum.yaml", &DEPLOYMENT.replace("STUB", "http://127.0.0.1:9"));
        let free = ["--proxy-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
        let pods = gossip.map(|own| {
            let own = ["--gossip-listen", &own, "--gossip-advertise", &own, "--seeds", &seeds, "--node", &own];
            let mut child = quotum();
            child.args(["serve", "--config", &config]).args(free).args(own).stdout(Stdio::piped());
            let mut child = child.stderr(Stdio::piped()).spawn().unwrap();
            let mut out = BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            out.read_line(&mut line).unwrap();
            Running { child, out, line: serde_json::from_str(&line).unwrap_or_default() }
        });
        if pods.iter().all(|pod| pod.line.is_object()) {
            break pods;
        }
    };
    for pod in &pods {
        quota_when(pod, |status, _| status["has_share"] == true);
        // A share is taken when it is first asked for. The upstream cannot be reached, so
        // nothing of it is spent.
        let answer = ask(&pod.addr("proxy"), "POST", "/v1/chat/completions", "", &chat(false));
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
        let quota = quota_when(pod, |_, quota| quota["spendable"] != 0);
        assert!(quota["spendable"].as_u64().unwrap() < 100_000, "{quota}");
    }
    let [first, second] = pods;
    first.signal("TERM");
    let (code, _, log) = first.ended();
    assert_eq!(code, Some(0), "{log}");
    quota_when(&second, |_, quota| quota["spendable"] == 100_000);
}

/// Says stop when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn status_of(pod: &Running) -> Value {
    let answer = ask(&pod.addr("admin"), "GET", "/status", "", "");
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn a_changed_configuration_is_read_on_hangup_and_no_request_fails() {
    let folder = Folder::new();
    let config = DEPLOYMENT
        .replace("100000, window: 100d", "100000, window: 1s")
        .replace("\n    limits", "\n    edge: 0ms\n    limits");
    let (stub, pod) = stub_and_pod(&folder, &config);
    let stub_url = format!("http://{}", stub.addr("stub"));
    let listen = "proxy: { listen: '127.0.0.1:0' }\nadmin: { listen: '127.0.0.1:0' }\n";
    let write = |text: &str| folder.write("quotum.yaml", &format!("{listen}{text}").replace("STUB", &stub_url));
    let proxy = pod.addr("proxy");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whatever fails here, the one that asks must end.
        let ends = Ends(&stop);
        let asked = scope.spawn(|| {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) {
                let answer = ask(&proxy, "POST", "/v1/chat/completions", "", &chat(answers % 2 == 0));
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                answers += 1;
            }
            answers
        });
        let limit = |pod: &Running, place: usize| status_of(pod)["limits"][place]["quotas"][0]["limit"].clone();
        // A limit, and a second deployment.
        let second = config.split_once('\n').unwrap().1.replace("id: a", "id: b").replace("model: m", "model: n");
        write(&(config.replace("100000", "200000") + &second));
        pod.signal("HUP");
        until("the limit switches at a window start", || limit(&pod, 0) == 200_000);
        assert_eq!(status_of(&pod)["limits"][1]["limit_id"], "b");
        let answer = ask(&proxy, "POST", "/v1/chat/completions", "", &chat(false).replace("\"m\"", "\"n\""));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // A mistake changes nothing, and is named.
        write(&config.replace("100000", "-7"));
        pod.signal("HUP");
        until("the mistake is shown", || !status_of(&pod)["config_refused"].is_null());
        let refused = status_of(&pod)["config_refused"].as_str().unwrap().to_owned();
        assert!(refused.contains("quotum.yaml:10:") && refused.contains("limits[0].amount"), "{refused}");
        assert!(!refused.contains("-7"), "what stands there is for the log: {refused}");
        assert_eq!(limit(&pod, 0), 200_000);
        // And it is mended; what needs a restart is named.
        write(&config.replace("127.0.0.1:0' }\nadmin", "127.0.0.1:1' }\nadmin"));
        pod.signal("HUP");
        until("the mistake is gone", || status_of(&pod)["config_refused"].is_null());
        until("the second deployment is gone", || status_of(&pod)["limits"].as_array().unwrap().len() == 1);
        drop(ends);
        assert!(asked.join().unwrap() > 0);
    });
    let answer = ask(&proxy, "POST", "/v1/chat/completions", "", &chat(false).replace("\"m\"", "\"n\""));
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let metrics = ask(&pod.addr("admin"), "GET", "/metrics", "", "");
    assert!(metrics.contains("quotum_config_reloads_total{result=\"changed\"} 2"), "{metrics}");
    assert!(metrics.contains("quotum_config_reloads_total{result=\"refused\"} 1"));
    pod.signal("TERM");
    let (code, _, log) = pod.ended();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("a changed") && log.contains("b added") && log.contains("b removed"), "{log}");
    assert!(!log.contains("sk-upstream"), "no credential in a log");
}

#[test]
fn changed_credentials_are_read_on_hangup() {
    let folder = Folder::new();
    let credentials = folder.write("credentials", "sk-before\n");
    let stub = Running::start(&["stub", "--listen", "127.0.0.1:0"]);
    let text = format!(
        "proxy: {{ listen: '127.0.0.1:0', credentials_file: {credentials} }}\nadmin: {{ listen: '127.0.0.1:0' }}\n\
         {DEPLOYMENT}"
    );
    let text = text.replace("STUB", &format!("http://{}", stub.addr("stub")));
    let pod = Running::start(&["serve", "--config", &folder.write("quotum.yaml", &text)]);
    let status_for = |credential: &str| {
        let headers = format!("authorization: Bearer {credential}\r\n");
        let answer = ask(&pod.addr("proxy"), "POST", "/v1/chat/completions", &headers, &chat(false));
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!((status_for("sk-before").as_str(), status_for("sk-after").as_str()), ("200", "401"));
    folder.write("credentials", "sk-after\n");
    pod.signal("HUP");
    // The files come before the configuration, which is counted, and long before the next look at them.
    let reloads = "quotum_config_reloads_total{result=\"changed\"} 1";
    until("the signal is heard", || ask(&pod.addr("admin"), "GET", "/metrics", "", "").contains(reloads));
    assert_eq!((status_for("sk-before").as_str(), status_for("sk-after").as_str()), ("401", "200"));
}

#[test]
fn a_configuration_that_is_replaced_by_a_link_is_read_without_a_signal() {
    let folder = Folder::new();
    let stub = Running::start(&["stub", "--listen", "127.0.0.1:0"]);
    let text = format!("proxy: {{ listen: '127.0.0.1:0' }}\nadmin: {{ listen: '127.0.0.1:0' }}\n{DEPLOYMENT}")
        .replace("STUB", &format!("http://{}", stub.addr("stub")));
    // As Kubernetes mounts a ConfigMap: a link to a link to a folder of its own.
    let place = |name: &str, text: &str| {
        fs::create_dir(folder.path(name)).unwrap();
        fs::write(folder.path(&format!("{name}/quotum.yaml")), text).unwrap();
        let _ = fs::remove_file(folder.path("..tmp"));
        std::os::unix::fs::symlink(name, folder.path("..tmp")).unwrap();
        fs::rename(folder.path("..tmp"), folder.path("..data")).unwrap();
    };
    place("..1", &text);
    std::os::unix::fs::symlink("..data/quotum.yaml", folder.path("quotum.yaml")).unwrap();
    let pod = Running::start(&["serve", "--config", &folder.path("quotum.yaml")]);
    place("..2", &text.replace("100000", "300000"));
    until("the change is seen", || status_of(&pod)["limits"][0]["switches"][0]["to"].is_string());
    assert!(status_of(&pod)["limits"][0]["switches"][0]["to"].as_str().unwrap().starts_with("300000 tokens"));
}

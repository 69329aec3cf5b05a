//! A fleet of the `quotum` command on loopback: a stub upstream that counts for itself, and pods that a
//! static list names.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{Folder, ask, signal, until};

/// Tokens of a window that no test outlives.
pub const LIMIT: u64 = 6_000;

/// "A port is in use", as `serve` says it.
pub const PORT_IN_USE: Option<i32> = Some(69);

/// A process that has said where it listens, killed when it is dropped.
#[derive(Debug)]
pub struct Running {
    pub child: Child,
    pub line: Value,
}

impl Running {
    /// Starts the command with its log in the folder; its exit code if it does not stay.
    pub fn start(folder: &Folder, name: &str, arguments: &[&str]) -> Result<Self, Option<i32>> {
        let log = fs::File::create(folder.path(&format!("{name}.log"))).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_quotum"));
        command.env_clear().args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        match serde_json::from_str(&line) {
            Ok(line) => Ok(Self { child, line }),
            Err(_) => Err(child.wait().unwrap().code()),
        }
    }

    pub fn addr(&self, what: &str) -> &str {
        self.line[what].as_str().unwrap()
    }

    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Waits for its end and returns its exit code.
    pub fn ended(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Sends a request of at most 50 tokens that uses 30, and returns the answer.
    pub fn chat(&self, headers: &str) -> String {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20});
        let used = "x-stub-prompt-tokens: 10\r\nx-stub-completion-tokens: 20\r\n";
        ask(self.addr("proxy"), "POST", "/v1/chat/completions", &format!("{used}{headers}"), &body.to_string())
    }

    pub fn serves(&self) -> bool {
        self.chat("").starts_with("HTTP/1.1 200")
    }

    pub fn status(&self) -> Value {
        let answer = ask(self.addr("admin"), "GET", "/status", "", "");
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    /// Returns the value of a metric with these labels, 0 if it is not there.
    pub fn metric(&self, name_and_labels: &str) -> f64 {
        let answer = ask(self.addr("admin"), "GET", "/metrics", "", "");
        let value = answer.lines().find_map(|line| line.strip_prefix(name_and_labels)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    pub fn peer(&self, id: &str) -> Value {
        let status = self.status();
        let peer = status["peers"].as_array().unwrap().iter().find(|peer| peer["replica"] == id);
        peer.cloned().unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stub and pods that a static list names.
#[derive(Debug)]
pub struct Fleet {
    // Dropped in this order: the processes before the folder their logs are in.
    pub pods: Vec<Running>,
    pub stub: Running,
    pub gossip: Vec<String>,
    /// What stands in every pod's configuration beside its deployment.
    pub settings: String,
    pub folder: Folder,
}

impl Fleet {
    /// Starts pods with these limits and waits until each has its share.
    pub fn start(limits: &[u64]) -> Self {
        Self::start_with(limits, "")
    }

    pub fn start_with(limits: &[u64], settings: &str) -> Self {
        let folder = Folder::new();
        folder.write("key", &"5a".repeat(32));
        let stub = Running::start(&folder, "stub", &["stub", "--listen", "127.0.0.1:0"]).ok().unwrap();
        let mut fleet = Self { pods: Vec::new(), stub, gossip: Vec::new(), settings: settings.into(), folder };
        for (number, limit) in limits.iter().enumerate() {
            fleet.configure(number, *limit);
        }
        while fleet.pods.len() < limits.len() {
            // Somebody else may take a port that has just been free: then all is started over.
            fleet.pods.clear();
            fleet.gossip = free_ports(limits.len());
            for number in 0..limits.len() {
                match fleet.run(number) {
                    Ok(pod) => fleet.pods.push(pod),
                    Err(PORT_IN_USE) => break,
                    Err(code) => panic!("{code:?}: {}", fleet.log(number)),
                }
            }
        }
        for pod in &fleet.pods {
            until("every pod has its share", || pod.status()["has_share"] == true);
            fleet.until_it_reaches(pod, limits.len() - 1);
        }
        fleet
    }

    pub fn configure(&self, number: usize, limit: u64) -> String {
        let stub = self.stub.addr("stub");
        let settings = &self.settings;
        let text = format!(
            "{settings}deployments:\n  - id: a\n    model: m\n    upstream: http://{stub}/v1\n    reserve: bound\n    limits:\n      \
             - {{ unit: tokens, amount: {limit}, window: 100d, at_once: true }}\n"
        );
        self.folder.write(&format!("pod-{number}.yaml"), &text)
    }

    /// Runs a pod in the slot of this number.
    pub fn run(&self, number: usize) -> Result<Running, Option<i32>> {
        let (own, seeds, name) = (&self.gossip[number], self.gossip.join(","), format!("pod-{number}"));
        let config = self.folder.path(&format!("{name}.yaml"));
        let key = self.folder.path("key");
        let arguments = [
            ["--config", &config],
            ["--gossip-key-file", &key],
            ["--proxy-listen", "127.0.0.1:0"],
            ["--admin-listen", "127.0.0.1:0"],
            ["--gossip-listen", own],
            ["--gossip-advertise", own],
            ["--seeds", &seeds],
            ["--node", &name],
        ];
        let arguments: Vec<&str> = ["serve"].into_iter().chain(arguments.into_iter().flatten()).collect();
        Running::start(&self.folder, &name, &arguments)
    }

    pub fn log(&self, number: usize) -> String {
        self.folder.read(&format!("pod-{number}.log"))
    }

    pub fn until_it_reaches(&self, pod: &Running, others: usize) {
        let reached = || {
            let status = pod.status();
            status["peers"].as_array().unwrap().iter().filter(|peer| peer["reachable"] == true).count()
        };
        until("it reaches the others", || reached() == others);
    }

    /// Asks the pods in turns until none of them serves any more.
    pub fn exhaust(&self) {
        while self.pods.iter().filter(|pod| pod.serves()).count() > 0 {}
    }

    /// The tokens that the upstream says it was asked for.
    pub fn upstreams_count(&self) -> u64 {
        let answer = ask(self.stub.addr("stub"), "GET", "/_ledger", "", "");
        let records: Vec<Value> = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        let tokens = |record: &Value, what: &str| record[what].as_u64().unwrap();
        records.iter().map(|record| tokens(record, "prompt_tokens") + tokens(record, "completion_tokens")).sum()
    }
}

/// Returns UDP addresses that are free now: bound all at once, so that they differ.
pub fn free_ports(count: usize) -> Vec<String> {
    let sockets: Vec<_> = (0..count).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    sockets.iter().map(|socket| socket.local_addr().unwrap().to_string()).collect()
}

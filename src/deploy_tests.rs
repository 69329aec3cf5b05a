//! What stands in `deploy/` is what this binary does: ports, probes, environment, times. Its dashboard and alerts are
//! read in monitoring_tests.rs.
//!
//! Knows the manifests as Kubernetes reads them: the kustomize base, and what Helm made of the chart
//! (`deploy/rendered`; `tests/manifests/run` renders it anew and compares it with both). Must not
//! need a cluster, Helm or kubectl.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use clap::Parser;
use quotum::cluster::Seeds;
use quotum::config::{self, Config, Flags, Listen};
use quotum::{Limiter, server};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::{Cli, Command};

/// What the kubelet tells a pod.
const POD: [(&str, &str); 3] =
    [("metadata.name", "quotum-5d8f-x7k2p"), ("status.podIP", "fd00::17"), ("metadata.namespace", "default")];

/// What a secret holds under each of its names.
const SECRETS: [(&str, &str); 2] = [
    ("gossip.key", "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n"),
    ("credentials", "a-credential\n"),
];

/// Room in the container for what is not bodies: docs/operating.md, sizing.
const MEMORY_BESIDE_BODIES: u64 = 256 << 20;

pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = deploy().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns every document of the text.
pub(crate) fn documents(text: &str) -> Vec<Value> {
    let parse = |text| serde_saphyr::from_str::<Value>(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    format!("\n{text}").split("\n---\n").map(parse).filter(|document| !document.is_null()).collect()
}

/// One way in which quotum is deployed, and all its objects.
struct Manifests {
    name: &'static str,
    objects: Vec<Value>,
}

impl Manifests {
    /// What `kubectl kustomize deploy/` gives, but for the secrets.
    fn base() -> Self {
        let list = documents(&read("base/kustomization.yaml")).remove(0);
        let files = list["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap().to_owned());
        let mut objects: Vec<Value> = files.flat_map(|file| documents(&read(Path::new("base").join(file)))).collect();
        let top = documents(&read("kustomization.yaml")).remove(0);
        assert_eq!(top["resources"], json!(["base"]));
        let image = &top["images"][0];
        let labels = &top["generatorOptions"]["labels"];
        for object in objects.iter_mut().filter(|object| object["kind"] == "Deployment") {
            let container = &mut object["spec"]["template"]["spec"]["containers"][0];
            assert_eq!(container["image"], image["name"]);
            container["image"] =
                json!(format!("{}:{}", image["newName"].as_str().unwrap(), image["newTag"].as_str().unwrap()));
        }
        let map = &top["configMapGenerator"][0];
        let file = map["files"][0].as_str().unwrap();
        let key = Path::new(file).file_name().unwrap().to_str().unwrap();
        objects.push(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": map["name"], "labels": labels}, "data": {key: read(file)},
        }));
        Self { name: "base", objects }
    }

    /// What Helm made of the chart.
    fn rendered(name: &'static str) -> Self {
        Self { name, objects: documents(&read(format!("rendered/{name}.yaml"))) }
    }

    /// Those that run `quotum serve`.
    fn that_serve() -> [Self; 4] {
        let [default, everything, own] = ["default", "everything", "secrets-of-your-own"].map(Self::rendered);
        [Self::base(), default, everything, own]
    }

    fn all(kind: &str, objects: &[Value]) -> Vec<Value> {
        objects.iter().filter(|object| object["kind"] == kind).cloned().collect()
    }

    fn one(&self, kind: &str) -> Value {
        let mut found = Self::all(kind, &self.objects);
        assert_eq!(found.len(), 1, "{kind} in {}", self.name);
        found.remove(0)
    }

    fn service(&self, headless: bool) -> Value {
        let is_headless = |service: &Value| service["spec"]["clusterIP"] == "None";
        let mut found = Self::all("Service", &self.objects);
        found.retain(|service| is_headless(service) == headless);
        assert_eq!(found.len(), 1, "{}", self.name);
        found.remove(0)
    }

    fn pod(&self) -> Value {
        self.one("Deployment")["spec"]["template"].clone()
    }

    fn container(&self) -> Value {
        let containers = &self.pod()["spec"]["containers"];
        assert_eq!(containers.as_array().unwrap().len(), 1);
        containers[0].clone()
    }

    fn env(&self) -> BTreeMap<String, String> {
        let env = self.container()["env"].as_array().unwrap().clone();
        let value = |entry: &Value| match entry["value"].as_str() {
            Some(value) => value.to_owned(),
            None => {
                let field = entry["valueFrom"]["fieldRef"]["fieldPath"].as_str().unwrap();
                POD.iter().find(|(name, _)| *name == field).expect(field).1.to_owned()
            }
        };
        let mut env: BTreeMap<String, String> =
            env.iter().map(|entry| (entry["name"].as_str().unwrap().to_owned(), value(entry))).collect();
        env.insert("UPSTREAM_API_KEY".into(), "sk-upstream".into());
        env.insert("KUBERNETES_SERVICE_HOST".into(), "fd00::1".into());
        env.insert("KUBERNETES_SERVICE_PORT".into(), "443".into());
        env
    }

    /// Returns the number of a port of the container.
    fn port(&self, name: &str) -> u16 {
        let ports = self.container()["ports"].as_array().unwrap().clone();
        let port = ports.iter().find(|port| port["name"] == name).unwrap_or_else(|| panic!("{name}"));
        port["containerPort"].as_u64().unwrap().try_into().unwrap()
    }

    /// Writes what the pod's volumes would hold below `root`, and returns what `serve` makes of
    /// it, with the variables that it looked for.
    fn serve(&self, root: &Path) -> (Config, BTreeSet<String>) {
        let (pod, container) = (self.pod(), self.container());
        let volumes = pod["spec"]["volumes"].as_array().unwrap();
        for mount in container["volumeMounts"].as_array().unwrap() {
            assert_eq!(mount["readOnly"], true, "{mount}");
            assert!(mount["subPath"].is_null(), "a file that is mounted alone never changes");
            let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
            let folder = root.join(mount["mountPath"].as_str().unwrap().trim_start_matches('/'));
            fs::create_dir_all(&folder).unwrap();
            let map = Self::all("ConfigMap", &self.objects);
            let map = map.iter().find(|map| map["metadata"]["name"] == volume["configMap"]["name"]);
            match map {
                Some(map) => {
                    for (name, text) in map["data"].as_object().unwrap() {
                        // Paths within the container's root are this test's.
                        let text = text.as_str().unwrap().replace("/etc/quotum", &at(root, "/etc/quotum"));
                        fs::write(folder.join(name), text).unwrap();
                    }
                }
                None => SECRETS.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap()),
            }
        }
        let arguments = container["args"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap());
        assert!(container["command"].is_null(), "the image's entry point is the binary");
        let cli = Cli::try_parse_from(["quotum"].into_iter().chain(arguments)).unwrap();
        let Command::Serve(flags) = cli.command else { panic!("it does not serve") };
        assert!(flags.config.is_none() && flags.seeds.is_none(), "all is set by the environment");
        let (env, asked) = (self.env(), RefCell::new(BTreeSet::new()));
        let variable = |name: &str| {
            asked.borrow_mut().insert(name.to_owned());
            env.get(name).map(|value| value.replace("/etc/quotum", &at(root, "/etc/quotum")))
        };
        let config = config::load(None, &variable, &Flags::default()).unwrap_or_else(|error| panic!("{error}"));
        (config, asked.into_inner())
    }
}

fn at(root: &Path, path: &str) -> String {
    root.join(path.trim_start_matches('/')).to_str().unwrap().to_owned()
}

/// A folder of one test's own.
fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("quotum-deploy-{}-{name}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs(value.as_u64().unwrap_or_else(|| panic!("{value}")))
}

/// Bytes of a quantity such as `512Mi`.
fn bytes(value: &Value) -> u64 {
    let number = value.as_str().unwrap().strip_suffix("Mi").expect("in Mi");
    number.parse::<u64>().unwrap() << 20
}

#[test]
fn what_the_pod_is_given_is_a_configuration_that_serves_on_the_ports_it_names() {
    for manifests in Manifests::that_serve() {
        let root = folder(manifests.name);
        let (config, asked) = manifests.serve(&root);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(config.proxy.listen, Listen::Everywhere(manifests.port("proxy")));
        assert_eq!(config.admin, Listen::Everywhere(manifests.port("admin")));
        assert_eq!(config.gossip.listen, Listen::Everywhere(manifests.port("gossip")));
        assert_eq!(config.node, POD[0].1);
        let own = format!("[{}]:{}", POD[1].1, manifests.port("gossip"));
        assert_eq!(config.gossip.advertise.unwrap().to_string(), own);
        assert!(config.gossip.keys.is_keyed() && !config.gossip.insecure);
        assert!(!config.proxy.credentials.is_empty());
        assert_eq!(config.remarks, Vec::<String>::new());
        for name in manifests.env().keys().filter(|name| name.starts_with("QUOTUM_")) {
            assert!(*name == "QUOTUM_CONFIG" || asked.contains(name), "nobody reads {name}");
        }
        may_ask_for_its_pods_alone(&manifests, &config);
        let headless = manifests.service(true);
        let Seeds::Name { host, port } = &config.gossip.seeds else { panic!("{:?}", config.gossip.seeds) };
        assert_eq!(headless["metadata"]["name"], host.as_str());
        assert_eq!(*port, manifests.port("gossip"));
    }
}

/// Whoever asks the API server may list and watch pods, and asks for its own.
fn may_ask_for_its_pods_alone(manifests: &Manifests, config: &Config) {
    let roles = Manifests::all("Role", &manifests.objects);
    let Some(pods) = &config.gossip.pods else {
        assert_eq!(roles, Vec::<Value>::new(), "{}", manifests.name);
        return;
    };
    assert_eq!((pods.api.as_str(), pods.namespace.as_str()), ("https://[fd00::1]:443", "default"));
    let labels = manifests.pod()["metadata"]["labels"].clone();
    let labels = labels.as_object().unwrap();
    let asked: BTreeMap<&str, &str> = pods.selector.split(',').map(|pair| pair.split_once('=').unwrap()).collect();
    assert_eq!(asked.len(), labels.len());
    assert!(asked.iter().all(|(name, value)| labels[*name] == *value), "{asked:?}");
    let rules = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]);
    assert_eq!(manifests.one("Role")["rules"], rules);
    let binding = manifests.one("RoleBinding");
    assert_eq!(binding["roleRef"]["name"], manifests.one("Role")["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["name"], manifests.one("ServiceAccount")["metadata"]["name"]);
    assert_eq!(manifests.pod()["spec"]["serviceAccountName"], binding["subjects"][0]["name"]);
}

#[test]
fn services_lead_to_the_pods_ports_and_the_directory_lists_pods_that_are_not_ready() {
    for manifests in Manifests::that_serve() {
        let labels = &manifests.pod()["metadata"]["labels"];
        let names: BTreeMap<String, Value> = manifests.container()["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|port| (port["name"].as_str().unwrap().to_owned(), port.clone()))
            .collect();
        for headless in [true, false] {
            let service = manifests.service(headless);
            assert_eq!(&service["spec"]["selector"], labels);
            for port in service["spec"]["ports"].as_array().unwrap() {
                let target = &names[port["targetPort"].as_str().unwrap()];
                assert_eq!((&port["port"], &port["protocol"]), (&target["containerPort"], &target["protocol"]));
            }
        }
        let spec = &manifests.service(true)["spec"];
        assert_eq!(spec["publishNotReadyAddresses"], true);
        assert_eq!(spec["ports"][0]["protocol"], "UDP");
        assert_eq!(names["gossip"]["protocol"], "UDP");
        let budget = Manifests::all("PodDisruptionBudget", &manifests.objects);
        assert!(budget.iter().all(|budget| &budget["spec"]["selector"]["matchLabels"] == labels));
        assert_eq!(&manifests.one("Deployment")["spec"]["selector"]["matchLabels"], labels);
    }
}

#[tokio::test]
async fn probes_ask_what_the_admin_port_answers() {
    let limiter = Limiter::builder().build().unwrap();
    let admin = server::admin_alone(limiter);
    for manifests in Manifests::that_serve() {
        let container = manifests.container();
        for (probe, path) in [("readinessProbe", "/readyz"), ("livenessProbe", "/livez")] {
            let get = &container[probe]["httpGet"];
            assert_eq!((&get["port"], &get["path"]), (&json!("admin"), &json!(path)));
            let request = Request::get(get["path"].as_str().unwrap()).body(Body::empty()).unwrap();
            assert_eq!(admin.clone().oneshot(request).await.unwrap().status(), StatusCode::OK);
        }
        // A pod that hangs is found sooner by its peers than by its restart, which loses its share.
        let liveness = &container["livenessProbe"];
        assert!(
            seconds(&liveness["periodSeconds"]) * liveness["failureThreshold"].as_u64().unwrap() as u32
                >= Duration::from_secs(30)
        );
    }
    let monitor = documents(&read("chart/monitoring/servicemonitor.yaml")).remove(0);
    let endpoint = &monitor["spec"]["endpoints"][0];
    let request = Request::get(endpoint["path"].as_str().unwrap()).body(Body::empty()).unwrap();
    assert_eq!(admin.oneshot(request).await.unwrap().status(), StatusCode::OK);
    let headless = Manifests::base().service(true);
    assert!(headless["spec"]["ports"].as_array().unwrap().iter().any(|port| port["name"] == endpoint["port"]));
    for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&headless["metadata"]["labels"][label], value);
    }
}

#[test]
fn the_grace_period_holds_lingering_draining_and_leaving() {
    for manifests in Manifests::that_serve() {
        let root = folder(&format!("grace-{}", manifests.name));
        let (config, _) = manifests.serve(&root);
        fs::remove_dir_all(&root).unwrap();
        let grace = seconds(&manifests.pod()["spec"]["terminationGracePeriodSeconds"]);
        let takes = config.proxy.linger + config.proxy.drain.expect("a bound") + server::LEAVE_WITHIN;
        assert!(grace >= takes + Duration::from_secs(5), "{grace:?} for {takes:?}");
        // An endpoint that is gone takes a readiness probe, and its way to every node.
        let readiness = &manifests.container()["readinessProbe"];
        assert!(config.proxy.linger > seconds(&readiness["periodSeconds"]));
    }
    let example = documents(&read("embedded/example.yaml")).remove(0);
    assert!(seconds(&example["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]) > server::LEAVE_WITHIN);
}

#[test]
fn a_pod_may_do_no_more_than_it_must() {
    for manifests in Manifests::that_serve() {
        let (pod, container) = (manifests.pod(), manifests.container());
        let inside = &container["securityContext"];
        assert_eq!(pod["spec"]["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["spec"]["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(
            (&inside["readOnlyRootFilesystem"], &inside["allowPrivilegeEscalation"]),
            (&json!(true), &json!(false))
        );
        assert_eq!(inside["capabilities"]["drop"], json!(["ALL"]));
        let asks = !Manifests::all("Role", &manifests.objects).is_empty();
        assert_eq!(pod["spec"]["automountServiceAccountToken"], asks, "a token only for whoever may ask something");
        assert_eq!(manifests.one("ServiceAccount")["automountServiceAccountToken"], false);
        let root = folder(&format!("memory-{}", manifests.name));
        let (config, _) = manifests.serve(&root);
        fs::remove_dir_all(&root).unwrap();
        let limit = bytes(&container["resources"]["limits"]["memory"]);
        assert!(limit >= config.proxy.max_bodies as u64 + MEMORY_BESIDE_BODIES);
        assert!(container["resources"]["limits"]["cpu"].is_null(), "a throttled pod gossips late");
        assert!(!pod["spec"]["topologySpreadConstraints"].as_array().unwrap().is_empty());
    }
}

#[test]
fn only_the_pods_gossip() {
    for manifests in [Manifests::base(), Manifests::rendered("default"), Manifests::rendered("everything")] {
        let labels = &manifests.pod()["metadata"]["labels"];
        let policy = manifests.one("NetworkPolicy");
        assert_eq!(&policy["spec"]["podSelector"]["matchLabels"], labels);
        let mut open = BTreeMap::new();
        for rule in policy["spec"]["ingress"].as_array().unwrap() {
            for port in rule["ports"].as_array().unwrap() {
                open.insert(port["port"].as_u64().unwrap(), (port["protocol"].clone(), rule["from"].clone()));
            }
        }
        let ports = ["proxy", "admin", "gossip"].map(|name| u64::from(manifests.port(name)));
        assert_eq!(open.keys().copied().collect::<BTreeSet<_>>(), ports.into());
        let [proxy, admin, gossip] = ports;
        assert_eq!(open[&gossip], (json!("UDP"), json!([{"podSelector": {"matchLabels": labels}}])));
        assert_eq!(open[&proxy], (json!("TCP"), Value::Null));
        assert_eq!(open[&admin], (json!("TCP"), json!([{"namespaceSelector": {}}])), "inside the cluster only");
    }
}

#[test]
fn the_chart_with_its_defaults_is_the_base() {
    let by_name = |objects: &[Value]| -> BTreeMap<String, Value> {
        let plain = objects.iter().filter(|object| object["kind"] != "Secret");
        plain.map(|object| (format!("{} {}", object["kind"], object["metadata"]["name"]), object.clone())).collect()
    };
    let (base, chart) = (Manifests::base(), Manifests::rendered("default"));
    assert_eq!(by_name(&base.objects), by_name(&chart.objects));
    let top = documents(&read("kustomization.yaml")).remove(0);
    let generated: BTreeSet<&str> =
        top["secretGenerator"].as_array().unwrap().iter().map(|secret| secret["name"].as_str().unwrap()).collect();
    let secrets = Manifests::all("Secret", &chart.objects);
    let rendered: BTreeSet<&str> = secrets.iter().map(|secret| secret["metadata"]["name"].as_str().unwrap()).collect();
    assert_eq!(generated, rendered);
    let chart = documents(&read("chart/Chart.yaml")).remove(0);
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    assert_eq!(top["images"][0]["newTag"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn pods_that_embed_quotum_get_the_variables_it_reads() {
    let manifests = Manifests::rendered("embedded");
    let example = documents(&read("embedded/example.yaml")).remove(0);
    let pod = &example["spec"]["template"];
    let container = &pod["spec"]["containers"][0];
    let map = manifests.one("ConfigMap");
    assert_eq!(container["envFrom"][0]["configMapRef"]["name"], map["metadata"]["name"]);
    let mut env = map["data"].as_object().unwrap().clone();
    for entry in container["env"].as_array().unwrap() {
        let field = entry["valueFrom"]["fieldRef"]["fieldPath"].as_str().unwrap();
        let value = POD.iter().find(|(name, _)| *name == field).unwrap().1;
        env.insert(entry["name"].as_str().unwrap().into(), json!(value));
    }
    let key = folder("embedded").join("key");
    fs::write(&key, SECRETS[0].1).unwrap();
    let asked = RefCell::new(BTreeSet::new());
    let variable = |name: &str| {
        asked.borrow_mut().insert(name.to_owned());
        let value = env.get(name)?.as_str()?;
        Some(if name == "QUOTUM_GOSSIP_KEY_FILE" { key.to_str()?.to_owned() } else { value.to_owned() })
    };
    let config = config::load(None, &variable, &Flags::default()).unwrap_or_else(|error| panic!("{error}"));
    fs::remove_dir_all(key.parent().unwrap()).unwrap();
    assert!(env.keys().all(|name| asked.borrow().contains(name)), "{env:?}");
    let mount = container["volumeMounts"][0]["mountPath"].as_str().unwrap();
    assert_eq!(env["QUOTUM_GOSSIP_KEY_FILE"], format!("{mount}/gossip.key"));
    let headless = manifests.service(true);
    let Seeds::Name { host, port } = config.gossip.seeds else { panic!("no name") };
    assert_eq!(headless["metadata"]["name"], host);
    assert_eq!((&headless["spec"]["publishNotReadyAddresses"], port), (&json!(true), 7946));
    assert_eq!(headless["spec"]["selector"], pod["metadata"]["labels"]);
    assert_eq!(config.gossip.advertise.unwrap().port(), port);
    assert_eq!(container["ports"][0]["containerPort"], port);
    let kinds: BTreeSet<&str> = manifests.objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["ConfigMap", "NetworkPolicy", "Secret", "Service"].into());
}

#[test]
fn the_configuration_that_is_shipped_can_be_checked_away_from_the_pods() {
    let file = deploy().join("chart/quotum.yaml");
    let checked = config::check_offline(&file).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(checked.deployments, 1);
    let [unseen] = checked.remarks.as_slice() else { panic!("{:?}", checked.remarks) };
    for what in ["proxy.credentials_file (/etc/quotum/proxy/credentials)", "(os.environ/UPSTREAM_API_KEY)"] {
        assert!(unseen.contains(what), "{unseen}");
    }
    assert!(read("README.md").contains("quotum check-config --offline deploy/chart/quotum.yaml"));
}

"""Checks the manifests of deploy/ with Helm's engine and the schemas of Kubernetes.

Knows how each is rendered. Must not know what stands in them: that the ports, probes and times are
the binary's is tested in src/deploy_tests.rs, against the same files.
"""

import base64
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import helm_python
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"

# The oldest and the newest whose schemas there are, and one between.
RELEASES = ["1.25.0", "1.31.0", "1.37.0"]

KEY = "00112233445566778899aabbccddeeff" * 2 + "\n"
NEEDED = {
    "gossip": {"key": KEY},
    "proxy": {"credentials": "a-credential\n"},
    "upstream": {"env": {"UPSTREAM_API_KEY": "a-key"}},
}

# What is rendered and committed, so that tests without Helm can look at it, and people, too.
CASES = {
    "default": NEEDED,
    "everything": NEEDED
    | {
        "discovery": "kubernetes",
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
        "autoscaling": {"enabled": True},
        "config": (CHART / "quotum.yaml").read_text().replace("first_window: wait", "first_window: admit"),
        "podAnnotations": {"example.com/team": "platform"},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "important",
        "imagePullSecrets": [{"name": "registry"}],
        "env": [{"name": "RUST_LOG", "value": "debug"}],
        "service": {"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}},
        "volumes": [{"name": "tls", "secret": {"secretName": "tls"}}],
        "volumeMounts": [{"name": "tls", "mountPath": "/etc/quotum/tls", "readOnly": True}],
    },
    "secrets-of-your-own": {
        "gossip": {"existingSecret": "our-gossip"},
        "proxy": {"existingSecret": "our-proxy"},
        "upstream": {"existingSecret": "our-upstream"},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "lingerSeconds": 10,
        "drainSeconds": 285,
    },
    "embedded": {"embedded": {"enabled": True}, "gossip": {"key": KEY}},
}

# Values that must be refused, and a word of why.
REFUSED = {
    "gossip.key or gossip.existingSecret": {"proxy": {"credentials": "c"}},
    "proxy.credentials or proxy.existingSecret": {"gossip": {"key": KEY}},
    "replica": NEEDED | {"replica": 3},
    "type": NEEDED | {"service": {"type": "Ingress"}},
    "key": NEEDED | {"gossip": {"key": "secret"}},
    "drainSeconds": NEEDED | {"drainSeconds": "100s"},
    "discovery": NEEDED | {"discovery": "consul"},
    "replicas": NEEDED | {"replicas": 0},
}


def render(values, name="quotum"):
    rendered = helm_python.Chart.load(str(CHART)).render(values, name=name, namespace="default")
    manifests = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml")]
    return [document for text in manifests for document in yaml.safe_load_all(text) if document]


def identity(document):
    return document["kind"], document["metadata"]["name"]


def plain(document):
    """The document with its secrets decoded: base64 may be folded into lines."""
    if document["kind"] != "Secret":
        return document
    return document | {"data": {name: base64.b64decode(text) for name, text in document["data"].items()}}


def differences(one, other):
    """Names what two sets of manifests do not share."""
    one, other = ({identity(document): plain(document) for document in documents} for documents in (one, other))
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def in_order(documents):
    return sorted(documents, key=identity)


def same(folder, kustomize, chart):
    wrong = differences(kustomize, chart)
    return not wrong, "\n".join([f"{folder} is not what the chart renders:", *wrong])


def refused(values):
    chart = helm_python.Chart.load(str(CHART))
    try:
        chart.validate_schema(values)
        chart.render(values, name="quotum", namespace="default")
    except helm_python.HelmError as error:
        return str(error)
    return None


def kustomized(folder, files):
    """What `kubectl kustomize` makes of a folder with these files beside it; None without kubectl."""
    if not shutil.which("kubectl"):
        return None
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(DEPLOY, copy, dirs_exist_ok=True)
        for name, text in files.items():
            (pathlib.Path(copy) / folder / name).write_text(text)
        built = subprocess.run(
            ["kubectl", "kustomize", pathlib.Path(copy) / folder], capture_output=True, text=True, check=False
        )
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def main():
    problems = []

    def check(is_right, what):
        if not is_right:
            problems.append(what)

    for name, values in CASES.items():
        helm_python.Chart.load(str(CHART)).validate_schema(values)
        report = helm_python.lint(str(CHART), values, strict=True)
        worst = [message for message in report["messages"] if message["severity"] >= 2]
        check(not worst and not report["errors"], f"lint {name}: {worst} {report['errors']}")
        text = yaml.safe_dump_all(in_order(render(values)), sort_keys=True, width=1000)
        path = DEPLOY / "rendered" / f"{name}.yaml"
        text = f"# helm template quotum deploy/chart, case `{name}` of tests/manifests/check.py; written by it.\n{text}"
        if "--write" in sys.argv:
            path.write_text(text)
        check(path.exists() and path.read_text() == text, f"{path} is not what Helm renders: run with --write")
        for document in render(values):
            for release in RELEASES:
                if document["apiVersion"].startswith("monitoring.coreos.com/"):
                    continue
                try:
                    kubernetes_validate.validate(document, release, strict=True)
                except kubernetes_validate.ValidationError as error:
                    problems.append(f"{name}: {identity(document)} in {release}: {error.message}")
    for word, values in REFUSED.items():
        why = refused(values)
        check(why and word in why, f"{values} must be refused for {word}: {why}")
    # Another release beside this one shares nothing with it by name.
    own = {identity(document) for document in render(CASES["everything"])}
    other = {identity(document) for document in render(CASES["everything"], name="other")}
    check(not own & other, f"two releases share {own & other}")

    example = yaml.safe_load((DEPLOY / "hpa.yaml").read_text())
    scaled = [document for document in render(CASES["everything"]) if document["kind"] == example["kind"]]
    check(*same("deploy/hpa.yaml", [example], scaled))

    files = {"gossip.key": KEY, "credentials": "a-credential\n", "upstream.env": "UPSTREAM_API_KEY=a-key\n"}
    compared = "kubectl is not here: kustomize was not run"
    base = kustomized(".", files)
    if base is not None:
        compared = "the base, monitoring and embedded are what the chart renders"
        check(*same("deploy/", base, render(NEEDED)))
        # The lines that the file tells to take the # away from.
        commented = (DEPLOY / "kustomization.yaml").read_text()
        asking = re.sub(r"^#(  - |patches:)", r"\1", commented, flags=re.MULTILINE)
        asked = kustomized(".", files | {"kustomization.yaml": asking})
        check(*same("deploy/kubernetes", asked, render(NEEDED | {"discovery": "kubernetes"})))
        monitoring = kustomized("monitoring", {})
        everything = render(NEEDED | {"monitoring": {"enabled": True}})
        of_chart = [document for document in everything if identity(document) in map(identity, monitoring)]
        check(*same("deploy/monitoring", monitoring, of_chart))
        check(*same("deploy/embedded", kustomized("embedded", files), render(CASES["embedded"])))
    if problems:
        sys.exit("\n".join(problems))
    print(f"helm {helm_python.helm_sdk_version()}: {len(CASES)} cases are as committed and valid in {RELEASES};")
    print(f"{len(REFUSED)} wrong ones are refused; {compared}")


main()

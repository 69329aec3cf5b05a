"""A stub upstream and one pod before it, as real processes on loopback.

Knows how the two are started, read and ended. Must not know any SDK. The invariant it
keeps: what it started is gone when it ends.
"""

import json
import os
import subprocess
import tempfile
import time
import urllib.request

CREDENTIAL = "sk-of-the-proxy"
UPSTREAM_KEY = "sk-of-the-upstream"

SHORT_MS = 2_000
LIMIT = 1_000_000

CONFIG = f"""
proxy: {{ listen: "127.0.0.1:0", credentials_file: CREDENTIALS }}
admin: {{ listen: "127.0.0.1:0" }}
deployments:
  - {{ id: wide, model: wide, upstream: "STUB/v1", api_key: {UPSTREAM_KEY}, edge: 0ms,
      limits: [{{ unit: tokens, amount: {LIMIT}, window: 60s }}, {{ unit: requests, amount: 10000, window: 60s }}] }}
  - {{ id: small, model: small, upstream: "STUB/v1", api_key: {UPSTREAM_KEY}, edge: 0ms,
      limits: [{{ unit: tokens, amount: 1000, window: 60s }}] }}
  - {{ id: paced, model: paced, upstream: "STUB/v1", api_key: {UPSTREAM_KEY}, edge: 0ms,
      limits: [{{ unit: requests, amount: 1, window: {SHORT_MS}ms }}] }}
"""


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


class Process:
    """A command that says in one JSON line where it listens."""

    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{command} ended with {self.process.wait()} before it listened")
        self.addresses = json.loads(line)

    def end(self):
        self.process.terminate()
        self.process.stdout.close()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Pod:
    """The stub, the pod, and what each of them counted."""

    def __init__(self, quotum):
        self.folder = tempfile.TemporaryDirectory()
        credentials = os.path.join(self.folder.name, "credentials")
        config = os.path.join(self.folder.name, "quotum.yaml")
        self.processes = []
        try:
            stub = self.start(quotum, "stub", "--listen", "127.0.0.1:0")
            self.stub = "http://" + stub.addresses["stub"]
            with open(credentials, "w") as file:
                file.write(CREDENTIAL + "\n")
            with open(config, "w") as file:
                file.write(CONFIG.replace("CREDENTIALS", credentials).replace("STUB", self.stub))
            serve = self.start(quotum, "serve", "--config", config)
            self.proxy = "http://" + serve.addresses["proxy"]
            self.admin = "http://" + serve.addresses["admin"]
        except BaseException:
            self.end()
            raise

    def start(self, *command):
        self.processes.append(Process(*command))
        return self.processes[-1]

    def end(self):
        """Ends what was started, the pod first, and returns the exit codes."""
        codes = [process.end() for process in reversed(self.processes)]
        self.folder.cleanup()
        return codes

    def charged(self, deployment="wide", unit="tokens"):
        """Returns what the pod has charged since its start and not given back."""
        for limit in get(self.admin + "/status")["limits"]:
            if deployment in limit["deployments"]:
                for quota in limit["quotas"]:
                    if quota["unit"] == unit:
                        return quota["admitted_total"] - quota["refunded_total"] + quota["overshoot_total"]
        raise KeyError(f"{deployment} has no limit of {unit}")

    def records(self, ident=None):
        """Returns what arrived at the stub, in the order it arrived."""
        return [record for record in get(self.stub + "/_ledger") if ident in (None, record["id"])]

    def record(self, ident):
        """Returns the one request with this id, once its answer has ended."""
        return until(lambda: self.ended(ident), f"the end of {ident}")

    def ended(self, ident):
        (record,) = self.records(ident)
        return record if record["completion_tokens"] is not None else None


def until(look, what):
    """Looks again until there is something to see."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if seen := look():
            return seen
        time.sleep(0.01)
    raise TimeoutError(f"waited in vain for {what}")

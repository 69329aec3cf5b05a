"""Real LiteLLM proxies in front of the stub upstream, which counts for itself.

Knows how processes are started, waited for and ended. Must not know what is tested.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from machine import free_ports, until

# What a proxy may take to start: 15 s of one core, each of its workers again, and a busy machine has no core to spare.
START_WITHIN = 400.0


class Stub:
    """The stub upstream of the `quotum` command, and its ledger."""

    def __init__(self, *arguments: str) -> None:
        command = [os.environ["QUOTUM"], "stub", "--listen", "127.0.0.1:0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = json.loads(self.process.stdout.readline())["stub"]
        self.base = f"http://{self.address}/v1"

    def ledger(self) -> list[dict[str, Any]]:
        records = httpx.get(f"http://{self.address}/_ledger", timeout=30.0).json()
        return records["records"] if isinstance(records, dict) else records

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@dataclass
class Proxy:
    """One LiteLLM proxy."""

    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="quotum-litellm-")
        # Nobody else on this machine is of this pod. Started again it has the same name, as a machine has: at one address
        # that proves that what ran before is gone.
        self.node = Path(self.folder).name
        (Path(self.folder) / "config.yaml").write_text(yaml.safe_dump(self.config))
        # Callbacks of somebody else, beside the configuration.
        for name, text in self.modules.items():
            (Path(self.folder) / f"{name}.py").write_text(text)
        self.start()

    def start(self) -> None:
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("QUOTUM_")},
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "DISABLE_ADMIN_UI": "True",
            "NO_PROXY": "*",
            "PYTHONUNBUFFERED": "1",
            "QUOTUM_NODE": self.node,
            **self.environment,
        }
        self.log = Path(self.folder) / f"log-{self.port}"
        command = [
            str(Path(sys.executable).parent / "litellm"), "--config", f"{self.folder}/config.yaml",
            "--host", "127.0.0.1", "--port", str(self.port), *self.arguments,
        ]  # fmt: skip
        with self.log.open("w") as log:
            # A group of its own: its workers end with it.
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )

    def wait(self) -> Proxy:
        def is_up() -> bool:
            assert self.process.poll() is None, f"the proxy ended:\n{self.log.read_text()[-4000:]}"
            try:
                return httpx.get(f"{self.url}/health/liveliness", timeout=2.0).status_code == 200
            except httpx.HTTPError:
                return False

        until(is_up, START_WITHIN, "the proxy's start")
        return self

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        headers = {"authorization": "Bearer sk-test", **headers}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60.0)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)


def deployment(base: str, *, number: str, model: str = "gpt", name: str = "openai/stub-model", **limits: Any) -> dict[str, Any]:
    about = {"id": number, **limits.pop("about", {})}
    params = {"model": name, "api_base": base, "api_key": "sk-upstream", **limits}
    return {"model_name": model, "litellm_params": params, "model_info": about}


def config(*deployments: dict[str, Any], router: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "model_list": list(deployments),
        "litellm_settings": {"callbacks": ["quotum.litellm.handler"], "telemetry": False, **settings},
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True, "forward_client_headers_to_llm_api": True},
        "router_settings": router or {},
    }


class Fleet:
    """Pods that a static list joins."""

    def __init__(self, pods: int, written: Callable[[str], dict[str, Any]], is_quotum: bool = True) -> None:
        self.stub = Stub()
        self.is_quotum = is_quotum
        ports = free_ports(pods)
        self.admin = free_ports(pods)
        seeds = [f"127.0.0.1:{port}" for port in ports]
        self.pods = [
            Proxy(
                written(self.stub.base),
                {
                    "QUOTUM_SEEDS": ",".join(seeds),
                    "QUOTUM_GOSSIP_LISTEN": own,
                    "QUOTUM_GOSSIP_ADVERTISE": own,
                    "QUOTUM_ADMIN_LISTEN": f"127.0.0.1:{admin}",
                },
            )
            for own, admin in zip(seeds, self.admin)
        ]
        self.alive = list(range(pods))
        # A pod that is to be killed is up again first.
        self.one_by_one = threading.Lock()

    def wait(self) -> Fleet:
        for pod in self.pods:
            pod.wait()
        if self.is_quotum:
            until(lambda: all(self.knows_all(admin) for admin in self.admin), START_WITHIN, "the fleet")
        return self

    def peers(self, number: int) -> list[str]:
        """Returns the nodes that a pod counts beside itself."""
        status = httpx.get(f"http://127.0.0.1:{self.admin[number]}/status", timeout=5.0).json()
        return [peer["node"] for peer in status["peers"] if peer["gone_from_unix_ms"] is None]

    def knows_all(self, admin: int) -> bool:
        try:
            status = httpx.get(f"http://127.0.0.1:{admin}/status", timeout=5.0).json()
        except httpx.HTTPError:
            return False
        reachable = sum(peer["reachable"] for peer in status["peers"])
        return status["ready"] and reachable == len(self.pods) - 1

    def urls(self) -> list[str]:
        return [self.pods[self.alive[number % len(self.alive)]].url for number in range(len(self.pods))]

    def kill(self, number: int) -> None:
        with self.one_by_one:
            self.alive.remove(number)
            self.pods[number].kill()

    def leave(self, number: int) -> None:
        """Takes a pod out of the load balancer, and ends it in order."""
        self.alive.remove(number)
        self.pods[number].process.terminate()

    def restart(self, number: int) -> None:
        """Starts a pod again that was ended, and takes it back once it answers."""
        with self.one_by_one:
            self.pods[number].process.wait(60)
            self.pods[number].start()
            self.pods[number].wait()
            self.alive.append(number)

    def close(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Proxy.close, self.pods))
        self.stub.close()

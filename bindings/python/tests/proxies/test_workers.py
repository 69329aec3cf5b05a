"""One real proxy with several workers: they are one replica, and share its limit."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fleet import START_WITHIN, Proxy, Stub, config, deployment
from machine import free_ports, in_a_minute_with, until

CHAT = {"model": "gpt", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 300}
USE = {"x-stub-prompt-tokens": "50", "x-stub-completion-tokens": "150"}


class Pod:
    def __init__(self) -> None:
        self.stub = Stub()
        [self.admin] = free_ports(1)
        self.proxy = Proxy(
            config(
                deployment(self.stub.base, number="a", tpm=5_000),
                deployment(self.stub.base, number="b", tpm=5_000),
            ),
            {"QUOTUM_ADMIN_LISTEN": f"127.0.0.1:{self.admin}"},
            # uvicorn ends workers that import LiteLLM for longer than 5 s, over and over.
            ["--num_workers", "2", "--timeout_worker_healthcheck", "300"],
        )
        self.proxy.wait()
        until(lambda: self.status().get("pod", {}).get("workers") == 2, START_WITHIN, "the second worker")

    def status(self) -> dict[str, Any]:
        try:
            return httpx.get(f"http://127.0.0.1:{self.admin}/status", timeout=5.0).json()
        except httpx.HTTPError:
            return {}

    def offer(self, requests: int) -> list[int]:
        """Sends that many at once: both workers are asked."""
        with ThreadPoolExecutor(requests) as pool:
            posts = [pool.submit(self.proxy.post, "/v1/chat/completions", CHAT, **USE) for _ in range(requests)]
            return [post.result().status_code for post in posts]

    def close(self) -> None:
        self.proxy.close()
        self.stub.close()


@pytest.fixture(scope="module")
def pod():
    pod = Pod()
    yield pod
    pod.close()


def test_workers_hold_one_limit_over_both_deployments(pod):
    in_a_minute_with(30.0)
    # 24,000 tokens: more than the two deployments let through, and each worker would alone.
    statuses = [status for _ in range(6) for status in pod.offer(20)]
    assert set(statuses) == {200, 429}
    admitted = 200 * statuses.count(200)
    assert 9_000 <= admitted <= 10_000
    for limit in pod.status()["limits"]:
        assert limit["quotas"][0]["used"] <= 5_000


def test_another_worker_takes_over_within_a_second(pod):
    in_a_minute_with(20.0)
    before = pod.status()["pod"]["owner"]
    os.kill(before, signal.SIGKILL)
    begun = time.monotonic()
    until(lambda: pod.status().get("pod", {}).get("owner") not in (None, before), what="a new owner")
    took = time.monotonic() - begun
    print(json.dumps({"takeover_seconds": round(took, 3)}))
    assert took < 1.0
    # What the dead one had spent of this minute is unknown: nothing more of it is spent.
    assert set(pod.offer(4)) == {429}

"""What a request is charged in the end, through every endpoint of one real proxy.

The stub's own ledger is the judge: what is charged is what it says was used.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fleet import Proxy, Stub, config, deployment
from machine import free_ports, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families

MESSAGES = [{"role": "user", "content": "Say something."}]
CHAT = {"model": "gpt", "messages": MESSAGES, "max_tokens": 300}


class Pod:
    def __init__(self) -> None:
        self.stub = Stub()
        [self.admin, nowhere] = free_ports(2)
        base = self.stub.base
        claude = base.removesuffix("/v1")
        # Without an edge: close to a minute's end a request is charged in both minutes.
        no_edge = {"quotum": {"edge": 0}}
        limits = {"tpm": 10_000_000, "rpm": 100_000, "about": no_edge}
        self.proxy = Proxy(
            config(
                deployment(base, number="gpt", **limits),
                deployment(base, number="text", model="text", name="text-completion-openai/stub", **limits),
                deployment(base, number="embed", model="embed", name="openai/text-embedding-stub", **limits),
                deployment(claude, number="claude", model="claude", name="anthropic/claude-stub", **limits),
                deployment(f"http://127.0.0.1:{nowhere}/v1", number="dead", model="dead", **limits),
                deployment(base, number="free", model="free"),
                deployment(base, number="by-id", model="named", tpm=1_000, about=no_edge),
                router={"num_retries": 1, "fallbacks": [{"dead": ["gpt"]}], "allowed_fails": 1_000},
                # LiteLLM's own endpoint for metrics, with ours among them.
                callbacks=["prometheus", "quotum.litellm.handler"],
                cache=True,
                cache_params={"type": "local", "mode": "default_off"},
            ),
            {"QUOTUM_ADMIN_LISTEN": f"127.0.0.1:{self.admin}"},
        )
        self.proxy.wait()
        until(lambda: self.status()["ready"], what="the pod")

    def status(self) -> dict[str, Any]:
        try:
            return httpx.get(f"http://127.0.0.1:{self.admin}/status").json()
        except httpx.HTTPError:
            return {"ready": False}

    def charged(self, deployment: str, unit: str = "tokens") -> int:
        """Everything charged so far, once nothing is open any more."""
        status = until(lambda: (status := self.status())["pod"]["open"] == 0 and status, what="the settlement")
        [limit] = [limit for limit in status["limits"] if limit["limit_id"] == deployment]
        [quota] = [quota for quota in limit["quotas"] if quota["unit"] == unit]
        return quota["admitted_total"] - quota["refunded_total"]

    def close(self) -> None:
        self.proxy.close()
        self.stub.close()


@pytest.fixture(scope="module")
def pod():
    pod = Pod()
    yield pod
    pod.close()


def use(prompt: int, completion: int) -> dict[str, str]:
    return {"x-stub-prompt-tokens": str(prompt), "x-stub-completion-tokens": str(completion)}


def stream(pod: Pod, path: str, body: dict[str, Any], headers: dict[str, str]) -> str:
    headers = {"authorization": "Bearer sk-test", **headers}
    with httpx.stream("POST", f"{pod.proxy.url}{path}", json={**body, "stream": True}, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        return "".join(answer.iter_text())


RESPONSES = {"model": "gpt", "input": "Say something.", "max_output_tokens": 300}
ANTHROPIC = {"model": "claude", "messages": MESSAGES, "max_tokens": 300}

WHOLE = [
    ("/v1/chat/completions", CHAT, "gpt"),
    ("/v1/chat/completions", {**CHAT, "no-log": True}, "gpt"),
    ("/v1/completions", {"model": "text", "prompt": "Say something.", "max_tokens": 300}, "text"),
    ("/v1/responses", RESPONSES, "gpt"),
    ("/v1/messages", ANTHROPIC, "claude"),
    ("/v1/messages", {**ANTHROPIC, "model": "gpt"}, "gpt"),
    ("/v1/chat/completions", {**CHAT, "model": "claude"}, "claude"),
]


@pytest.mark.parametrize(("path", "body", "deployment"), WHOLE)
def test_a_whole_answer_is_charged_with_what_it_used(pod, path, body, deployment):
    before, requests = pod.charged(deployment), pod.charged(deployment, "requests")
    answer = pod.proxy.post(path, body, **use(50, 120))
    assert answer.status_code == 200, answer.text
    assert pod.charged(deployment) - before == 170
    assert pod.charged(deployment, "requests") - requests == 1


def test_what_is_reserved_is_the_prompts_bound_and_the_cap(pod):
    def net() -> int:
        [limit] = [limit for limit in pod.status()["limits"] if limit["limit_id"] == "gpt"]
        return limit["quotas"][0]["admitted_total"] - limit["quotas"][0]["refunded_total"]

    before = pod.charged("gpt")
    with ThreadPoolExecutor() as pool:
        slow = {**use(50, 120), "x-stub-first-byte-ms": "2000"}
        answer = pool.submit(pod.proxy.post, "/v1/chat/completions", CHAT, **slow)
        until(lambda: pod.status()["pod"]["open"] == 1, what="the reservation")
        # 14 bytes of text, a little for the message, and the cap.
        assert 314 <= net() - before <= 345
        assert answer.result().status_code == 200
    assert pod.charged("gpt") - before == 170


def test_embeddings_are_charged_with_their_input(pod):
    before = pod.charged("embed")
    answer = pod.proxy.post("/v1/embeddings", {"model": "embed", "input": ["one", "two"]}, **use(40, 0))
    assert answer.status_code == 200, answer.text
    assert pod.charged("embed") - before == 40


STREAMS = [
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "gpt"),
    ("/v1/responses", RESPONSES, "gpt"),
    ("/v1/messages", ANTHROPIC, "claude"),
    ("/v1/messages", {**ANTHROPIC, "model": "gpt"}, "gpt"),
    ("/v1/chat/completions", {**CHAT, "model": "claude", "stream_options": {"include_usage": True}}, "claude"),
]


@pytest.mark.parametrize(("path", "body", "deployment"), STREAMS)
def test_a_stream_is_charged_with_what_it_used(pod, path, body, deployment):
    before, requests = pod.charged(deployment), pod.charged(deployment, "requests")
    stream(pod, path, body, use(50, 120))
    assert pod.charged(deployment) - before == 170
    assert pod.charged(deployment, "requests") - requests == 1


def test_a_stream_without_usage_is_charged_with_litellms_own_count(pod):
    before = pod.charged("gpt")
    stream(pod, "/v1/chat/completions", CHAT, use(50, 120))
    # Its own tokenizer counts the prompt and the words; what was reserved is over 300.
    assert 100 <= pod.charged("gpt") - before <= 200


def test_more_than_was_reserved_is_charged_too(pod):
    before = pod.charged("gpt")
    answer = pod.proxy.post("/v1/chat/completions", {**CHAT, "max_tokens": 10}, **use(5_000, 10))
    assert answer.status_code == 200, answer.text
    assert pod.charged("gpt") - before == 5_010


def test_a_deployment_without_limits_is_left_alone(pod):
    assert pod.proxy.post("/v1/chat/completions", {**CHAT, "model": "free"}).status_code == 200
    assert "free" not in [limit["limit_id"] for limit in pod.status()["limits"]]


def test_a_request_that_the_upstream_rejects_is_charged_as_a_request_only(pod):
    before, requests = pod.charged("gpt"), pod.charged("gpt", "requests")
    answer = pod.proxy.post("/v1/chat/completions", CHAT, **{"x-stub-fault": "400"})
    assert answer.status_code == 400, answer.text
    assert pod.charged("gpt") - before == 0
    assert pod.charged("gpt", "requests") - requests == 1


def test_every_retry_of_a_failing_upstream_is_charged_with_its_prompt(pod):
    before, requests, sent = pod.charged("gpt"), pod.charged("gpt", "requests"), len(pod.stub.ledger())
    answer = pod.proxy.post("/v1/chat/completions", CHAT, **{"x-stub-fault": "500"})
    assert answer.status_code == 500, answer.text
    attempts = len(pod.stub.ledger()) - sent
    assert attempts >= 2
    assert pod.charged("gpt", "requests") - requests == attempts
    assert 0 < pod.charged("gpt") - before <= attempts * 60


def test_a_fallback_is_charged_where_it_went_and_nothing_where_nobody_listens(pod):
    before, dead, requests = pod.charged("gpt"), pod.charged("dead"), pod.charged("dead", "requests")
    answer = pod.proxy.post("/v1/chat/completions", {**CHAT, "model": "dead"}, **use(50, 120))
    assert answer.status_code == 200, answer.text
    assert pod.charged("gpt") - before == 170
    assert pod.charged("dead") - dead == 0
    assert pod.charged("dead", "requests") - requests == 0


def test_an_answer_from_the_cache_costs_nothing(pod):
    body = {**CHAT, "messages": [{"role": "user", "content": "Say it again."}], "cache": {"use-cache": True}}
    before = pod.charged("gpt")
    for _ in range(3):
        answer = pod.proxy.post("/v1/chat/completions", body, **use(50, 120))
        assert answer.status_code == 200, answer.text
    asked = [record for record in pod.stub.ledger() if record["prompt_tokens"] == 50]
    assert asked
    assert pod.charged("gpt") - before == 170


def test_a_client_that_hangs_up_in_a_stream_is_charged_for_no_more_than_it_reserved(pod):
    before = pod.charged("gpt")
    headers = {"authorization": "Bearer sk-test", **use(50, 200), "x-stub-body-ms": "3000"}
    with httpx.stream("POST", f"{pod.proxy.url}/v1/chat/completions", json={**CHAT, "stream": True}, headers=headers) as answer:
        next(answer.iter_text())
    used = until(lambda: pod.charged("gpt") - before, what="a charge")
    assert 0 < used <= 400


def test_a_request_that_names_its_deployment_is_limited_too(pod):
    # LiteLLM does not filter it.
    body = {**CHAT, "model": "by-id", "max_tokens": 600}
    before = pod.charged("by-id")
    assert pod.proxy.post("/v1/chat/completions", body, **use(50, 120)).status_code == 200
    assert pod.charged("by-id") - before == 170
    answer = pod.proxy.post("/v1/chat/completions", {**body, "max_tokens": 2_000})
    assert answer.status_code == 429, answer.text
    assert answer.headers["x-quotum-reason"] == "too_large"


def test_what_can_never_fit_is_refused_at_once_and_without_a_time_to_come_back(pod):
    answer = pod.proxy.post("/v1/chat/completions", {**CHAT, "max_tokens": 20_000_000})
    assert answer.status_code == 429, answer.text
    assert "never" in answer.text
    assert "retry-after" not in answer.headers
    assert answer.headers["x-quotum-reason"] == "too_large"


def test_the_metrics_stand_in_litellms_own_endpoint(pod):
    pod.proxy.post("/v1/chat/completions", CHAT, **use(50, 120))
    until(lambda: pod.status()["pod"]["open"] == 0)
    own = httpx.get(f"http://127.0.0.1:{pod.admin}/metrics", timeout=10.0).text
    assert "# TYPE quotum_admitted_total counter" in own and "# EOF" not in own
    strict = {"accept": "application/openmetrics-text; version=1.0.0"}
    strict_text = httpx.get(f"http://127.0.0.1:{pod.admin}/metrics", headers=strict, timeout=10.0).text
    names = {family.name for family in text_string_to_metric_families(strict_text)}
    assert {"quotum_admitted", "quotum_estimate_error"} <= names
    theirs = httpx.get(f"{pod.proxy.url}/metrics/", timeout=10.0).text
    for text in (own, theirs):
        assert re.search(r'^quotum_limit\{deployment="gpt",unit="tokens",[^}]*\} 1(0000000|e\+07|\.0e\+07)', text, re.M), text
        assert re.search(r'^quotum_admitted_total\{deployment="gpt",unit="tokens"', text, re.M), text
    assert "litellm_" in theirs

"""LiteLLM's callback by itself, its hooks called as LiteLLM calls them."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from machine import in_a_minute_with

# Nothing is asked of the network when LiteLLM is imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # noqa: E402

import quotum.litellm  # noqa: E402

MESSAGES = [{"role": "user", "content": "Say something."}]


def a_deployment(number: str, about: dict[str, Any] | None = None, **limits: Any) -> dict[str, Any]:
    params = {"model": "openai/gpt-4o", "api_base": "https://openai.invalid", **limits}
    return {"model_name": "gpt", "litellm_params": params, "model_info": {"id": number, **(about or {})}}


class Router:
    """As much of LiteLLM's router as the callback asks."""

    enable_pre_call_checks = enable_tag_filtering = False

    def __init__(self, *deployments: dict[str, Any]) -> None:
        self.model_list = list(deployments)

    def _get_routing_context(self, model: str, kwargs: dict[str, Any]) -> tuple[str, None]:
        return "simple-shuffle", None

    def get_model_from_alias(self, model: str) -> str:
        return model

    def get_model_info(self, id: str) -> dict[str, Any] | None:
        return next((one for one in self.model_list if one["model_info"]["id"] == id), None)


@pytest.fixture
def callback(monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    router = Router()
    monkeypatch.setattr(quotum.litellm, "_router", lambda: router)
    callback = quotum.litellm.Callback()
    in_a_minute_with(5.0)
    yield SimpleNamespace(hooks=callback, router=router, pod=callback.pod)
    callback.pod.leave()


def filtered(callback, **request: Any) -> Any:
    """Asks the filter for all deployments that the router has."""
    kwargs = {"max_tokens": 300, **request}
    deployments = list(callback.router.model_list)
    return asyncio.run(callback.hooks.async_filter_deployments("gpt", deployments, MESSAGES, kwargs))


def called(callback, deployment: dict[str, Any], **request: Any) -> None:
    """Calls a deployment that no filter was asked for."""
    kwargs = {**deployment["litellm_params"], "model_info": deployment["model_info"], "messages": MESSAGES, **request}
    asyncio.run(callback.hooks.async_pre_call_deployment_hook(kwargs, "acompletion"))


def used(callback, number: str) -> int:
    [limit] = [limit for limit in json.loads(callback.pod.status())["limits"] if limit["limit_id"] == number]
    return limit["quotas"][0]["used"]


@pytest.mark.parametrize(
    ("about", "limits", "why"),
    [
        ({"tpm": "many"}, {}, "deployment .one.: tpm: 'many' is not a whole number"),
        ({"tpm": [1]}, {}, "deployment .one.: tpm: .* is not a whole number"),
        ({"tpm": 0.5}, {}, "deployment .one.: tpm: 0.5 is not a whole number"),
        ({"rpm": True}, {}, "deployment .one.: rpm: True is not a whole number"),
        ({}, {"tpm": -1}, "deployment .one.: tpm: -1 is not a whole number"),
        ({"quotum": "sliding"}, {"tpm": 1_000}, "deployment .one.: .*sliding"),
        ({"quotum": {"kind": {1, 2}}}, {"tpm": 1_000}, "not JSON serializable"),
    ],
)
def test_what_cannot_be_limited_as_it_is_written_is_refused_and_named(callback, about, limits, why):
    callback.router.model_list = [a_deployment("one", about, **limits)]
    for ask in (lambda: filtered(callback), lambda: called(callback, callback.router.model_list[0])):
        with pytest.raises(litellm.RateLimitError, match=why):
            ask()


def test_text_that_is_a_number_is_one(callback):
    callback.router.model_list = [a_deployment("one", {"tpm": "10000"})]
    filtered(callback)
    assert used(callback, "one") > 300


def test_what_was_wrong_is_mended_once_it_is_taken_out_of_the_router(callback, caplog, monkeypatch):
    monkeypatch.setattr(quotum.litellm, "_LOOK_AGAIN", 0.0)
    right, wrong = a_deployment("right", tpm=10_000), a_deployment("wrong", tpm=-1)
    callback.router.model_list = [right, wrong]
    for _ in range(3):
        with pytest.raises(litellm.RateLimitError, match="wrong"):
            filtered(callback)
    assert len([record for record in caplog.records if "until this is mended" in record.message]) == 1
    callback.router.model_list = [right]
    assert filtered(callback) == [right]


def test_terms_that_change_count_from_the_next_request_on(callback):
    callback.router.model_list = [a_deployment("one", tpm=10_000)]
    filtered(callback)
    before = used(callback, "one")
    callback.router.model_list = [a_deployment("one", {"quotum": {"tokenizer": "bytes", "edge": 0.0}}, tpm=10_000)]
    filtered(callback)
    # By its bytes the prompt counts more.
    assert used(callback, "one") - before > before


def test_a_request_that_names_a_deployment_nobody_has_looked_at_is_limited(callback):
    first, later = a_deployment("first", tpm=10_000), a_deployment("later", tpm=1_000)
    callback.router.model_list = [first]
    filtered(callback)
    callback.router.model_list = [first, later]
    called(callback, later, max_tokens=300)
    assert used(callback, "later") > 300
    # Nor one that only the call itself knows.
    only = a_deployment("only", tpm=1_000)
    called(callback, only, max_tokens=300)
    assert used(callback, "only") > 300
    with pytest.raises(litellm.RateLimitError):
        called(callback, only, max_tokens=900)
    called(callback, a_deployment("free"), max_tokens=900)


def test_half_of_a_surrogate_pair_hides_no_cap(callback):
    callback.router.model_list = [a_deployment("one", tpm=100_000)]
    deployments, kwargs = callback.router.model_list, {"max_tokens": 50_000}
    messages = [{"role": "user", "content": "\ud800"}]
    asyncio.run(callback.hooks.async_filter_deployments("gpt", list(deployments), messages, kwargs))
    assert used(callback, "one") > 50_000


def test_of_a_large_group_every_deployment_is_spent(callback):
    deployments = callback.router.model_list = [a_deployment(f"{number}", tpm=400) for number in range(20)]
    picked = [filtered(callback)[0]["model_info"]["id"] for _ in deployments]
    assert sorted(picked) == sorted(one["model_info"]["id"] for one in deployments)
    with pytest.raises(litellm.RateLimitError):
        filtered(callback)


@pytest.mark.parametrize("count", [2, 50])
def test_the_hooks_of_a_request_cost_no_millisecond(callback, count):
    """A twentieth of that with two deployments; the machine may be busy."""
    deployments = callback.router.model_list = [a_deployment(f"{number}", tpm=100_000_000) for number in range(count)]

    async def main() -> float:
        took = []
        for _ in range(200):
            begun = time.perf_counter()
            [picked] = await callback.hooks.async_filter_deployments("gpt", list(deployments), MESSAGES, {"max_tokens": 300})
            await callback.hooks.async_pre_call_check(picked, None)
            kwargs = {**picked["litellm_params"], "model_info": picked["model_info"], "messages": MESSAGES}
            await callback.hooks.async_pre_call_deployment_hook(kwargs, "acompletion")
            usage = {"usage": {"prompt_tokens": 50, "completion_tokens": 150, "total_tokens": 200}}
            await callback.hooks.async_post_call_success_deployment_hook({}, usage, "acompletion")
            took.append(time.perf_counter() - begun)
        return sorted(took)[len(took) // 2]

    median = asyncio.run(main())
    print(json.dumps({"deployments": count, "hooks_ms_p50": round(median * 1_000, 3)}))
    assert median < 0.001

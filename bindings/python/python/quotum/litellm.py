"""LiteLLM's limits, held over all pods of a proxy: `callbacks: ["quotum.litellm.handler"]`.

Knows LiteLLM's hooks, where its users write limits, and what a request says. Must not know how a
limit decides: that is the pod's. The invariants it keeps: no request leaves for a deployment with
limits without a reservation there; a reservation is settled with what was used, or stays charged;
and an error of its own refuses the request instead of letting it pass unlimited.

Written against LiteLLM 1.106; docs/litellm.md has what was tried with which version.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import hashlib
import json
import logging
import math
import multiprocessing
import multiprocessing.util
import random
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import httpx
import litellm

# OpenAI's SDK imports this at the first request, after the last hook: 0.4 s, and 3 s on a busy machine, in
# which a window can end.
import openai.resources  # noqa: F401
from litellm.integrations.custom_logger import CustomLogger
from litellm.router_strategy.simple_shuffle import simple_shuffle

from ._denied import Denied
from ._quotum import Pod

__all__ = ["handler"]

_log = logging.getLogger("quotum")

_LIMITS = ("tpm", "rpm", "itpm", "otpm")

# What decides how much a request may use.
_FIELDS = (
    "messages", "prompt", "suffix", "input", "system", "instructions", "tools", "tool_choice", "functions",
    "response_format", "text", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of",
    "thinking", "reasoning", "previous_response_id",
)  # fmt: skip

# Where a reservation's number waits for the success event, which runs later and elsewhere.
_STASH = "quotum_reservation"

# How long the router is waited for after the callback was loaded.
_ROUTER_WITHIN = 120.0

# How many of a group's deployments are asked in the order of LiteLLM's weighted shuffle, which goes through all of them
# for each: of 50 that took more than a millisecond. Where none of these has room the order is chance.
_BY_WEIGHT = 8

# How often it is looked whether a deployment that could not be limited as it was written has been mended.
_LOOK_AGAIN = 1.0


class _Attempt:
    """One reservation, until when its request must leave, and how far that has come."""

    __slots__ = ("deployment", "number", "sent", "until")

    def __init__(self, number: int, deployment: str, until: float) -> None:
        self.number = number
        self.deployment = deployment
        self.until = until
        self.sent = False

    def is_late(self) -> bool:
        """Whether a request that leaves now may arrive in a window in which it is not charged."""
        return time.time() >= self.until


# The attempt that runs in this task, and what was asked: the hooks of one attempt share a task.
_attempt: contextvars.ContextVar[_Attempt | None] = contextvars.ContextVar("quotum_attempt", default=None)
_asked: contextvars.ContextVar[tuple[str, str, int] | None] = contextvars.ContextVar("quotum_asked", default=None)


def _end_in_order() -> None:
    """Lets uvicorn return after its graceful shutdown, so that what is to be done at exit is done.

    It raises the signal that ended it once more instead, to whoever handled it before: the process
    dies of SIGTERM, and neither leaves nor hands over its rights.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    by_uvicorn = signal.getsignal(signal.SIGTERM)
    captured = getattr(getattr(by_uvicorn, "__self__", None), "_captured_signals", None)
    if not callable(by_uvicorn) or not isinstance(captured, list):
        return  # Another server: what it does at its end is its own.

    def told(number: int, frame: Any) -> None:
        by_uvicorn(number, frame)
        captured[:] = [other for other in captured if other != number]

    signal.signal(signal.SIGTERM, told)


class Callback(CustomLogger):
    """The hooks. `handler` is the one instance of a process."""

    def __init__(self) -> None:
        super().__init__()
        # Wrong settings end LiteLLM's start here, with a sentence.
        self.pod = Pod()
        # Of each deployment: what is declared of it.
        self._limits: dict[str, tuple[Any, ...]] = {}
        self._names: dict[str, str] = {}
        self._wrong: str | None = None
        self._look_again = 0.0
        self._starting: asyncio.Task[None] | None = None
        if multiprocessing.parent_process() is None:
            atexit.register(self.pod.leave)
        else:
            # A worker: multiprocessing ends it without what is registered with atexit.
            multiprocessing.util.Finalize(None, self.pod.leave, exitpriority=0)
        _register_metrics(self.pod)
        # LiteLLM loads callbacks in each worker's own event loop, after the fork. Whoever
        # imports this elsewhere starts with the first request.
        try:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        except RuntimeError:
            pass

    # --- which deployments there are

    async def _start(self) -> None:
        """Takes a seat as soon as the router is there: a pod without traffic is one, too."""
        _end_in_order()
        for _ in range(int(_ROUTER_WITHIN / 0.05)):
            router = _router()
            if router is not None and router.model_list:
                self._declare(router.model_list)
                return
            await asyncio.sleep(0.05)

    def _declare(self, deployments: Iterable[Mapping[str, Any]]) -> None:
        """Tells the pod which deployments there are, with limits in LiteLLM's three places."""
        # Of two with one name, the later is the one that a request is about.
        by_name = {self._name(deployment): deployment for deployment in deployments}
        limits = {name: _limits(deployment) for name, deployment in by_name.items()}
        try:
            declared = [_declared(name, by_name[name], limits[name]) for name in by_name if _is_limited(limits[name])]
            self.pod.declare(json.dumps(declared))
            wrong = None
        except (TypeError, ValueError) as error:
            wrong = str(error)
            self._look_again = time.monotonic() + _LOOK_AGAIN
            if wrong != self._wrong:
                _log.error("no limited deployment is served until this is mended: %s", wrong)
        self._limits.update(limits)
        self._wrong = wrong

    def _limited(self, deployments: Iterable[Mapping[str, Any]]) -> list[str]:
        """Returns the names of those that have limits, once the pod knows all of them as they are."""
        names = []
        for deployment in deployments:
            name = self._name(deployment)
            limits = _limits(deployment)
            if self._limits.get(name) != limits:
                self._declare([*_model_list(), deployment])
            if _is_limited(limits):
                names.append(name)
        return names

    def _name(self, deployment: Mapping[str, Any]) -> str:
        """Returns the name that all pods have for a deployment.

        An id that LiteLLM made is a hash of everything, keys and all: it may differ between pods.
        """
        about = deployment.get("model_info") or {}
        number = str(about.get("original_model_id") or about.get("id") or "")
        name = self._names.get(number)
        if name is not None:
            return name
        name = number
        if not number or (len(number) == 64 and all(digit in "0123456789abcdef" for digit in number)):
            params = deployment.get("litellm_params") or {}
            base = str(params.get("api_base") or params.get("base_url") or "").split("?")[0]
            model = str(deployment.get("model_name"))
            parts = "\0".join((model, str(params.get("model")), base))
            name = first = f"{model}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
            # Those that differ in nothing but their key are told apart by their order.
            taken = set(self._names.values())
            for more in range(2, len(taken) + 3):
                if name not in taken:
                    break
                name = f"{first}-{more}"
        self._names[number] = name
        return name

    # --- before the call: reserve

    async def async_filter_deployments(
        self,
        model: str,
        healthy_deployments: list[Any],
        messages: list[Any] | None,
        request_kwargs: dict[str, Any] | None = None,
        parent_otel_span: Any = None,
    ) -> list[Any]:
        try:
            return await self._filter(model, healthy_deployments, messages, request_kwargs or {})
        except Denied as denied:
            raise _refusal(model, denied) from None
        except Exception as error:
            raise self._broken(model, error) from error

    async def _filter(
        self, model: str, deployments: list[Any], messages: list[Any] | None, kwargs: dict[str, Any]
    ) -> list[Any]:
        self._supersede()
        _asked.set(None)
        limited = self._limited(deployments)
        if not limited:
            return deployments
        self._check()
        api, body = _body(model, kwargs, messages)
        router = _router()
        if not _picks_last(router, model, kwargs):
            by_name = {self._name(deployment): deployment for deployment in deployments}
            room = await self.pod.room([list(by_name)], api, body)
            _asked.set((api, body, len(room)))
            return [by_name[name] for name in room]
        levels = _levels(router, model, deployments, kwargs)
        if not levels:
            # LiteLLM will say so itself.
            return deployments
        by_name = {self._name(deployment): deployment for level in levels for deployment in level}
        names = [[self._name(deployment) for deployment in level] for level in levels]
        attempt = _Attempt(*await self.pod.reserve(names, api, body))
        _attempt.set(attempt)
        return [by_name[attempt.deployment]]

    async def async_pre_call_check(self, deployment: dict[str, Any], parent_otel_span: Any) -> None:
        asked = _asked.get()
        if asked is None:
            return
        model = str(deployment.get("model_name"))
        try:
            attempt, name = _attempt.get(), self._name(deployment)
            if self._limited([deployment]) and (attempt is None or attempt.deployment != name):
                await self._reserve(name, asked[0], asked[1])
        except Denied as denied:
            # Another deployment had room a moment ago: LiteLLM may try again.
            raise _refusal(model, denied, retry=asked[2] > 1) from None
        except Exception as error:
            raise self._broken(model, error) from error

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
        about = kwargs.get("model_info")
        if not isinstance(about, Mapping) or not about.get("id"):
            return
        model = str(kwargs.get("model"))
        try:
            attempt, number = _attempt.get(), str(about.get("original_model_id") or about["id"])
            name = self._names.get(number)
            if attempt is None or attempt.deployment != name:
                # No filter reserved for it: nobody has looked at its limits as they are now.
                name = self._unfiltered(number, kwargs)
            if name is None:
                # It goes where nothing is limited; what was reserved elsewhere is not used.
                self._supersede()
                return
            if attempt is not None and attempt.sent and attempt.deployment == name:
                # A call inside of the call: one reservation is enough.
                return
            if attempt is None or attempt.deployment != name or attempt.is_late():
                # The request names its deployment, or something after the filter picked another one,
                # or it lay so long that the upstream may count it in a window in which it is not charged.
                api, body = _body(model, kwargs, kwargs.get("messages"))
                attempt = await self._reserve(name, api, body)
            attempt.sent = True
            logged = kwargs.get("litellm_logging_obj")
            if logged is not None:
                logged.model_call_details[_STASH] = attempt.number
        except Denied as denied:
            raise _refusal(model, denied) from None
        except Exception as error:
            raise self._broken(model, error) from error

    def log_pre_api_call(self, model: Any, messages: Any, kwargs: Any) -> None:
        """The last that LiteLLM calls before it connects. It listens to no refusal here, so what lay too
        long since the hook above is charged where it arrives, whether there is room or not.
        """
        attempt = _attempt.get()
        if attempt is not None and attempt.sent and attempt.is_late():
            self.pod.late(attempt.number)
            attempt.until = math.inf

    async def _reserve(self, name: str, api: str, body: str) -> _Attempt:
        self._check()
        self._supersede()
        attempt = _Attempt(*await self.pod.reserve([[name]], api, body))
        _attempt.set(attempt)
        return attempt

    def _supersede(self) -> None:
        """A new attempt of the same request ends the one before, if nobody said how it ended."""
        before = _attempt.get()
        if before is not None:
            self.pod.ended(before.number, "failed" if before.sent else "unsent")
            _attempt.set(None)

    def _unfiltered(self, number: str, kwargs: Mapping[str, Any]) -> str | None:
        """Returns the name of a deployment that a request names by its id, once the pod knows it; None if it
        has no limits.
        """
        router = _router()
        deployment = router.get_model_info(number) if router is not None else None
        if deployment is None:
            # The router has it no more, or never had: what the call itself carries counts.
            deployment = {"model_name": kwargs.get("model"), "litellm_params": kwargs, "model_info": kwargs["model_info"]}
            if not _is_limited(_limits(deployment)):
                return None
        return self._name(deployment) if self._limited([deployment]) else None

    def _check(self) -> None:
        if self._wrong is not None and time.monotonic() >= self._look_again:
            # It may have been taken out of the router: then nothing else tells.
            self._declare(_model_list())
        if self._wrong is not None:
            raise ValueError(self._wrong)

    def _broken(self, model: str, error: Exception) -> Exception:
        """An error of our own must not let a request pass, nor look like LiteLLM's."""
        if isinstance(error, litellm.RateLimitError):
            return error
        if self._wrong is None:
            _log.error("a request is refused: %s", error, exc_info=error)
        return _refusal(model, Denied(f"the limits cannot be checked: {error}", reason="unreachable", retry_after=1.0))

    # --- after the call: settle

    async def async_post_call_success_deployment_hook(self, request_data: Any, response: Any, call_type: Any) -> None:
        attempt = _attempt.get()
        if attempt is None:
            return
        try:
            hidden = getattr(response, "_hidden_params", None) or {}
            if hidden.get("cache_hit"):
                self.pod.ended(attempt.number, "unsent")
                return
            usage = response.get("usage") if isinstance(response, Mapping) else getattr(response, "usage", None)
            self._used(attempt.number, usage)
        except Exception:
            # It stays open, and the success event settles it.
            _log.exception("an answer's usage cannot be read")

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        number = kwargs.get(_STASH)
        if number is None:
            return
        try:
            logged = kwargs.get("standard_logging_object") or {}
            if logged.get("cache_hit") or kwargs.get("cache_hit"):
                self.pod.ended(number, "unsent")
            elif not self._used(number, logged):
                self.pod.ended(number, "unreported")
        except Exception:
            _log.exception("an answer's usage cannot be read; what was reserved for it stays charged")

    def _used(self, number: int, usage: Any) -> bool:
        """Settles with a usage object; False if it says nothing."""
        prompt = _count(usage, "prompt_tokens", "input_tokens")
        completion = _count(usage, "completion_tokens", "output_tokens")
        total = _count(usage, "total_tokens")
        if not total and not prompt and not completion:
            return False
        self.pod.used(number, prompt, completion, max(total, prompt + completion))
        return True

    async def async_post_call_failure_deployment_hook(
        self, request_data: Any, exception: Exception, call_type: Any, fallback_depth: int | None = None
    ) -> None:
        attempt = _attempt.get()
        if attempt is not None:
            self.pod.ended(attempt.number, _outcome(exception))
            _attempt.set(None)

    async def async_post_call_failure_hook(
        self, request_data: Any, original_exception: Exception, user_api_key_dict: Any, traceback_str: str | None = None
    ) -> None:
        attempt = _attempt.get()
        if attempt is not None:
            self.pod.ended(attempt.number, _outcome(original_exception) if attempt.sent else "unsent")
            _attempt.set(None)


class _Metrics:
    """The pod's metrics among LiteLLM's, as prometheus_client collects them."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def describe(self) -> Iterable[Any]:
        # Nothing is asked of a pod that has not started.
        return ()

    def collect(self) -> Iterable[Any]:
        from prometheus_client.openmetrics.parser import text_string_to_metric_families

        if self.pod.seat == "standing":
            return []
        try:
            return list(text_string_to_metric_families(self.pod.metrics()))
        except Exception as error:
            # LiteLLM's own metrics must not fail for ours.
            _log.warning("no metrics of quotum: %s", error)
            return []


def _register_metrics(pod: Pod) -> None:
    """Adds the quotum_* series to LiteLLM's endpoint, where prometheus_client is installed."""
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    REGISTRY.register(_Metrics(pod))


def _router() -> Any:
    from litellm.proxy import proxy_server

    return proxy_server.llm_router


def _model_list() -> list[Any]:
    router = _router()
    return list(router.model_list or ()) if router is not None else []


def _limits(deployment: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns tpm, rpm, itpm and otpm, from where LiteLLM looks for them, in its order, and the terms."""
    about = deployment.get("model_info") or {}
    places = (deployment, deployment.get("litellm_params") or {}, about)
    amounts = (next((place[limit] for place in places if place.get(limit) is not None), None) for limit in _LIMITS)
    return (*amounts, about.get("quotum"))


def _is_limited(limits: Sequence[Any]) -> bool:
    return any(amount is not None for amount in limits[: len(_LIMITS)])


def _declared(name: str, deployment: Mapping[str, Any], limits: Sequence[Any]) -> dict[str, Any]:
    """Returns a deployment as the pod is told of it."""
    *amounts, terms = limits
    written = {limit: _amount(name, limit, amount) for limit, amount in zip(_LIMITS, amounts) if amount is not None}
    return {"id": name, **written, "model": _model(deployment), "terms": terms or {}}


def _amount(name: str, limit: str, written: Any) -> int:
    """Returns a limit as a number: LiteLLM leaves what stands in `model_info` as it is written."""
    try:
        amount = int(written)
        if amount < 0 or isinstance(written, bool) or (isinstance(written, float) and amount != written):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"deployment {json.dumps(name)}: {limit}: {written!r} is not a whole number") from None
    return amount


def _model(deployment: Mapping[str, Any]) -> str:
    """Returns the name of OpenAI's model that is served, if that is known: on Azure a name says nothing."""
    params, about = deployment.get("litellm_params") or {}, deployment.get("model_info") or {}
    base = about.get("base_model") or params.get("base_model")
    provider, _, model = str(base or params.get("model") or "").rpartition("/")
    if base is None and provider not in ("", "openai", "text-completion-openai"):
        return ""
    return model


def _picks_last(router: Any, model: str, kwargs: dict[str, Any]) -> bool:
    """Returns whether nothing but a shuffle comes between this filter and the pick."""
    if router is None or router.enable_pre_call_checks or router.enable_tag_filtering:
        return False
    if kwargs.get("enable_tag_filtering") or getattr(router, "routing_plugins", None):
        return False
    strategy, _ = router._get_routing_context(model, kwargs)
    return bool(strategy == "simple-shuffle")


def _levels(router: Any, model: str, deployments: Sequence[Any], kwargs: dict[str, Any]) -> list[list[Any]]:
    """Returns the deployments in the order in which they are asked: by `order`, and shuffled by weight."""
    left = list(deployments)
    for excluded in ("_excluded_deployment_ids", "_retry_skipped_deployment_ids"):
        ids = set(kwargs.get(excluded) or ())
        kept = [deployment for deployment in left if (deployment.get("model_info") or {}).get("id") not in ids]
        # Those that have refused are asked again where nobody else is left.
        left = kept if kept or excluded == "_excluded_deployment_ids" else left
    target = kwargs.get("_target_order")
    if target is not None:
        left = [deployment for deployment in left if _order(deployment) == target]
    levels = []
    for order in sorted({_order(deployment) for deployment in left}):
        level = [deployment for deployment in left if _order(deployment) == order]
        shuffled = []
        while len(level) > 1 and len(shuffled) < _BY_WEIGHT:
            picked = simple_shuffle(router.get_model_from_alias, level, model, kwargs)
            level = [deployment for deployment in level if deployment is not picked]
            shuffled.append(picked)
        random.shuffle(level)
        levels.append(shuffled + level)
    return levels


def _order(deployment: Mapping[str, Any]) -> float:
    order = litellm.utils.get_deployment_order(deployment)
    return math.inf if order is None else order


def _body(model: str, kwargs: Mapping[str, Any], messages: list[Any] | None) -> tuple[str, str]:
    """Returns which API a request speaks, and what of it decides how much it may use."""
    body = {field: kwargs[field] for field in _FIELDS if kwargs.get(field) is not None}
    if messages is not None:
        body["messages"] = messages
    body["model"] = model or "unnamed"
    route = ""
    for metadata in ("litellm_metadata", "metadata"):
        inside = kwargs.get(metadata)
        if isinstance(inside, Mapping):
            route = route or str(inside.get("user_api_key_request_route") or "")
    if "embedding" in route or ("input" in body and "encoding_format" in kwargs):
        api = "embeddings"
    elif route.endswith("/messages"):
        api = "messages"
    elif "input" in body and "messages" not in body:
        api = "responses"
    elif "prompt" in body and "messages" not in body:
        api = "completions"
    else:
        api = "chat"
    # Half of a surrogate pair, which JSON can carry and nothing else, counts as the character that replaces it.
    return api, json.dumps(body, default=str, ensure_ascii=False).encode("utf-8", "replace").decode()


def _count(usage: Any, *names: str) -> int:
    for name in names:
        count = usage.get(name) if isinstance(usage, Mapping) else getattr(usage, name, None)
        if isinstance(count, (int, float)) and count > 0:
            return int(count)
    return 0


def _outcome(error: BaseException) -> str:
    """Returns what a failed attempt costs: docs/algorithm.md, section 4."""
    cause: BaseException | None = error
    for _ in range(8):
        if isinstance(cause, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)):
            return "unsent"
        if cause is None:
            break
        cause = cause.__cause__ or cause.__context__
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return "rejected"
    return "failed"


def _refusal(model: str, denied: Denied, retry: bool = False) -> litellm.RateLimitError:
    """Returns the 429 that LiteLLM passes on as it is: at once, and with its headers."""
    response = httpx.Response(429, request=httpx.Request("POST", "https://quotum.invalid"))
    message = f"quotum: {denied}"
    if retry:
        error = litellm.RateLimitError(message=message, llm_provider="", model=model, response=response)
    else:
        error = litellm.RateLimitError(
            message=message, llm_provider="", model=model, response=response, num_retries=0
        )
    headers = {"x-quotum-refused-by": "quotum", "x-quotum-reason": denied.reason}
    if denied.limit:
        headers["x-quotum-limit"] = f"{denied.deployment}: {denied.limit}"
    if denied.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(denied.retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(denied.retry_after * 1_000)))
    error.headers = headers
    return error


handler = Callback()

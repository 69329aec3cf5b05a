"""What is offered to a fleet of proxies, and what of it arrived upstream in one minute.

Knows workloads and the stub's ledger. Must not know how the proxies are limited.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from fleet import Stub

LIMIT = 10_000

# 50 tokens as the stub counts them, four bytes each.
PROMPT = ("The quick brown fox jumps over the lazy dog. " * 5)[:200]

# A request's tokens in the mean: 50, and 50 to 250.
MEAN = 200


@dataclass
class Sent:
    """One request: when it is sent, in seconds from the minute's start, and where."""

    at: float
    pod: int
    stream: bool = False
    completion: int = 150


@dataclass
class Answers:
    """What the clients saw."""

    statuses: dict[int, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    retry_after_over: int = 0
    # What happened meanwhile: when it was to begin, and when it was done.
    happened: dict[float, float] = field(default_factory=dict)


def workload(
    times: Iterable[float], pod: Callable[[int, float], int], seed: int, streaming: float = 0.0
) -> list[Sent]:
    chance = random.Random(seed)
    return [
        Sent(at, pod(number, at), chance.random() < streaming, chance.randint(50, 250))
        for number, at in enumerate(times)
    ]


def evenly(seconds: float = 59.0, times: float = 5.0, start: float = 0.3) -> list[float]:
    count = int(LIMIT * times / MEAN)
    return [start + number * (seconds - start) / count for number in range(count)]


def bursts(*at: float, times: float = 5.0) -> list[float]:
    count = int(LIMIT * times / MEAN / len(at))
    return [second + number * 0.002 for second in at for number in range(count)]


async def offer(
    urls: Callable[[], list[str]],
    requests: list[Sent],
    minute: float,
    events: Mapping[float, Callable[[], None]] | None = None,
    latency_ms: int = 2_000,
) -> Answers:
    """Sends every request at its time, once, and lets things happen meanwhile."""
    answers = Answers()

    async def happen(second: float, act: Callable[[], None]) -> None:
        await asyncio.sleep(max(0.0, minute + second - time.time()))
        await asyncio.to_thread(act)
        answers.happened[second] = round(time.time() - minute, 1)

    happening = [asyncio.create_task(happen(second, act)) for second, act in (events or {}).items()]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(timeout=45.0, limits=limits, trust_env=False) as client:

        async def send(request: Sent) -> None:
            await asyncio.sleep(max(0.0, minute + request.at - time.time()))
            url = urls()[request.pod]
            body = {
                "model": "gpt",
                "messages": [{"role": "user", "content": PROMPT}],
                "max_tokens": 300,
                "stream": request.stream,
            }
            headers = {
                "authorization": "Bearer sk-test",
                "x-stub-prompt-tokens": "50",
                "x-stub-completion-tokens": str(request.completion),
                "x-stub-first-byte-ms": str(latency_ms),
            }
            begun = time.monotonic()
            try:
                answer = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
                status = answer.status_code
            except httpx.HTTPError:
                answer, status = None, 0
            took = time.monotonic() - begun
            answers.statuses[status] = answers.statuses.get(status, 0) + 1
            if status == 200:
                answers.latencies.append(took - latency_ms / 1_000)
            elif status == 429 and answer is not None:
                answers.refusals.append(took)
                after = answer.headers.get("retry-after")
                answers.without_retry_after += after is None
                answers.retry_after_over += after is not None and float(after) > 70

        await asyncio.gather(*(send(request) for request in requests))
    await asyncio.gather(*happening)
    return answers


def next_minute(at_least: float = 3.0) -> float:
    """Returns the start of a UTC minute that far away."""
    return (int((time.time() + at_least) // 60) + 1) * 60.0


def admitted(records: list[dict[str, Any]], minute: float, seconds: float = 60.0) -> int:
    """Returns the tokens of what arrived in these seconds, by the stub's own clock and count."""
    start, end = minute * 1_000, (minute + seconds) * 1_000
    inside = [record for record in records if start <= record["arrived_unix_ms"] < end and record["status"] == 200]
    return sum(record["prompt_tokens"] + (record["completion_tokens"] or 0) for record in inside)


def most_in_any(records: list[dict[str, Any]], seconds: float = 60.0) -> int:
    """Returns the most tokens that arrived in any interval of this length."""
    arrived = sorted((record["arrived_unix_ms"], record["prompt_tokens"] + (record["completion_tokens"] or 0)) for record in records)
    most = first = inside = 0
    for at, tokens in arrived:
        inside += tokens
        while arrived[first][0] <= at - seconds * 1_000:
            inside -= arrived[first][1]
            first += 1
        most = max(most, inside)
    return most


def ratio(stub: Stub, minute: float) -> float:
    return admitted(stub.ledger(), minute) / LIMIT

"""Three real proxies and one limit, judged by the stub's own count of one UTC minute.

All scenarios run at once, each with its own proxies, stub and ports, so that a gate takes
one minute and the starts.
"""

from __future__ import annotations

import asyncio

import pytest
from fleet import Fleet, config, deployment
from load import LIMIT, Answers, bursts, evenly, next_minute, offer, ratio, workload
from machine import until


@pytest.fixture(scope="module")
def ran():
    """Every scenario, and what came of it: admitted / limit, and the clients' answers."""
    fleets = {name: Fleet(3, lambda base: config(deployment(base, number="one", name="openai/gpt-4o", tpm=LIMIT))) for name in ("round robin", "burst", "kill")}
    try:
        for fleet in fleets.values():
            fleet.wait()
        # A minute that nobody was asked in: every pod has its share of it.
        minute = next_minute(5.0)

        def turn(number: int, at: float) -> int:
            return number % 3

        scenarios = {
            "round robin": (workload(evenly(), turn, 1, streaming=0.5), {}),
            "burst": (workload(bursts(1.0, 25.0), turn, 2), {}),
            "kill": (workload(evenly(), turn, 3), {20.0: lambda: fleets["kill"].kill(0)}),
        }

        async def all_of_them() -> list[Answers]:
            runs = [offer(fleets[name].urls, requests, minute, events) for name, (requests, events) in scenarios.items()]
            return await asyncio.gather(*runs)

        answers = asyncio.run(all_of_them())
        yield {name: (ratio(fleets[name].stub, minute), answer) for name, answer in zip(scenarios, answers)}
    finally:
        for fleet in fleets.values():
            fleet.close()


def show(name: str, admitted: float, answers: Answers) -> None:
    print(f"{name}: admitted / limit {admitted:.3f}, {answers.statuses}")


@pytest.mark.parametrize(("name", "least"), [("round robin", 0.95), ("burst", 0.70), ("kill", 0.60)])
def test_the_fleet_uses_its_limit_and_never_more(ran, name, least):
    admitted, answers = ran[name]
    show(name, admitted, answers)
    assert least <= admitted <= 1.0


@pytest.mark.parametrize("name", ["round robin", "burst"])
def test_every_refusal_is_honest_and_nothing_fails(ran, name):
    answers = ran[name][1]
    assert set(answers.statuses) == {200, 429}
    assert answers.without_retry_after == 0
    assert answers.retry_after_over == 0


def test_a_proxy_that_is_told_to_stop_leaves_the_fleet():
    """As Kubernetes tells it: by SIGTERM. A pod that just vanished would cost its share until it is proven gone."""
    fleet = Fleet(2, lambda base: config(deployment(base, number="one", tpm=LIMIT)))
    try:
        fleet.wait()
        fleet.leave(1)
        fleet.pods[1].process.wait(30)
        until(lambda: fleet.peers(0) == [], 10.0, "the goodbye")
    finally:
        fleet.close()

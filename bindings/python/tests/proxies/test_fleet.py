"""Three real proxies and one limit, judged by the stub's own count of one UTC minute.

All scenarios run at once, each with its own proxies, stub and ports, so that a gate takes
one minute and the starts.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fleet import Proxy, Stub, config, deployment, free_ports, until
from load import LIMIT, Answers, bursts, evenly, next_minute, offer, ratio, workload


class Fleet:
    """Pods that a static list joins."""

    def __init__(self, pods: int, terms: dict[str, Any] | None = None) -> None:
        self.stub = Stub()
        ports = free_ports(pods, socket.SOCK_DGRAM)
        self.admin = free_ports(pods)
        seeds = [f"127.0.0.1:{port}" for port in ports]
        written = config(deployment(self.stub.base, number="one", tpm=LIMIT, about={"quotum": terms or {}}))
        self.pods = [
            Proxy(
                written,
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

    def wait(self) -> Fleet:
        for pod in self.pods:
            pod.wait()
        until(lambda: all(self.knows_all(admin) for admin in self.admin), 60.0, "the fleet")
        return self

    def knows_all(self, admin: int) -> bool:
        try:
            status = httpx.get(f"http://127.0.0.1:{admin}/status", timeout=5.0).json()
        except httpx.HTTPError:
            return False
        reachable = sum(peer["reachable"] for peer in status["peers"])
        return status["ready"] and reachable == len(self.pods) - 1

    def urls(self) -> list[str]:
        return [self.pods[self.alive[number % len(self.alive)]].url for number in range(len(self.pods))]

    async def run(self, requests: list[Any], minute: float, at: dict[float, Callable[[], None]] | None = None) -> Answers:
        async def event(second: float, act: Callable[[], None]) -> None:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(max(0.0, minute + second - time.time()))
            await loop.run_in_executor(None, act)

        events = [asyncio.create_task(event(second, act)) for second, act in (at or {}).items()]
        answers = await offer(self.urls, requests, minute)
        await asyncio.gather(*events)
        return answers

    def kill(self, number: int) -> None:
        self.alive.remove(number)
        self.pods[number].kill()

    def close(self) -> None:
        for pod in self.pods:
            pod.close()
        self.stub.close()


@pytest.fixture(scope="module")
def ran():
    """Every scenario, and what came of it: admitted / limit, and the clients' answers."""
    fleets = {name: Fleet(3) for name in ("round robin", "burst", "kill")}
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
            runs = [fleets[name].run(requests, minute, events) for name, (requests, events) in scenarios.items()]
            return await asyncio.gather(*runs)

        answers = asyncio.run(all_of_them())
        yield {
            name: (ratio(fleets[name].stub, minute), answer) for name, answer in zip(scenarios, answers)
        }
    finally:
        for fleet in fleets.values():
            fleet.close()


def show(name: str, admitted: float, answers: Answers) -> None:
    print(f"{name}: admitted / limit {admitted:.3f}, {answers.statuses}")


@pytest.mark.parametrize(("name", "least"), [("round robin", 0.95), ("burst", 0.5), ("kill", 0.60)])
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

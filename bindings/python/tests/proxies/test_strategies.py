"""LiteLLM's other routing strategies: they pick after our filter, and the limit holds all the same.

One proxy each, with two deployments of one group, for one minute; the stub's own count is the judge.
"""

from __future__ import annotations

import asyncio

import pytest
from fleet import Proxy, Stub, config, deployment
from load import LIMIT, Answers, Sent, next_minute, offer, ratio

STRATEGIES = ["least-busy", "latency-based-routing", "cost-based-routing", "usage-based-routing-v2"]


@pytest.fixture(scope="module")
def ran():
    """Every strategy, and what came of it: admitted / limit, and the clients' answers."""
    stubs = {strategy: Stub() for strategy in STRATEGIES}
    proxies = {
        strategy: Proxy(
            config(
                *(
                    deployment(stubs[strategy].base, number=number, name="openai/gpt-4o", tpm=LIMIT // 2)
                    for number in ("a", "b")
                ),
                router={"routing_strategy": strategy, "num_retries": 0},
            )
        )
        for strategy in STRATEGIES
    }
    try:
        for proxy in proxies.values():
            proxy.wait()
        minute = next_minute(15.0)
        warm = [Sent(-14.0 + number * 0.5, 0, completion=10) for number in range(5)]
        # Twice the limit evenly, and as much again at once: decisions that race for what is left.
        requests = [Sent(1.0 + number * 0.3, 0) for number in range(100)]
        requests += [Sent(10.0 + number * 0.002, 0) for number in range(40)]

        async def one(strategy: str) -> Answers:
            return await offer(lambda: [proxies[strategy].url], warm + requests, minute, latency_ms=500)

        async def all_of_them() -> list[Answers]:
            return await asyncio.gather(*(one(strategy) for strategy in STRATEGIES))

        answers = asyncio.run(all_of_them())
        yield {strategy: (ratio(stubs[strategy], minute), answer) for strategy, answer in zip(STRATEGIES, answers)}
    finally:
        for proxy in proxies.values():
            proxy.close()
        for stub in stubs.values():
            stub.close()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_limit_holds_under_every_strategy(ran, strategy):
    admitted, answers = ran[strategy]
    print(f"{strategy}: admitted / limit {admitted:.3f}, {answers.statuses}")
    assert set(answers.statuses) == {200, 429}
    assert 0.7 <= admitted <= 1.0

"""Requests that lie in LiteLLM until their minute is over: the upstream counts them in the next one.

Another callback, registered behind ours, holds them back between the reservation and the wire. The stub's own
count of the next minute is the judge.
"""

from __future__ import annotations

import asyncio

import pytest
from fleet import Proxy, Stub, config, deployment
from load import LIMIT, Answers, Sent, next_minute, offer, ratio

# Holds back what comes in a minute's last ten seconds, until the next one has begun.
LATE = """
import asyncio, time
from litellm.integrations.custom_logger import CustomLogger

async def lie():
    left = 60.0 - time.time() % 60.0
    if left < 10.0:
        await asyncio.sleep(left + 0.5)

class InTheFilter(CustomLogger):
    async def async_filter_deployments(
        self, model, healthy_deployments, messages, request_kwargs=None, parent_otel_span=None
    ):
        await lie()
        return healthy_deployments

class BehindTheLastHook(CustomLogger):
    async def async_pre_call_deployment_hook(self, kwargs, call_type):
        await lie()

in_the_filter = InTheFilter()
behind_the_last_hook = BehindTheLastHook()
"""

WHERE = ["in_the_filter", "behind_the_last_hook"]


@pytest.fixture(scope="module")
def ran():
    """Where requests lay, and what came of the minute after it: admitted / limit, and the answers."""
    stubs = {where: Stub() for where in WHERE}
    proxies = {
        where: Proxy(
            config(
                deployment(stubs[where].base, number="one", name="openai/gpt-4o", tpm=LIMIT),
                callbacks=["quotum.litellm.handler", f"late.{where}"],
            ),
            modules={"late": LATE},
        )
        for where in WHERE
    }
    try:
        for proxy in proxies.values():
            proxy.wait()
        minute = next_minute(20.0)
        # LiteLLM's first requests take seconds; then more than the limit, twice: what lies, and what
        # the minute's own requests are.
        warm = [Sent(-18.0 + number * 0.5, 0, completion=10) for number in range(3)]
        late = [Sent(-6.0 + number * 0.05, 0, completion=250) for number in range(40)]
        own = [Sent(2.0 + number * 0.2, 0, completion=250) for number in range(60)]

        async def one(where: str) -> Answers:
            return await offer(lambda: [proxies[where].url], warm + late + own, minute, latency_ms=200)

        async def both() -> list[Answers]:
            return await asyncio.gather(*(one(where) for where in WHERE))

        answers = asyncio.run(both())
        yield {where: (ratio(stubs[where], minute), answer) for where, answer in zip(WHERE, answers)}
    finally:
        for proxy in proxies.values():
            proxy.close()
        for stub in stubs.values():
            stub.close()


@pytest.mark.parametrize("where", WHERE)
def test_what_lies_until_its_minute_is_over_is_charged_in_the_next(ran, where):
    admitted, answers = ran[where]
    print(f"{where}: admitted / limit {admitted:.3f}, {answers.statuses}")
    assert set(answers.statuses) == {200, 429}
    assert 0.9 <= admitted <= 1.0

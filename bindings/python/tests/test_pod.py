"""A pod of several processes: one owns the rights, the others reserve through it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from quotum import Denied
from quotum._quotum import Pod

DEPLOYMENTS = json.dumps([{"id": "gpt", "tpm": 10_000, "terms": {"edge": 0.0}}])

# A worker that does what it is told on its standard input, and says what came of it.
WORKER = """
import asyncio, json, sys
from quotum import Denied
from quotum._quotum import Pod

async def reserve(pod, tokens):
    body = json.dumps({"model": "gpt", "prompt": "", "max_tokens": tokens - 2})
    return (await pod.reserve([["gpt"]], "completions", body))[0]

pod = Pod()
pod.declare(sys.argv[1])
for line in sys.stdin:
    word, *numbers = line.split()
    try:
        if word == "reserve":
            said = asyncio.run(reserve(pod, int(numbers[0])))
        elif word == "used":
            said = pod.used(int(numbers[0]), 0, int(numbers[1]), int(numbers[1]))
        elif word == "unsent":
            said = pod.ended(int(numbers[0]), "unsent")
        elif word == "seat":
            said = pod.seat
        elif word == "status":
            said = json.loads(pod.status())
    except Denied as denied:
        said = {"denied": denied.reason}
    except RuntimeError as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
"""


class Worker:
    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, DEPLOYMENTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def say(self, *words: object) -> object:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def until(condition, within: float = 20.0):
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)
    return value


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    environment = {"QUOTUM_NODE": uuid.uuid4().hex, "QUOTUM_SEEDS": ""}
    workers = [Worker(environment) for _ in range(3)]
    until(lambda: sorted(str(worker.say("seat")) for worker in workers) == ["guest", "guest", "owner"])
    # Owner first.
    workers.sort(key=lambda worker: worker.say("seat") != "owner")
    # A minute that does not end during the test.
    until(lambda: time.time() % 60 < 50)
    yield workers
    for worker in workers:
        worker.close()


def used(worker: Worker) -> int:
    status = worker.say("status")
    assert isinstance(status, dict)
    return status["limits"][0]["quotas"][0]["used"]


def test_the_workers_of_a_pod_hold_one_limit(workers):
    said = [workers[turn % 3].say("reserve", 1_000) for turn in range(12)]
    admitted = [number for number in said if isinstance(number, int)]
    assert len(admitted) == 10
    assert said[10] == said[11] == {"denied": "exhausted"}


def test_what_a_guest_settles_anybody_can_spend(workers):
    owner, guest, other = workers
    number = guest.say("reserve", 9_000)
    assert other.say("reserve", 2_000) == {"denied": "exhausted"}
    guest.say("used", number, 500)
    until(lambda: used(owner) == 500)
    assert isinstance(other.say("reserve", 9_000), int)


def test_what_a_worker_had_open_that_dies_stays_charged(workers):
    owner, guest, _ = workers
    guest.say("reserve", 4_000)
    guest.kill()
    until(lambda: owner.say("status")["pod"] == {"owner": owner.process.pid, "workers": 2, "open": 0})
    assert used(owner) == 4_000


def test_another_worker_takes_over_within_a_second_and_repeats_nothing(workers):
    owner, *guests = workers
    number = guests[0].say("reserve", 1_000)
    owner.kill()
    begun = time.monotonic()
    # Alone nobody knows what the dead one had spent of this minute: nothing is left of it.
    assert [guest.say("reserve", 1) for guest in guests] == [{"denied": "exhausted"}] * 2
    assert time.monotonic() - begun < 1.5
    assert sorted(str(guest.say("seat")) for guest in guests) == ["guest", "owner"]
    # A number of the dead owner's means nothing to the new one.
    guests[0].say("used", number, 1)
    assert used(guests[0]) == 10_000


def test_wrong_settings_are_told_when_the_pod_is_made(monkeypatch):
    monkeypatch.setenv("QUOTUM_SEEDS", "10.0.0.1:7946,10.0.0.2:7946")
    with pytest.raises(ValueError, match="QUOTUM_GOSSIP_ADVERTISE"):
        Pod()
    monkeypatch.setenv("QUOTUM_SEEDS", "pods:7946")
    with pytest.raises(ValueError, match="QUOTUM_GOSSIP_KEY_FILE"):
        Pod()


@pytest.mark.parametrize(
    ("deployment", "why"),
    [
        ({"id": "gpt", "tpm": 0}, "tpm: the amount is 0"),
        ({"id": "gpt", "tpm": 5, "terms": {"knid": "sliding"}}, "knid"),
        ({"id": "gpt", "tpm": 5, "terms": {"kind": "rolling"}}, "rolling"),
        ({"id": "gpt", "tpm": 5_000, "terms": {"edge": -1}}, "edge"),
    ],
)
def test_wrong_limits_are_told_when_they_are_declared(deployment, why, monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    with pytest.raises(ValueError, match=why):
        Pod().declare(json.dumps([deployment]))


def test_levels_are_spent_in_order_and_unlimited_deployments_pass(monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    pod = Pod()
    limited = [{"id": name, "tpm": 1_000, "terms": {"edge": 0.0}} for name in ("first", "second")]
    pod.declare(json.dumps(limited))
    body = json.dumps({"model": "gpt", "prompt": "", "max_tokens": 600})

    async def main() -> None:
        picked = [(await pod.reserve([["first"], ["second"]], "completions", body))[1] for _ in range(2)]
        assert picked == ["first", "second"]
        with pytest.raises(Denied):
            await pod.reserve([["first", "second"]], "completions", body)
        with pytest.raises(Denied):
            await pod.room([["first", "second"]], "completions", body)
        assert await pod.room([["first", "free"]], "completions", body) == ["free"]
        assert await pod.reserve([["free"]], "completions", body) == (0, "free")

    until(lambda: time.time() % 60 < 55)
    asyncio.run(main())
    pod.leave()


def test_what_no_reading_understands_counts_with_its_bytes_and_its_cap(monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    pod = Pod()
    pod.declare(json.dumps([{"id": "gpt", "tpm": 10_000, "terms": {"edge": 0.0}}]))
    # The API has no request without messages; LiteLLM may know more.
    body = json.dumps({"model": "gpt", "messages": [], "max_tokens": 6_000, "n": 1})

    async def main() -> None:
        await pod.reserve([["gpt"]], "chat", body)

    until(lambda: time.time() % 60 < 55)
    asyncio.run(main())
    assert json.loads(pod.status())["limits"][0]["quotas"][0]["used"] == 6_000 + len(body)
    pod.leave()

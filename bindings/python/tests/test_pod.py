"""A pod of several processes: one owns the rights, the others reserve through it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
from machine import free_ports, in_a_minute_with, until

from quotum import Denied
from quotum._quotum import Pod

DEPLOYMENTS = json.dumps([{"id": "gpt", "tpm": 10_000, "terms": {"edge": 0.0}}])
# Whoever finds no room waits for peers' rights for as long as a test takes.
PATIENT = json.dumps([{"id": "gpt", "tpm": 10_000, "terms": {"edge": 0.0, "wait": 30.0}}])

# A worker that does what it is told on its standard input, and says what came of it.
WORKER = """
import asyncio, json, sys
from quotum import Denied
from quotum._quotum import Pod

async def reserve(pod, tokens, deployment="gpt"):
    body = json.dumps({"model": "gpt", "prompt": "", "max_tokens": tokens - 2})
    return (await pod.reserve([[deployment]], "completions", body))[0]

async def dropped(pod, tokens):
    body = json.dumps({"model": "gpt", "prompt": "", "max_tokens": tokens - 2})
    asked = pod.reserve([["gpt"]], "completions", body)
    # On the same way: when this is answered, that was heard.
    pod.status()
    if asked.cancel():
        return True
    # Answered before it could be waited for.
    pod.ended(asked.result()[0], "unsent")
    return False

pod = Pod()
pod.declare(sys.argv[1])
for line in sys.stdin:
    word, *numbers = line.split()
    try:
        if word == "reserve":
            said = asyncio.run(reserve(pod, int(numbers[0]), *numbers[1:]))
        elif word == "dropped":
            said = asyncio.run(dropped(pod, int(numbers[0])))
        elif word == "declare":
            said = pod.declare(line.partition(" ")[2])
        elif word == "used":
            said = pod.used(int(numbers[0]), 0, int(numbers[1]), int(numbers[1]))
        elif word == "late":
            said = pod.late(int(numbers[0]))
        elif word == "unsent":
            said = pod.ended(int(numbers[0]), "unsent")
        elif word == "seat":
            said = pod.seat
        elif word == "status":
            said = json.loads(pod.status())
        elif word == "metrics":
            said = pod.metrics()
    except Denied as denied:
        said = {"denied": denied.reason}
    except (RuntimeError, ValueError) as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)
"""


class Worker:
    def __init__(self, environment: dict[str, str], deployments: str = DEPLOYMENTS) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, deployments],
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


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    environment = {"QUOTUM_NODE": uuid.uuid4().hex, "QUOTUM_SEEDS": ""}
    workers = [Worker(environment) for _ in range(3)]
    until(lambda: sorted(str(worker.say("seat")) for worker in workers) == ["guest", "guest", "owner"])
    # Owner first.
    workers.sort(key=lambda worker: worker.say("seat") != "owner")
    # A minute that does not end during the test.
    in_a_minute_with(10.0)
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
    until(lambda: owner.say("status")["pod"] == {"owner": owner.process.pid, "workers": 2, "open": 0, "late": 0})
    assert used(owner) == 4_000


@pytest.mark.parametrize("from_a_guest", [False, True])
def test_what_leaves_late_is_charged_again_where_it_arrives(workers, from_a_guest):
    owner, worker = workers[0], workers[from_a_guest]
    number = worker.say("reserve", 4_000)
    worker.say("late", number)
    until(lambda: owner.say("status")["pod"]["late"] == 1)
    until(lambda: used(owner) == 4_000)
    worker.say("used", number, 500)
    until(lambda: used(owner) == 500)


def test_what_leaves_late_and_finds_no_room_is_charged_with_what_it_used(workers):
    owner = workers[0]
    number = owner.say("reserve", 9_000)
    owner.say("late", number)
    # Nobody can take it back; the minute has no other 9,000.
    until(lambda: used(owner) == 1)
    owner.say("used", number, 700)
    until(lambda: used(owner) == 700)


def test_another_worker_takes_over_within_a_second_and_repeats_nothing(workers):
    owner, *guests = workers
    number = guests[0].say("reserve", 1_000)
    owner.kill()
    begun = time.monotonic()
    # Alone nobody knows what the dead one had spent of this minute: nothing is left of it.
    assert [guest.say("reserve", 1) for guest in guests] == [{"denied": "exhausted"}] * 2
    assert time.monotonic() - begun < 1.0
    assert sorted(str(guest.say("seat")) for guest in guests) == ["guest", "owner"]
    # A number of the dead owner's means nothing to the new one.
    guests[0].say("used", number, 1)
    assert used(guests[0]) == 10_000


@pytest.mark.parametrize(
    ("declared", "why"),
    [
        ([{"id": "new", "tpm": 5, "terms": {"kind": "rolling"}}], "new.*rolling"),
        # By itself it could be limited; with the one that the owner has already, it cannot.
        ([{"id": "new", "tpm": 5, "terms": {"limit_id": "gpt"}}], "could not take in the limits of .new"),
    ],
)
def test_no_request_passes_for_a_deployment_that_the_owner_cannot_limit(workers, declared, why):
    guest = workers[1]
    said = [guest.say("declare", json.dumps(declared)), guest.say("reserve", 4, "new")]
    errors = [answer["error"] for answer in said if isinstance(answer, dict) and "error" in answer]
    assert errors and re.search(why, errors[0]), said
    assert not any(isinstance(answer, int) for answer in said)


def test_an_owner_that_is_stopped_refuses_and_goes_on_when_it_runs_again(workers):
    owner, guest, _ = workers
    owner.process.send_signal(signal.SIGSTOP)
    try:
        assert guest.say("reserve", 1_000) == {"denied": "unreachable"}
    finally:
        owner.process.send_signal(signal.SIGCONT)
    assert isinstance(guest.say("reserve", 1_000), int)


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[list[Worker]]:
    """Two pods that gossip: one of two workers, its owner first, and one of a single worker."""
    seeds = [f"127.0.0.1:{port}" for port in free_ports(2)]
    environments = [
        {
            "QUOTUM_NODE": uuid.uuid4().hex,
            "QUOTUM_SEEDS": ",".join(seeds),
            "QUOTUM_GOSSIP_LISTEN": own,
            "QUOTUM_GOSSIP_ADVERTISE": own,
        }
        for own in seeds
    ]
    deployments = getattr(request, "param", DEPLOYMENTS)
    workers = [Worker(environments[pod], deployments) for pod in (0, 0, 1)]
    try:
        until(lambda: {worker.say("seat") for worker in workers[:2]} == {"owner", "guest"})
        until(lambda: workers[2].say("seat") == "owner")
        workers[:2] = sorted(workers[:2], key=lambda worker: worker.say("seat") != "owner")
        # A minute that does not end during the test, and of which both pods have rights.
        in_a_minute_with(20.0)
        for worker in workers:
            until(lambda worker=worker: isinstance(worker.say("reserve", 10), int))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def test_a_pod_that_loses_its_owner_goes_on_within_a_second_and_the_fleet_holds_its_limit(fleet):
    owner, guest, other = fleet
    assert "quotum_gossip_sent_total" in str(guest.say("metrics"))
    admitted = 30 + sum(1_000 for worker in (guest, other) if isinstance(worker.say("reserve", 1_000), int))
    owner.kill()
    begun = time.monotonic()
    # It is answered, by the new owner, which has no rights of this minute but what its peer gives.
    guest.say("reserve", 9_000)
    assert guest.say("seat") == "owner"
    assert time.monotonic() - begun < 1.0
    until(lambda: isinstance(guest.say("reserve", 100), int))
    assert time.monotonic() - begun < 1.0
    admitted += 100
    for _ in range(60):
        for worker in (guest, other):
            admitted += 200 * isinstance(worker.say("reserve", 200), int)
    # What the dead one had is lost until the minute ends.
    assert 4_000 <= admitted <= 10_000


@pytest.mark.parametrize("fleet", [PATIENT], indirect=True)
def test_what_is_granted_to_a_worker_that_died_waiting_is_given_back(fleet):
    owner, guest, other = fleet
    # More than its pod has, and its peer gives nothing for as long as it is stopped.
    other.process.send_signal(signal.SIGSTOP)
    try:
        guest.say("dropped", 8_000)
        guest.kill()
        until(lambda: owner.say("status")["pod"]["workers"] == 1)
    finally:
        other.process.send_signal(signal.SIGCONT)
    # Its peer's rights come for a request that is no more; whoever is left can have them.
    until(lambda: isinstance(owner.say("reserve", 8_000), int))
    assert owner.say("status")["pod"]["open"] == 2, "the owner's own, of which the first was the fixture's"


def test_a_reservation_that_nobody_waits_for_any_more_is_given_back(workers):
    owner, guest, _ = workers
    first, made = guest.say("reserve", 10), 1

    def is_dropped() -> bool:
        nonlocal made
        made += 1
        return guest.say("dropped", 4_000)

    def is_reserved() -> bool:
        nonlocal mine, made
        mine, made = mine + 1, made + 1
        return guest.say("reserve", 10) - first == made - 1

    mine = 1
    until(is_dropped)
    # Their numbers say that the dropped one was made, too.
    until(is_reserved)
    until(lambda: used(owner) == 10 * mine)


def test_a_worker_that_comes_while_the_gossip_port_is_being_closed_does_not_wait_a_second():
    [port] = free_ports(1)
    own = f"127.0.0.1:{port}"
    environment = {
        "QUOTUM_NODE": uuid.uuid4().hex,
        "QUOTUM_SEEDS": own,
        "QUOTUM_GOSSIP_LISTEN": own,
        "QUOTUM_GOSSIP_ADVERTISE": own,
    }
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", port))
        worker = Worker(environment)
        assert worker.say("seat") == "standing"
    try:
        until(lambda: worker.say("seat") == "owner", 0.5)
    finally:
        worker.close()


def test_wrong_settings_are_told_when_the_pod_is_made(monkeypatch):
    monkeypatch.setenv("QUOTUM_SEEDS", "10.0.0.1:7946,10.0.0.2:7946")
    with pytest.raises(ValueError, match="QUOTUM_GOSSIP_ADVERTISE"):
        Pod()
    monkeypatch.setenv("QUOTUM_SEEDS", "pods:7946")
    with pytest.raises(ValueError, match="QUOTUM_GOSSIP_KEY_FILE"):
        Pod()
    monkeypatch.setenv("QUOTUM_SEEDS", "")
    monkeypatch.setenv("QUOTUM_PODS", "app.kubernetes.io/name=litellm")
    with pytest.raises(ValueError, match="QUOTUM_PODS: .* headless name"):
        Pod()
    monkeypatch.setenv("QUOTUM_SEEDS", "pods:7946")
    monkeypatch.setenv("QUOTUM_GOSSIP_LISTEN", "127.0.0.1:0")
    with pytest.raises(ValueError, match="QUOTUM_PODS: .* no pod of Kubernetes"):
        Pod()
    monkeypatch.setenv("QUOTUM_PODS", "10.0.0.1:7946")
    with pytest.raises(ValueError, match="QUOTUM_PODS: .* no label selector"):
        Pod()


@pytest.mark.parametrize(
    ("deployment", "why"),
    [
        ({"id": "gpt", "tpm": 0}, "tpm: the amount is 0"),
        ({"id": "gpt", "tpm": 5, "terms": {"knid": "sliding"}}, "gpt.*knid"),
        ({"id": "gpt", "tpm": 5, "terms": "sliding"}, "gpt.*sliding"),
        ({"id": "gpt", "tpm": -5}, "gpt.*-5"),
        ({"id": "gpt", "tpm": 5, "terms": {"kind": "rolling"}}, "rolling"),
        ({"id": "gpt", "tpm": 5_000, "terms": {"edge": -1}}, "edge"),
    ],
)
def test_wrong_limits_are_told_when_they_are_declared(deployment, why, monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    with pytest.raises(ValueError, match=why):
        Pod().declare(json.dumps([deployment]))


@pytest.mark.parametrize(
    ("terms", "period", "edge"),
    [
        ({}, 60.0, 0.25),
        ({"edge": 1.5}, 60.0, 1.5),
        ({"kind": "sliding"}, 15.0, 0.25),
        ({"kind": "sliding", "parts": 12}, 5.0, 0.25),
    ],
)
def test_a_request_must_leave_an_edge_before_a_window_in_which_it_is_not_charged(terms, period, edge, monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    pod = Pod()
    pod.declare(json.dumps([{"id": "gpt", "tpm": 10_000, "terms": terms}]))
    body = json.dumps({"model": "gpt", "prompt": "", "max_tokens": 10})

    async def main() -> None:
        before = time.time()
        leaves_until = (await pod.reserve([["gpt"]], "completions", body))[2]
        # Reserved within an edge of a window's end, it is charged in both.
        assert leaves_until >= before - 0.1
        assert leaves_until <= before + period + 0.1
        assert round((leaves_until + edge) % period, 3) in (0.0, period)

    asyncio.run(main())
    pod.leave()


def test_a_bucket_too_small_for_the_usual_edge_has_a_smaller_one(monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    terms = {"kind": "bucket", "burst": 1_000}
    Pod().declare(json.dumps([{"id": "gpt", "tpm": 10_000, "terms": terms}]))
    with pytest.raises(ValueError, match="edge"):
        Pod().declare(json.dumps([{"id": "gpt", "tpm": 10_000, "terms": {**terms, "edge": 0.25}}]))


def test_a_request_that_is_no_json_is_not_counted_without_its_cap(monkeypatch):
    monkeypatch.setenv("QUOTUM_NODE", uuid.uuid4().hex)
    pod = Pod()
    pod.declare(json.dumps([{"id": "gpt", "tpm": 10_000}]))

    async def main() -> None:
        with pytest.raises(RuntimeError, match="no JSON"):
            await pod.reserve([["gpt"]], "chat", '{"model": "gpt", "messages": [NaN], "max_tokens": 9000}')

    asyncio.run(main())
    pod.leave()


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
        assert (await pod.reserve([["free"]], "completions", body))[:2] == (0, "free")

    in_a_minute_with(5.0)
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

    in_a_minute_with(5.0)
    asyncio.run(main())
    assert json.loads(pod.status())["limits"][0]["quotas"][0]["used"] == 6_000 + len(body)
    pod.leave()

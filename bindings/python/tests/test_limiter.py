"""The limiter from Python: what callers see, in one process and between two."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

import pytest
from machine import free_ports, until

from quotum import Denied, Limiter, Permit, Quota


def a_limiter(tokens: int = 1_000, **arguments: object) -> Limiter:
    # An hour: no test sees a window end.
    return Limiter({"gpt": Quota("tokens", tokens, window=1_000.0)}, **arguments)


def used(limiter: Limiter) -> int:
    return limiter.standing("gpt")[0].used


def test_a_settled_permit_charges_what_was_used():
    limiter = a_limiter()
    permit = limiter.acquire("gpt", 400)
    assert (permit.tokens, permit.deployment, used(limiter)) == (400, "gpt", 400)
    permit.settle(150)
    assert (permit.settled, used(limiter)) == (True, 150)


def test_a_refund_gives_everything_back():
    limiter = a_limiter()
    limiter.try_acquire("gpt", 400).refund()
    assert used(limiter) == 0


def test_what_is_forgotten_stays_charged():
    limiter = a_limiter()
    with limiter.acquire("gpt", 400):
        pass
    permit = limiter.acquire("gpt", 100)
    del permit
    gc.collect()
    with pytest.raises(ZeroDivisionError), limiter.acquire("gpt", 100):
        raise ZeroDivisionError
    assert used(limiter) == 600


def test_a_permit_is_settled_once():
    permit = a_limiter().acquire("gpt", 10)
    permit.settle(5)
    for again in (lambda: permit.settle(5), permit.refund):
        with pytest.raises(RuntimeError, match="settled already"):
            again()


def test_a_refusal_says_which_limit_what_is_left_and_when_to_come_back():
    limiter = a_limiter()
    limiter.acquire("gpt", 900)
    with pytest.raises(Denied) as caught:
        limiter.acquire("gpt", 200)
    no = caught.value
    assert (no.deployment, no.reason, no.unit, no.remaining) == ("gpt", "exhausted", "tokens", 100)
    assert no.retry_after is not None and 0 < no.retry_after <= 1_200
    assert "1000 tokens per" in no.limit and "too little left" in str(no)
    assert used(limiter) == 900


def test_what_a_long_window_has_not_vested_yet_is_no_reason_to_wait_for_its_end():
    limiter = Limiter({"gpt": Quota("tokens", 100_000, window=86_400.0)})
    # A quarter at once, the rest every ten minutes: the time of day decides how much that is by now.
    with pytest.raises(Denied) as caught:
        for _ in range(21):
            limiter.acquire("gpt", 5_000)
    [standing] = limiter.standing("gpt")
    assert 25_000 <= standing.vested <= standing.limit == 100_000
    assert caught.value.retry_after is not None
    if standing.vested < standing.limit:
        assert "vested" in str(caught.value)
        # 5,000 are at most seven instalments of 520.
        assert caught.value.retry_after <= 10 * 600.0


def test_a_request_larger_than_the_limit_is_told_never():
    with pytest.raises(Denied) as caught:
        a_limiter().acquire("gpt", 1_001)
    assert (caught.value.reason, caught.value.retry_after) == ("too_large", None)


def test_prompt_and_output_are_limited_on_their_own():
    limiter = Limiter({"gpt": {"itpm": 1_000, "otpm": 500, "rpm": 2}})
    limiter.acquire("gpt", input_tokens=900, output_tokens=100).settle(input_tokens=10, output_tokens=20)
    with pytest.raises(Denied) as caught:
        limiter.acquire("gpt", input_tokens=10, output_tokens=490)
    assert caught.value.unit == "output_tokens"
    limiter.acquire("gpt", input_tokens=10, output_tokens=10)
    with pytest.raises(Denied) as caught:
        limiter.acquire("gpt", input_tokens=1, output_tokens=1)
    assert caught.value.unit == "requests"


def test_observing_counts_and_never_refuses():
    limiter = a_limiter(mode="observe")
    for _ in range(3):
        limiter.acquire("gpt", 900)
    assert used(limiter) == 2_700


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Limiter({"gpt": {"tpm": 0}}), ValueError),
        (lambda: Limiter({"gpt": {}}), ValueError),
        (lambda: Limiter({"gpt": {"tokens_per_minute": 5}}), ValueError),
        (lambda: Limiter({"gpt": "100000"}), TypeError),
        (lambda: Limiter({"gpt": {"tpm": 5}}, mode="lenient"), ValueError),
        (lambda: Limiter({"gpt": {"tpm": 5}}, edge=100.0), ValueError),
        (lambda: Quota("letters", 5), ValueError),
        (lambda: Quota("tokens", 5, kind="bucket"), ValueError),
        (lambda: Quota("tokens", 5, window=-1.0), ValueError),
        (lambda: a_limiter().acquire("claude", 5), KeyError),
        (lambda: a_limiter().acquire("gpt"), TypeError),
        (lambda: a_limiter().acquire("gpt", -5), OverflowError),
        (lambda: a_limiter().join(seeds=["127.0.0.1:7946"]), ValueError),
        (lambda: a_limiter().join(seeds=["10.0.0.1"]), ValueError),
        (lambda: a_limiter().join(seeds=["pods:7946"], key_file="/does/not/exist"), ValueError),
    ],
)
def test_wrong_input_is_refused(make, error):
    with pytest.raises(error):
        make()


def test_many_threads_never_spend_more_than_the_limit():
    limiter = a_limiter(1_000)
    admitted: list[Permit] = []

    def spend() -> None:
        for _ in range(200):
            try:
                admitted.append(limiter.acquire("gpt", 7))
            except Denied:
                return

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1_000 // 7


def test_asyncio_reserves_and_is_refused_alike():
    async def main() -> None:
        async with a_limiter() as limiter:
            permit = await limiter.acquire_async("gpt", 900)
            with pytest.raises(Denied):
                await limiter.acquire_async("gpt", 200)
            permit.settle(1)
            assert used(limiter) == 1

    asyncio.run(main())


def test_a_child_process_cannot_spend_its_parents_rights():
    limiter = a_limiter()
    limiter.acquire("gpt", 1)
    child = os.fork()
    if child == 0:
        try:
            limiter.acquire("gpt", 1)
        except RuntimeError:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def test_what_was_not_used_before_the_fork_works_after_it():
    limiter = a_limiter()
    child = os.fork()
    if child == 0:
        try:
            os._exit(17 if limiter.acquire("gpt", 1).tokens == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    limiter.acquire("gpt", 1_000)


@pytest.fixture
def pair():
    """Two replicas of one fleet in one process, joined over loopback."""
    ports = free_ports(2)
    seeds = [f"127.0.0.1:{port}" for port in ports]
    limiters = [a_limiter(10_000, wait=5.0) for _ in seeds]
    for limiter, own in zip(limiters, seeds):
        limiter.join(seeds=seeds, listen=own, advertise=own, node=own, interval=0.02)
    until(lambda: all(limiter.ready for limiter in limiters))
    # Whoever came later has no share of the window that runs, and is sent rights.
    for limiter in limiters:
        until(lambda limiter=limiter: admits(limiter))
    yield limiters
    for limiter in limiters:
        limiter.leave(timeout=5.0)


def admits(limiter: Limiter) -> bool:
    try:
        limiter.acquire("gpt", 1).refund()
    except Denied:
        return False
    return True


def test_keys_are_rotated_without_a_restart(tmp_path):
    old, new = "1" * 64, "2" * 64
    files = [tmp_path / "first", tmp_path / "second"]
    for file, key in zip(files, (old, new)):
        file.write_text(key)
    seeds = [f"127.0.0.1:{port}" for port in free_ports(2)]
    limiters = [a_limiter(10_000, wait=5.0) for _ in seeds]
    try:
        for limiter, own, file in zip(limiters, seeds, files):
            limiter.join(seeds=seeds, listen=own, advertise=own, node=own, interval=0.02, key_file=str(file))
        # Neither opens what the other seals, and an unusable file changes nothing.
        files[0].write_text("not a key")
        assert not any(limiter.ready for limiter in limiters)
        files[0].write_text(f"{new}\n{old}")
        until(lambda: all(limiter.ready for limiter in limiters))
    finally:
        for limiter in limiters:
            limiter.leave(timeout=5.0)


def test_two_replicas_hold_one_limit(pair):
    admitted = 0
    for turn in range(200):
        try:
            pair[turn % 2].acquire("gpt", 100)
            admitted += 100
        except Denied:
            pass
    assert 9_000 <= admitted <= 10_000


def test_rights_are_waited_for_in_asyncio_while_the_loop_goes_on(pair):
    async def main() -> None:
        first, second = pair
        # More than half: one of the two must ask the other.
        permits = await asyncio.gather(*(first.acquire_async("gpt", 1_000) for _ in range(8)))
        assert sum(permit.tokens for permit in permits) == 8_000
        with pytest.raises(Denied):
            await second.acquire_async("gpt", 3_000)

    asyncio.run(main())


def test_a_cancelled_wait_holds_nothing(pair):
    async def main() -> None:
        first, second = pair
        second.acquire("gpt", 9_000)
        waiting = asyncio.ensure_future(first.acquire_async("gpt", 900))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()

    asyncio.run(main())
    until(lambda: all(used(limiter) == 9_000 for limiter in pair))


def test_what_a_replica_leaves_its_peer_can_spend(pair):
    first, second = pair
    assert first.leave()
    second.acquire("gpt", 9_900).settle(1)
    with pytest.raises(Denied):
        first.acquire("gpt", 1)

"""How much of one limit a fleet of LiteLLM proxies lets through: quotum beside LiteLLM's own.

    QUOTUM=target/release/quotum python bindings/python/bench/compare.py [--pods 1,2,3]
        [--scenarios "round robin;burst"] [--contenders "quotum;quotum learned:3"] [--at-once 5]
    QUOTUM=target/release/quotum python bindings/python/bench/compare.py --latency 1000

Every cell is one UTC minute of real proxies in front of the stub, which counts by arrival: one deployment
with a limit of 10,000 tokens a minute, five times of it offered, 2 s upstream latency, 50 prompt and 50 to
250 output tokens, max_tokens 300, nothing sent again. The scenario `group` is the same load on one model
group of two deployments with 5,000 each. A cell whose load lies in two minutes (`minute edge`; `restarted,
then killed`) shows the worse one: the higher if that is over the limit, else the lower.

A fleet runs its scenarios one after another, with a minute without load between them. `--at-once` fleets
run beside one another: five of three proxies are what two cores carry. Bursts, which take all of a small
machine, have a minute to themselves.

A JSON line for each cell, then the table, then what quotum missed of its targets, which is exit 1.

`--latency` compares instead what a request takes with the callback and without: two proxies of each kind,
one caller, a request to each of the four in an order drawn anew for every round. It says the median over
the rounds of (mean of the two with) - (mean of the two without), with its 95 % interval by order
statistics, and the same between the two proxies without it: what such a comparison shows of nothing.

Needs what tests/requirements.txt pins, the quotum package, and for the contenders with Redis the
redis-server of the distribution.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "proxies")]

from fleet import Fleet, Proxy, Stub, config, deployment  # noqa: E402
from load import (  # noqa: E402
    LIMIT, PROMPT, Answers, Sent, admitted, bursts, evenly, most_in_any, next_minute, offer, workload,
)  # fmt: skip
from machine import free_ports  # noqa: E402

Events = dict[float, Callable[[], None]]


@dataclass(frozen=True)
class Scenario:
    """What is offered in one cell, and what happens meanwhile, in seconds from the judged minute's start."""

    times: Callable[[], list[float]] = evenly
    streaming: float = 0.0
    to_one: bool = False
    events: Callable[[Fleet], Events] = lambda fleet: {}
    # The starts of the minutes that are loaded and judged.
    minutes: tuple[float, ...] = (0.0,)
    needs_a_second_pod: bool = False
    in_a_group: bool = False
    # It takes all of a small machine: no other cell in its minute.
    apart: bool = False

    def requests(self, pods: int, seed: int) -> list[Sent]:
        pod = (lambda number, at: 0) if self.to_one else (lambda number, at: number % pods)
        return workload(self.times(), pod, seed, self.streaming)


def two_minutes() -> list[float]:
    return [at - 60.0 for at in evenly()] + evenly()


SCENARIOS = {
    "round robin": Scenario(),
    "half streaming": Scenario(streaming=0.5),
    "all to one": Scenario(to_one=True),
    "burst": Scenario(lambda: bursts(1.0, 25.0), apart=True),
    # At the same rate around the edge: the last 20 s of a minute and the first of the next.
    "minute edge": Scenario(lambda: evenly(80.0, 3.4, start=40.0), minutes=(0.0, 60.0)),
    "rolling restart": Scenario(
        events=lambda fleet: {15.0: lambda: fleet.leave(0), 18.0: lambda: fleet.restart(0)},
        needs_a_second_pod=True,
    ),
    "pod killed": Scenario(events=lambda fleet: {20.0: lambda: fleet.kill(0)}, needs_a_second_pod=True),
    "restarted, then killed": Scenario(
        two_minutes,
        events=lambda fleet: {
            -50.0: lambda: fleet.leave(0),
            -48.0: lambda: fleet.restart(0),
            20.0: lambda: fleet.kill(0),
        },
        minutes=(-60.0, 0.0),
        needs_a_second_pod=True,
    ),
    "group": Scenario(in_a_group=True),
}

# Terms of quotum's contenders; the others are settings of LiteLLM's router.
QUOTUM = {"quotum": {}, "quotum learned": {"reserve": "learned"}, "quotum sliding": {"kind": "sliding"}}
LITELLM = {
    "usage-based-routing-v2": {"routing_strategy": "usage-based-routing-v2"},
    "enforce_model_rate_limits": {"optional_pre_call_checks": ["enforce_model_rate_limits"]},
}
REDIS_GONE = ", Redis gone"
CONTENDERS = [*QUOTUM, *LITELLM, *(f"{name}{REDIS_GONE}" for name in LITELLM)]

# The least of the limit that is to be used. What a `sliding` window uses of a small limit is no target.
LEAST = {
    ("quotum", "round robin"): 0.95,
    ("quotum", "all to one"): 0.95,
    ("quotum", "burst"): 0.70,
    ("quotum", "pod killed"): 0.60,
    ("quotum", "restarted, then killed"): 0.60,
    ("quotum learned", "round robin"): 0.95,
    ("quotum learned", "all to one"): 0.95,
    ("quotum learned", "burst"): 0.85,
    ("quotum learned", "pod killed"): 0.60,
    ("quotum learned", "restarted, then killed"): 0.60,
}


class Redis:
    """The distribution's own, without anything written to disk."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self.folder = tempfile.mkdtemp(prefix="quotum-redis-")
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Contest:
    """One contender and so many pods, through the scenarios that its deployments are for."""

    def __init__(self, contender: str, pods: int, scenarios: list[str]) -> None:
        self.contender, self.pods, self.scenarios = contender, pods, scenarios
        [in_a_group] = {SCENARIOS[name].in_a_group for name in scenarios}
        self.redis = None if contender in QUOTUM else Redis()
        about = {"quotum": QUOTUM[contender]} if contender in QUOTUM else {}

        def written(base: str) -> dict[str, Any]:
            names = ("a", "b") if in_a_group else ("one",)
            share = LIMIT // len(names)
            deployments = [
                deployment(base, number=number, name="openai/gpt-4o", tpm=share, about=dict(about)) for number in names
            ]
            if self.redis is None:
                return config(*deployments)
            router = {
                **LITELLM[contender.removesuffix(REDIS_GONE)],
                "redis_host": "127.0.0.1",
                "redis_port": self.redis.port,
                "num_retries": 0,
            }
            whole = config(*deployments, router=router)
            del whole["litellm_settings"]["callbacks"]
            return whole

        self.fleet = Fleet(pods, written, is_quotum=self.redis is None)

    async def run(self, name: str, minute: float) -> dict[str, Any]:
        scenario, seed = SCENARIOS[name], len(name) * 10 + self.pods
        events = scenario.events(self.fleet)
        if self.redis is not None and self.contender.endswith(REDIS_GONE):
            events[scenario.minutes[0] - 1.0] = self.redis.kill
        # What a deployment learns, and what LiteLLM loads with its first requests, comes before.
        begins = scenario.minutes[0] - 25.0
        warm = [Sent(begins + number * 0.3, number % self.pods, completion=60 + 6 * number) for number in range(30)]
        await offer(self.fleet.urls, warm, minute, latency_ms=100)
        answers = await offer(self.fleet.urls, scenario.requests(self.pods, seed), minute, events)
        return self.judged(name, minute, answers)

    def judged(self, name: str, minute: float, answers: Answers) -> dict[str, Any]:
        records, loaded = self.fleet.stub.ledger(), SCENARIOS[name].minutes
        ratios = [round(admitted(records, minute + start) / LIMIT, 3) for start in loaded]
        # With the minutes that its warm-up and its latest requests arrived in.
        first, last = minute + loaded[0] - 60.0, minute + loaded[-1] + 120.0
        inside = [record for record in records if first <= record["arrived_unix_ms"] / 1_000 < last]
        return {
            "contender": self.contender,
            "scenario": name,
            "pods": self.pods,
            "admitted": max(ratios) if max(ratios) > 1.0 else min(ratios),
            "minutes": ratios,
            "any_60_s": round(most_in_any(inside) / LIMIT, 3),
            "happened": answers.happened,
            "statuses": dict(sorted(answers.statuses.items())),
            "added_ms_p50": round(statistics.median(answers.latencies) * 1_000, 1) if answers.latencies else None,
            "refusal_ms_p50": round(statistics.median(answers.refusals) * 1_000, 1) if answers.refusals else None,
            "without_retry_after": answers.without_retry_after,
            "minute": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(minute)),
            "load": round(os.getloadavg()[0], 1),
        }

    def mend(self) -> None:
        """Starts again what the scenario ended."""
        if self.redis is not None and self.redis.process.poll() is not None:
            self.redis.start()
        for number in range(self.pods):
            if number not in self.fleet.alive:
                self.fleet.restart(number)
        self.fleet.wait()

    def close(self) -> None:
        self.fleet.close()
        if self.redis is not None:
            self.redis.close()


def plan(contenders: list[str], pods: list[int], scenarios: list[str]) -> list[tuple[str, int, list[str]]]:
    """Returns the contests: one a fleet, and another fleet for what needs other deployments."""
    contests = []
    for in_a_group in (False, True):
        for contender in contenders:
            contender, _, own = contender.partition(":")
            for count in [int(count) for count in own.split(",")] if own else pods:
                taken = [
                    name
                    for name in scenarios
                    if SCENARIOS[name].in_a_group is in_a_group
                    and (count > 1 or not SCENARIOS[name].needs_a_second_pod)
                ]
                if taken:
                    contests.append((contender, count, taken))
    return contests


def compare(contests: list[tuple[str, int, list[str]]], scenarios: list[str], at_once: int) -> list[dict[str, Any]]:
    results = []
    while contests:
        now, contests = contests[:at_once], contests[at_once:]
        running: list[Contest] = []
        try:
            running += [Contest(*contest) for contest in now]
            for contest in running:
                contest.fleet.wait()
            for name in scenarios:
                taking = [contest for contest in running if name in contest.scenarios]
                if not taking:
                    continue
                # A minute that nobody was asked in, and the end of the one before the load for the warm-up.
                minute = next_minute(30.0 - SCENARIOS[name].minutes[0])
                step = 60.0 if SCENARIOS[name].apart else 0.0
                runs = [contest.run(name, minute + number * step) for number, contest in enumerate(taking)]
                ran = asyncio.run(all_of(runs))
                for result in ran:
                    print(json.dumps(result), flush=True)
                results += ran
                for contest in taking:
                    contest.mend()
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Contest.close, running))
    return results


async def all_of(runs: list[Any]) -> list[Any]:
    return await asyncio.gather(*runs)


def shown(result: dict[str, Any]) -> float:
    """Returns what a cell is judged by: of a `sliding` window the most in any 60 s."""
    ratio: float = result["any_60_s" if result["contender"] == "quotum sliding" else "admitted"]
    return ratio


def table(results: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys((result["contender"], result["pods"]) for result in results))
    heads = [f"{contender}, {pods} pod{'s' if pods > 1 else ''}" for contender, pods in columns]
    lines = ["| admitted / limit | " + " | ".join(heads) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name in dict.fromkeys(result["scenario"] for result in results):
        found = {(r["contender"], r["pods"]): f"{shown(r):.2f}" for r in results if r["scenario"] == name}
        lines.append(f"| {name} | " + " | ".join(found.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def misses(results: list[dict[str, Any]]) -> list[str]:
    """Returns which cells of quotum's are over the limit, or use less of it than they are to."""
    wrong = []
    for result in results:
        if result["contender"] not in QUOTUM:
            continue
        least, ratio = LEAST.get((result["contender"], result["scenario"]), 0.0), shown(result)
        if ratio > 1.0 or ratio < least:
            wanted = "at most 1.000" if ratio > 1.0 else f"at least {least}"
            wrong.append(f"{result['contender']}, {result['scenario']}, {result['pods']} pods: {ratio}, {wanted}")
    return wrong


def middle(values: Iterable[float]) -> dict[str, float]:
    """Returns a median, and the order statistics that hold the true one between them in 95 of 100 cases."""
    ordered = sorted(values)
    aside = math.ceil(1.96 * math.sqrt(len(ordered)) / 2)
    half = len(ordered) // 2
    low, high = ordered[max(0, half - aside)], ordered[min(len(ordered) - 1, half + aside)]
    return {"p50": round(statistics.median(ordered), 3), "from": round(low, 3), "to": round(high, 3)}


def latency(rounds: int) -> None:
    """What the callback adds to LiteLLM without limits."""
    stub = Stub()
    limited = config(*[deployment(stub.base, number=number, tpm=100_000_000) for number in ("a", "b")])
    plain = json.loads(json.dumps(limited))
    del plain["litellm_settings"]["callbacks"]
    # Two of each: two runs of one program differ, too. With one seed their tables are laid out alike.
    seed = {"PYTHONHASHSEED": "0"}
    proxies = {f"{kind} {number}": Proxy(what, seed) for number in (1, 2) for kind, what in (("without", plain), ("with", limited))}
    chance, warm = random.Random(1), 100
    took: dict[str, list[float]] = {name: [] for name in proxies}
    try:
        for proxy in proxies.values():
            proxy.wait()
        body = {"model": "gpt", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 300}
        headers = {"authorization": "Bearer sk-test", "x-stub-prompt-tokens": "50", "x-stub-completion-tokens": "150"}
        with httpx.Client(trust_env=False, timeout=30.0) as client:
            for number in range(rounds + warm):
                for name in chance.sample(list(proxies), len(proxies)):
                    begun = time.perf_counter()
                    client.post(f"{proxies[name].url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
                    if number >= warm:
                        took[name].append((time.perf_counter() - begun) * 1_000)
    finally:
        for proxy in proxies.values():
            proxy.close()
        stub.close()
    adds, nothing = [], []
    for without_1, with_1, without_2, with_2 in zip(*took.values()):
        adds.append((with_1 + with_2 - without_1 - without_2) / 2)
        nothing.append(without_1 - without_2)
    print(json.dumps({
        "rounds": rounds,
        "request_ms_p50": {name: round(statistics.median(times), 2) for name, times in took.items()},
        "callback_adds_ms": middle(adds),
        "quartiles_ms": [round(quartile, 2) for quartile in statistics.quantiles(adds, n=4)],
        "without_1_less_without_2_ms": middle(nothing),
        "load": round(os.getloadavg()[0], 1),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", default="1,2,3", help="how many proxies the fleets have (default: %(default)s)")
    parser.add_argument("--scenarios", default=None, help=f"in this order; separated by ; of: {'; '.join(SCENARIOS)}")
    parser.add_argument("--contenders", default=None, help=f"separated by ; and with :1,3 for other --pods, of: {'; '.join(CONTENDERS)}")
    parser.add_argument("--at-once", type=int, default=1, help="fleets that run beside one another (default: %(default)s)")
    parser.add_argument("--latency", type=int, nargs="?", const=1_000, metavar="ROUNDS", help="compare latency instead")
    options = parser.parse_args()
    if "QUOTUM" not in os.environ:
        raise SystemExit("set QUOTUM to the built command: its stub is the upstream")
    if options.latency:
        latency(options.latency)
        return

    def picked(written: str | None, known: Iterable[str], what: str) -> list[str]:
        names = list(known) if written is None else [name.strip() for name in written.split(";")]
        for name in names:
            if name.partition(":")[0] not in known:
                raise SystemExit(f"there is no {what} {name!r}; there are: {'; '.join(known)}")
        return names

    contenders = picked(options.contenders, CONTENDERS, "contender")
    scenarios = picked(options.scenarios, SCENARIOS, "scenario")
    if shutil.which("redis-server") is None:
        print("no redis-server here: LiteLLM's own enforcement is left out", file=sys.stderr)
        contenders = [name for name in contenders if name.partition(":")[0] in QUOTUM]
    pods = [int(count) for count in options.pods.split(",")]
    results = compare(plan(contenders, pods, scenarios), scenarios, options.at_once)
    print(f"\n{table(results)}\n")
    wrong = misses(results)
    print("\n".join(wrong) or "quotum missed no target")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""How much of one limit a fleet of LiteLLM proxies lets through: quotum beside LiteLLM's own.

    QUOTUM=target/release/quotum python bindings/python/bench/compare.py [--pods 1,2,3]
        [--scenarios ...] [--contenders ...] [--at-once 4] [--latency]

Every cell is one UTC minute of real proxies in front of the stub, which counts by arrival: a limit of
10,000 tokens a minute, five times of it offered, 2 s upstream latency, 50 prompt and 50 to 250 output
tokens, max_tokens 300, nothing sent again. A fleet runs all its scenarios one after another, with a
minute between them; fleets run beside one another, but bursts, which take all of a small machine, each in
a minute of its own. Needs what tests/requirements.txt pins, the quotum package, and for the contenders
with Redis the redis-server of the distribution. `--latency` compares one proxy with and without the
callback instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "proxies"))

from fleet import Fleet, Proxy, Stub, config, deployment, free_ports  # noqa: E402
from load import (  # noqa: E402
    LIMIT, PROMPT, Answers, Sent, admitted, bursts, evenly, most_in_any, next_minute, offer, workload,
)  # fmt: skip


def group(base: str, about: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Returns one model group of two deployments that share the limit in halves."""
    return [
        deployment(base, number=number, name="openai/gpt-4o", tpm=LIMIT // 2, about=dict(about or {}))
        for number in ("a", "b")
    ]


class Redis:
    """The distribution's own, without anything written to disk."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self.folder = tempfile.mkdtemp(prefix="quotum-redis-")
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


# Terms of quotum's contenders; the others are settings of LiteLLM's router.
QUOTUM = {"quotum": {}, "quotum learned": {"reserve": "learned"}, "quotum sliding": {"kind": "sliding"}}
LITELLM = {
    "usage-based-routing-v2": {"routing_strategy": "usage-based-routing-v2"},
    "enforce_model_rate_limits": {"optional_pre_call_checks": ["enforce_model_rate_limits"]},
}
CONTENDERS = [*QUOTUM, *LITELLM, *(f"{name}, Redis gone" for name in LITELLM)]


def turn(pods: int) -> Any:
    return lambda number, at: number % pods


def scenario(name: str, pods: int, fleet: Fleet, seed: int) -> tuple[list[Sent], dict[float, Any]]:
    by_turn = turn(pods)
    if name == "round robin":
        return workload(evenly(), by_turn, seed), {}
    if name == "half streaming":
        return workload(evenly(), by_turn, seed, streaming=0.5), {}
    if name == "all to one":
        return workload(evenly(), lambda number, at: 0, seed), {}
    if name == "burst":
        return workload(bursts(1.0, 25.0), by_turn, seed), {}
    if name == "minute edge":
        # At the same rate around the edge: the last 20 s of a minute and the first of the next.
        return workload(evenly(80.0, 3.4, start=40.0), by_turn, seed), {}
    if name == "pod killed":
        return workload(evenly(), by_turn, seed), {20.0: lambda: fleet.kill(0)}
    if name == "rolling restart":
        return workload(evenly(), by_turn, seed), {15.0: lambda: fleet.leave(0), 18.0: lambda: fleet.restart(0)}
    raise SystemExit(f"there is no scenario {name!r}")


SCENARIOS = ["round robin", "half streaming", "all to one", "burst", "minute edge", "rolling restart", "pod killed"]
ALONE_NOTHING_IS_LEFT = {"pod killed", "rolling restart"}


class Contest:
    """One contender and so many pods, through all scenarios."""

    def __init__(self, contender: str, pods: int) -> None:
        self.contender, self.pods = contender, pods
        self.redis: Redis | None = None
        if contender in QUOTUM:
            self.fleet = Fleet(pods, lambda base: config(*group(base, {"quotum": QUOTUM[contender]})))
            return
        self.redis = Redis()
        router = {
            **LITELLM[contender.removesuffix(", Redis gone")],
            "redis_host": "127.0.0.1",
            "redis_port": self.redis.port,
            "num_retries": 0,
        }

        def written(base: str) -> dict[str, Any]:
            whole = config(*group(base), router=router)
            del whole["litellm_settings"]["callbacks"]
            return whole

        self.fleet = Fleet(pods, written, is_quotum=False)

    def wait(self) -> None:
        self.fleet.wait()

    def takes(self, name: str) -> bool:
        return self.pods > 1 or name not in ALONE_NOTHING_IS_LEFT

    async def run(self, name: str, minute: float) -> dict[str, Any]:
        # What a deployment learns, and what LiteLLM loads with its first requests, comes before.
        warm = [Sent(-25.0 + number * 0.3, number % self.pods, completion=60 + 6 * number) for number in range(30)]
        requests, events = scenario(name, self.pods, self.fleet, seed=len(name) * 10 + self.pods)
        if self.contender.endswith("Redis gone"):
            assert self.redis is not None
            events = {**events, -1.0: self.redis.close}
        await offer(self.fleet.urls, warm, minute, latency_ms=100)
        answers = await offer(self.fleet.urls, requests, minute, events)
        return self.judged(name, minute, answers)

    def judged(self, name: str, minute: float, answers: Answers) -> dict[str, Any]:
        records = self.fleet.stub.ledger()
        # Its own minute, and those that its warm-up and its latest requests arrived in.
        minutes = [admitted(records, minute + offset) for offset in (-60.0, 0.0, 60.0)]
        inside = [record for record in records if minute * 1_000 - 60_000 <= record["arrived_unix_ms"]]
        return {
            "contender": self.contender,
            "scenario": name,
            "pods": self.pods,
            "admitted": round(max(minutes) / LIMIT, 3),
            "any_60_s": round(most_in_any(inside) / LIMIT, 3),
            "statuses": dict(sorted(answers.statuses.items())),
            "added_ms_p50": round(statistics.median(answers.latencies) * 1_000, 1) if answers.latencies else None,
            "refusal_ms_p50": round(statistics.median(answers.refusals) * 1_000, 1) if answers.refusals else None,
            "without_retry_after": answers.without_retry_after,
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


def compare(contests: list[tuple[str, int]], scenarios: list[str], at_once: int) -> list[dict[str, Any]]:
    results = []
    while contests:
        now, contests = contests[:at_once], contests[at_once:]
        running: list[Contest] = []
        try:
            running += [Contest(*contest) for contest in now]
            for contest in running:
                contest.wait()
            for name in scenarios:
                taking = [contest for contest in running if contest.takes(name)]
                # A minute that nobody was asked in, and the end of one before it for the warm-up.
                minute = next_minute(30.0)
                step = 60.0 if name == "burst" else 0.0
                ran = asyncio.run(
                    all_of([contest.run(name, minute + number * step) for number, contest in enumerate(taking)])
                )
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


def table(results: list[dict[str, Any]]) -> None:
    contenders = list(dict.fromkeys(result["contender"] for result in results))
    print("\n| admitted / limit | " + " | ".join(contenders) + " |")
    print("|---" * (len(contenders) + 1) + "|")
    for name, pods in dict.fromkeys((result["scenario"], result["pods"]) for result in results):
        row = [f"{name}, {pods} pod" + ("s" if pods > 1 else "")]
        for contender in contenders:
            found = [r for r in results if (r["scenario"], r["pods"], r["contender"]) == (name, pods, contender)]
            sliding = contender == "quotum sliding"
            row.append(f"{found[0]['any_60_s' if sliding else 'admitted']:.2f}" if found else "")
        print("| " + " | ".join(row) + " |")


def latency(requests: int) -> None:
    """One caller, turn and turn about: what the callback adds to LiteLLM without limits."""
    stub = Stub()
    limited = config(*[deployment(stub.base, number=number, tpm=100_000_000) for number in ("a", "b")])
    plain = json.loads(json.dumps(limited))
    del plain["litellm_settings"]["callbacks"]
    proxies = {"plain": Proxy(plain), "callback": Proxy(limited)}
    try:
        for proxy in proxies.values():
            proxy.wait()
        body = {"model": "gpt", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 300}
        headers = {"authorization": "Bearer sk-test", "x-stub-prompt-tokens": "50", "x-stub-completion-tokens": "150"}
        took: dict[str, list[float]] = {name: [] for name in proxies}
        with httpx.Client(trust_env=False, timeout=30.0) as client:
            for number in range(requests + 50):
                # Neither always comes first.
                for name, proxy in sorted(proxies.items(), reverse=bool(number % 2)):
                    begun = time.perf_counter()
                    client.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers).raise_for_status()
                    if number >= 50:
                        took[name].append((time.perf_counter() - begun) * 1_000)
        halves = {name: statistics.quantiles(times, n=100) for name, times in took.items()}
        pairs = statistics.quantiles((b - a for a, b in zip(took["plain"], took["callback"])), n=4)
        print(json.dumps({
            "requests": requests,
            **{f"{name}_ms": {"p50": round(cut[49], 2), "p99": round(cut[98], 2)} for name, cut in halves.items()},
            "callback_adds_ms_p50": round(halves["callback"][49] - halves["plain"][49], 2),
            "pair_by_pair_ms": {"p25": round(pairs[0], 2), "p50": round(pairs[1], 2), "p75": round(pairs[2], 2)},
        }))  # fmt: skip
    finally:
        for proxy in proxies.values():
            proxy.close()
        stub.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", default="1,2,3")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--contenders", default=None, help="separated by ;")
    parser.add_argument("--at-once", type=int, default=1, help="fleets that run in the same minutes")
    parser.add_argument("--latency", type=int, nargs="?", const=300, help="compare the callback's latency instead")
    options = parser.parse_args()
    if "QUOTUM" not in os.environ:
        raise SystemExit("set QUOTUM to the built command: its stub is the upstream")
    if options.latency:
        latency(options.latency)
        return
    contenders = options.contenders.split(";") if options.contenders else CONTENDERS
    if shutil.which("redis-server") is None:
        print("no redis-server here: LiteLLM's own enforcement is left out", file=sys.stderr)
        contenders = [name for name in contenders if name in QUOTUM]
    contests = [(contender, pods) for contender in contenders for pods in map(int, options.pods.split(","))]
    table(compare(contests, options.scenarios.split(","), options.at_once))


if __name__ == "__main__":
    main()

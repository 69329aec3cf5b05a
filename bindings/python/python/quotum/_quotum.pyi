"""The types of the native module."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping
from types import TracebackType
from typing import Literal, TypedDict, final

__all__ = ["Limiter", "Permit", "Quota", "Standing"]

_Unit = Literal["tokens", "requests", "input_tokens", "output_tokens"]

class _Limits(TypedDict, total=False):
    tpm: int
    rpm: int
    itpm: int
    otpm: int

class _Elastic(TypedDict):
    elastic: float

@final
class Quota:
    """An amount of a unit per window.

    `kind` is "fixed" (aligned windows), "sliding" (in every interval as long as the window; `parts`
    1 to 12, default 4) or "bucket" (refilled continuously, at most `burst` at once). `window` is in
    seconds. Raises ValueError for what cannot be kept.
    """

    def __init__(
        self,
        unit: _Unit,
        amount: int,
        window: float = 60.0,
        kind: Literal["fixed", "sliding", "bucket"] = "fixed",
        *,
        parts: int | None = None,
        burst: int | None = None,
    ) -> None: ...
    @property
    def unit(self) -> _Unit: ...
    @property
    def amount(self) -> int: ...
    @property
    def window(self) -> float:
        """Seconds."""

@final
class Standing:
    """Where one quota stands in the running window, as this replica knows it."""

    @property
    def quota(self) -> Quota: ...
    @property
    def limit(self) -> int:
        """What the window lets through, over all replicas."""
    @property
    def used(self) -> int:
        """Reserved and not refunded, over all replicas, as known here."""
    @property
    def remaining(self) -> int:
        """limit - used: what the fleet can still spend, as far as this replica knows."""
    @property
    def margin(self) -> int:
        """What cannot be spent here now: peers hold it, or it is out of reach."""
    @property
    def spendable(self) -> int:
        """What this replica may spend without asking anybody."""
    @property
    def vested(self) -> int:
        """What the window lets through by now; windows longer than ten minutes do so in instalments."""
    @property
    def resets_in(self) -> float:
        """Seconds until the window ends."""

@final
class Permit:
    """A reservation. Settle it with what was used, or refund it, once.

    What is neither settled nor refunded stays charged: the request may have reached the upstream.
    `with` and garbage collection do no more than forget it.
    """

    @property
    def deployment(self) -> str: ...
    @property
    def tokens(self) -> int:
        """What was reserved."""
    @property
    def waited(self) -> float:
        """Seconds for which the request was parked."""
    @property
    def settled(self) -> bool: ...
    def settle(
        self, tokens: int | None = None, *, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> None:
        """Replace the estimate by what was used. RuntimeError if it is settled already."""
    def refund(self) -> None:
        """Give everything back: the request never reached the upstream."""
    def __enter__(self) -> Permit: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

@final
class Limiter:
    """One limiter for all deployments of a process.

    `deployments` maps ids to limits: `{"tpm": 100_000, "rpm": 600}` per minute, or one or several
    `Quota`. `mode` is "strict", "observe" (counts, never refuses) or `{"elastic": 0.05}`. `wait` is how
    long `acquire` waits for rights from peers, `edge` how close to a window's end a reservation must fit
    into both windows, in seconds. Raises ValueError for limits that cannot be kept.

    Nothing starts before the first use, which must come after a fork: rights belong to one process.
    """

    def __init__(
        self,
        deployments: Mapping[str, _Limits | Quota | Iterable[Quota]],
        *,
        mode: Literal["strict", "observe"] | _Elastic | None = None,
        wait: float = 0.02,
        edge: float = 0.05,
    ) -> None: ...
    def try_acquire(
        self,
        deployment: str,
        tokens: int | None = None,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        requests: int = 1,
    ) -> Permit:
        """Reserve from this replica's own rights; never waits. Raises Denied."""
    def acquire(
        self,
        deployment: str,
        tokens: int | None = None,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        requests: int = 1,
    ) -> Permit:
        """Reserve, and wait up to `wait` for rights from peers, without the GIL. Raises Denied."""
    def acquire_async(
        self,
        deployment: str,
        tokens: int | None = None,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        requests: int = 1,
    ) -> Awaitable[Permit]:
        """As `acquire`, in asyncio. Cancelled, it holds nothing."""
    def standing(self, deployment: str) -> list[Standing]:
        """Where each quota of the deployment stands in the running window."""
    @property
    def deployments(self) -> list[str]:
        """The ids, in order."""
    @property
    def ready(self) -> bool:
        """Whether this replica may take traffic: it is alone, or knows its peers."""
    def join(
        self,
        *,
        seeds: Iterable[str] | None = None,
        listen: str | None = None,
        advertise: str | None = None,
        cluster: str | None = None,
        node: str | None = None,
        key_file: str | None = None,
        insecure: bool = False,
        interval: float | None = None,
        patience: float | None = None,
        on_silence: Literal["fair_share", "closed"] | None = None,
        first_window: Literal["admit", "wait"] | None = None,
    ) -> None:
        """Join the fleet, before the first reservation.

        What is not passed is taken from QUOTUM_SEEDS, QUOTUM_GOSSIP_LISTEN, QUOTUM_GOSSIP_ADVERTISE,
        QUOTUM_CLUSTER, QUOTUM_NODE and QUOTUM_GOSSIP_KEY_FILE. Without seeds this limiter stays alone.
        Raises ValueError for settings that cannot be used, OSError for a port in use.
        """
    def leave(self, timeout: float = 10.0) -> bool:
        """Hand the rights over and leave; False if peers did not answer within `timeout` seconds."""
    def leave_async(self, timeout: float = 10.0) -> Awaitable[bool]: ...
    def __enter__(self) -> Limiter: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __aenter__(self) -> Awaitable[Limiter]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Awaitable[None]: ...

def stop() -> None:
    """End the background thread, for a process that ends."""

@final
class Pod:
    """A pod of LiteLLM workers: what `quotum.litellm` stands on. Not for others."""

    def __init__(self) -> None: ...
    def declare(self, deployments: str) -> None: ...
    def reserve(self, levels: list[list[str]], api: str, body: str) -> Awaitable[tuple[int, str, float]]: ...
    def room(self, levels: list[list[str]], api: str, body: str) -> Awaitable[list[str]]: ...
    def used(self, id: int, prompt: int, completion: int, total: int, cached: int = 0) -> None: ...
    def late(self, id: int) -> None: ...
    def ended(self, id: int, how: Literal["unreported", "rejected", "failed", "unsent"]) -> None: ...
    def status(self) -> str: ...
    def metrics(self) -> str: ...
    def leave(self, timeout: float = 5.0) -> None: ...
    @property
    def seat(self) -> Literal["owner", "guest", "standing"]: ...

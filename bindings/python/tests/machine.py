"""This machine as the tests use it: free ports, its clock, and what is waited for.

Knows sockets and time. Must not know what is tested.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Below those that Linux gives to connections (ip_local_port_range): a port that is free when it is looked
# for is not the near end of some connection when it is bound, seconds later.
_PORTS = range(20_000, 32_000)

# Ports that were given out, each held by an abstract socket of its name until this process ends: tests that run
# beside one another are not given the same one.
_held: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on, for TCP and for UDP, and that nobody else who asks here is given."""
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0quotum-test-port-{port}")
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with socket.socket(socket.AF_INET, kind) as free:
                    free.bind(("127.0.0.1", port))
        except OSError:
            name.close()
            continue
        _held.append(name)
        ports.append(port)
    raise AssertionError(f"no {count} ports are free in {_PORTS}")


def until(condition: Callable[[], Value], within: float = 30.0, what: str = "it") -> Value:
    """Returns what the condition says, once that is true."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come about within {within:.0f} s"
        time.sleep(0.02)
    return value


def in_a_minute_with(seconds: float) -> None:
    """Returns in a UTC minute of which so much is left: at once, or when the next one begins."""
    left = 60.0 - time.time() % 60.0
    if left < seconds:
        time.sleep(left)

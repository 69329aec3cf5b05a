"""The refusal. In Python, because a class of a stable-ABI wheel cannot extend Exception."""

from __future__ import annotations


class Denied(Exception):
    """A refusal: a decision, not a failure. Nothing was charged.

    `retry_after` is in seconds; None means never: the request is larger than the whole limit.
    """

    def __init__(
        self,
        message: str,
        *,
        deployment: str = "",
        reason: str = "",
        retry_after: float | None = None,
        limit: str = "",
        unit: str = "",
        remaining: int = 0,
    ) -> None:
        super().__init__(message)
        self.deployment = deployment
        self.reason = reason
        self.retry_after = retry_after
        self.limit = limit
        self.unit = unit
        self.remaining = remaining

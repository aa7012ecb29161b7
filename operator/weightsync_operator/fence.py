"""The right to write, with its end by a clock that nothing stops. Standard library and the operator's errors only."""

from __future__ import annotations

import math
import time

from weightsync_operator.plan.errors import OperatorError

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Unlike CLOCK_MONOTONIC it also counts while the machine sleeps, when others go on."""


def clock() -> float:
    """Seconds since some fixed moment; a stopped process, a paused machine or a set wall clock do not hold it up."""
    return time.clock_gettime(_CLOCK)


class NotLeader(OperatorError):
    """A request that would change something was not sent, because this operator may no longer write."""


class Fence:
    """Asked right before each request that changes something."""

    def __init__(self, open_until: float = -math.inf) -> None:
        self.open_until = open_until
        """By `clock()`; infinity without a Lease."""

    def is_open(self) -> bool:
        return clock() < self.open_until

    def close(self) -> None:
        self.open_until = -math.inf

    def check(self) -> None:
        """Raises NotLeader."""
        if not self.is_open():
            raise NotLeader("not sent: this operator does not hold the Lease")

"""The one way to wait: poll with a deadline, and say what was seen last when it passes. Imports nothing of ours but errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self, TypeVar

from weightsync.errors import DeadlineExceeded

T = TypeVar("T")

POLL_S = 0.005
"""First pause between two looks; it doubles up to the longest, so that long waits cost little."""
POLL_MAX_S = 0.05


class Deadline:
    """An absolute moment on this process's monotonic clock, shared by all waits of one push."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    @classmethod
    def at(cls, moment: float) -> Self:
        """The deadline at `moment` of time.monotonic()."""
        return cls(moment - time.monotonic())

    @property
    def moment(self) -> float:
        """The deadline as time.monotonic() will read."""
        return self._at

    @property
    def left_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._at - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left_s <= 0


def wait_until(
    fetch: Callable[[], T | None],
    *,
    deadline: Deadline,
    what: str,
    missing: Callable[[], str] = lambda: "",
    poll_s: float = POLL_S,
    poll_max_s: float = POLL_MAX_S,
    pause: Callable[[float], object] = time.sleep,
) -> T:
    """Call `fetch` until it returns something else than None, and return that.

    `pause` is given the longest time to wait between two calls; one that knows when something has happened returns sooner.
    Raises DeadlineExceeded with `what`, the seconds waited and what `missing()` says last. Whatever `fetch` raises passes
    through: a wait that can fail early does so there.
    """
    pause_s = poll_s
    while (value := fetch()) is None:
        if deadline.passed:
            told = missing()
            raise DeadlineExceeded(f"{what}: not within {deadline.timeout_s:.1f} s" + (f"; {told}" if told else ""))
        pause(min(pause_s, max(deadline.left_s, 0.001)))
        pause_s = min(pause_s * 2, poll_max_s)
    return value

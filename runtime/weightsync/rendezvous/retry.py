"""The one loop that tries a remote call again until its deadline. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry_until(
    deadline: float, attempt: Callable[[], T], *, passing: tuple[type[Exception], ...], pause_s: float
) -> T:
    """Call `attempt` until it returns, or raise its last passing error once `deadline` (time.monotonic) is over.

    It is called at least once. Errors that are not in `passing` go through at once. `pause_s` lies between two tries:
    a refused connection, which answers at once, is not asked in a busy loop.
    """
    while True:
        try:
            return attempt()
        except passing:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
        time.sleep(min(pause_s, left_s))

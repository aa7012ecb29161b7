"""The one wait of the lab: poll with a deadline, and say the last value when it passes. Imports the standard library alone."""

import time
from collections.abc import Callable
from typing import TypeVar

from e2e.lab.errors import LabError

T = TypeVar("T")


def wait_until(
    what: str, fetch: Callable[[], T], met: Callable[[T], bool], *, timeout_s: float, cure: str, interval_s: float = 0.1
) -> T:
    """Return the first value of `fetch` for which `met` holds.

    Raises LabError after `timeout_s` with the last value seen. `fetch` is called at least once, and its errors pass through.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = fetch()
        if met(value):
            return value
        if time.monotonic() >= deadline:
            raise LabError(f"{what}: not so after {timeout_s:.1f} s (last seen: {value!r})", cure=cure)
        time.sleep(interval_s)

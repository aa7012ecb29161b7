"""Conversion of a group beside the wire of the one before it.

Posting has a thread of its own, since a post over shared memory returns only when the bytes are copied. Standard library only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

READY_POLL_S = 20e-6


def run(
    groups: int, convert: Callable[[int], Callable[[], bool]], post: Callable[[int], None], poll: Callable[[], object]
) -> None:
    """Convert groups 0..n-1 in order, and post each once it is converted, on another thread.

    `convert(i)` returns what says whether group i is converted; `poll` makes progress of what was posted, and is called while a
    group is waited for. Nothing more is posted once either side raised; the first error is raised when both have ended.
    """
    converted: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
    faults: list[BaseException] = []
    poster = threading.Thread(
        target=_post_all, args=(converted, post, poll, faults), name="weightsync-post", daemon=True
    )
    poster.start()
    try:
        for number in range(groups):
            if faults:
                break
            converted.put(convert(number))
    finally:
        converted.put(None)
        poster.join()
    if faults:
        raise faults[0]


def _post_all(
    converted: queue.SimpleQueue[Callable[[], bool] | None],
    post: Callable[[int], None],
    poll: Callable[[], object],
    faults: list[BaseException],
) -> None:
    number = 0
    try:
        while (ready := converted.get()) is not None:
            while not ready():
                poll()
                time.sleep(READY_POLL_S)
            post(number)
            number += 1
    except BaseException as error:  # raised again by the thread that converts
        faults.append(error)

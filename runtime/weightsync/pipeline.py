"""Conversion of a group beside the wire of the one before it.

Posting has a thread of its own, since a post over shared memory returns only when the bytes are copied. Standard library only.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence, Set

READY_POLL_S = 20e-6


def run(
    groups: int,
    convert: Callable[[int], Callable[[], bool]],
    post: Callable[[int], None],
    poll: Callable[[], object],
    *,
    after: Sequence[Set[int]] = (),
    await_left: Callable[[Set[int]], None] = lambda numbers: None,
) -> None:
    """Convert groups 0..n-1 in order, and post each once it is converted, on another thread.

    `convert(i)` returns what says whether group i is converted; `poll` makes progress of what was posted, and is called while a
    group is waited for. Group i takes the memory of those in `after[i]`: they have been posted, and `await_left` has returned for
    them, before it is converted. Nothing more is posted once either side raised; the first error is raised when both have ended.
    """
    converted: queue.SimpleQueue[Callable[[], bool] | None] = queue.SimpleQueue()
    posted: queue.SimpleQueue[None] = queue.SimpleQueue()
    faults: list[BaseException] = []
    poster = threading.Thread(
        target=_post_all, args=(converted, posted, post, poll, faults), name="weightsync-post", daemon=True
    )
    poster.start()
    n_posted = 0
    try:
        for number in range(groups):
            needed = after[number] if after else frozenset()
            while needed and n_posted <= max(needed) and not faults:
                posted.get()
                n_posted += 1
            if faults:
                break
            if needed:
                await_left(needed)
            converted.put(convert(number))
    finally:
        converted.put(None)
        poster.join()
    if faults:
        raise faults[0]


def _post_all(
    converted: queue.SimpleQueue[Callable[[], bool] | None],
    posted: queue.SimpleQueue[None],
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
            posted.put(None)
    except BaseException as error:  # raised again by the thread that converts
        faults.append(error)
        posted.put(None)  # it may wait for this one

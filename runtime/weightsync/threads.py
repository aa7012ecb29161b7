"""Threads that are kept between two pieces of work. Imports nothing of ours.

A new thread for each push cost a rank 0.13 ms of processor time by itself, and 0.4 ms where 64 ranks shared two cores, measured by
hand (docs/performance.md).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class KeptThreads:
    """Runs work on daemon threads: on one that has none at the moment, else on a new one. Thread-safe.

    Work never waits for other work, so one piece that hangs holds up no other; and unlike those of `concurrent.futures` these
    threads do not hold up the end of the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]] = []
        self._closed = False

    def run(self, work: Callable[[], None]) -> threading.Event:
        """Begin `work`; the event is set when it has ended, however it did. What it raises is logged."""
        ended = threading.Event()
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name=self._name, daemon=True).start()
        inbox.put((work, ended))
        return ended

    def close(self) -> None:
        """Let threads end as soon as they have no work."""
        with self._lock:
            self._closed, idle = True, self._idle
            self._idle = []
        for inbox in idle:
            inbox.put(None)

    def _serve(self, inbox: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]) -> None:
        while (task := inbox.get()) is not None:
            work, ended = task
            try:
                work()
            except BaseException:  # also an exit that a library asks for: whoever waits for the work must hear that it is over
                logger.exception("work on %s failed", threading.current_thread().name)
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(inbox)
            del work, task  # what it holds is not kept until the next one
            ended.set()
            if closed:
                return

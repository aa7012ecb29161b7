"""Threads that say "still here": a replica's and a writer's leases in the ledger, a source's status in ModelExpress.

A beat that fails is told once, kept as `last_error` and tried again at the next beat: the thread ends when it is closed
or fenced, never of a fault. Imports the rendezvous's own modules only.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Self

from weightsync.errors import FencedOut, WeightSyncError
from weightsync.rendezvous.ledger import Ledger

LEASE_TTL_S = 15.0
"""Longer than any stall of a healthy process that holds the GIL, shorter than a push's default deadline."""

BEATS_A_LEASE = 3
JITTER = 0.1
"""Share of the interval by which a beat is early at random, so that a fleet does not beat at once."""

logger = logging.getLogger(__name__)


class Heartbeat:
    """Calls `beat` each `interval_s` on a daemon thread of its own, and at once after `poke`; a context manager.

    FencedOut ends it: `fenced` is set and `on_fenced` called, on this thread. Any other error is logged when it begins
    and when it ends.
    """

    def __init__(
        self,
        name: str,
        beat: Callable[[], None],
        *,
        interval_s: float,
        on_fenced: Callable[[FencedOut], None] | None = None,
    ) -> None:
        self.name = name
        self.last_error: Exception | None = None
        """What failed in the last beat; None when it went well."""
        self.fenced: FencedOut | None = None
        self._beat = beat
        self._interval_s = interval_s
        self._on_fenced = on_fenced
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._first = threading.Event()
        self._last_success = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{name}", daemon=True)

    def start(self) -> Self:
        """Begin; the first beat comes at once."""
        self._thread.start()
        return self

    def poke(self) -> None:
        """Beat now: what the heartbeat tells has changed."""
        self._wake.set()

    def wait_first(self, timeout_s: float) -> bool:
        """Wait until one beat went well; False when none did within `timeout_s` (see `last_error`)."""
        return self._first.wait(timeout_s)

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat that went well, or since this was made."""
        return time.monotonic() - self._last_success

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop beating; waits for a beat that is under way. A second call does nothing."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.is_set() and self.fenced is None:
            self._wake.clear()
            self._beat_once()
            self._wake.wait(self._interval_s * random.uniform(1 - JITTER, 1))

    def _beat_once(self) -> None:
        try:
            self._beat()
        except FencedOut as error:
            logger.error("heartbeat %s ends: %s", self.name, error)
            self.last_error = error
            self.fenced = error
            if self._on_fenced is not None:
                self._on_fenced(error)
        except WeightSyncError as error:
            self._note_failure(error, trace=False)
        except Exception as error:  # a bug in a callback must not silence a process that is alive
            self._note_failure(error, trace=True)
        else:
            if self.last_error is not None:
                logger.warning("heartbeat %s goes on after %.1f s", self.name, self.silent_s)
            self.last_error = None
            self._last_success = time.monotonic()
            self._first.set()

    def _note_failure(self, error: Exception, *, trace: bool) -> None:
        if type(error) is not type(self.last_error):
            logger.warning(
                "heartbeat %s failed, trying on each %.1f s: %s", self.name, self._interval_s, error, exc_info=trace
            )
        self.last_error = error


def writer_heartbeat(
    ledger: Ledger,
    epoch: int,
    rank: int,
    *,
    ttl_s: float = LEASE_TTL_S,
    on_fenced: Callable[[FencedOut], None] | None = None,
) -> Heartbeat:
    """The heartbeat of a trainer rank: renews its lease and re-asserts what it knows. Not yet started.

    Fenced when a newer epoch is in force: this trainer must end.
    """
    interval_s = ttl_s / BEATS_A_LEASE

    def beat() -> None:
        patient = ledger.until(time.monotonic() + interval_s)
        patient.hold_writer_lease(epoch, rank, ttl_s)
        known = patient.witness
        head = patient.raise_head(known.epoch, known.version, known.seen_epoch)
        if head.epoch > epoch:
            raise FencedOut(f"rank {rank} of epoch {epoch}: epoch {head.epoch} is in force; end this trainer")

    return Heartbeat(f"writer-{epoch}-{rank}", beat, interval_s=interval_s, on_fenced=on_fenced)

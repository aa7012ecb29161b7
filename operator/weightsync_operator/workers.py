"""One queue, one task a resource: a key that is poked is reconciled soon, never twice at once, and again later if asked.

Imports the standard library, the errors of the API and the logs' note of the resource only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from weightsync_operator.cluster import ApiError, ApiUnavailable
from weightsync_operator.fence import NotLeader
from weightsync_operator.logs import resource

_log = logging.getLogger(__name__)

Key = tuple[str, str]
PASSES_AT_ONCE = 16
GATHER_S = 0.05
"""Events come in bursts: one pass answers all of a burst."""
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
_CONFLICT = 409
_NOT_FOUND = 404
"""Once it is most likely a resource that was deleted during its pass, which the next one finds."""


class Workers:
    """Calls `reconcile(key)`, which returns seconds until the next look or None when the resource is gone."""

    def __init__(self, reconcile: Callable[[Key], Awaitable[float | None]]) -> None:
        self._reconcile = reconcile
        self._dirty: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(PASSES_AT_ONCE)
        self._closed = False

    def poke(self, key: Key) -> None:
        """Something that concerns `key` may have changed."""
        if self._closed:
            return
        if key not in self._tasks:
            self._dirty[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._work(key), name=f"reconcile {'/'.join(key)}")
        self._dirty[key].set()

    @property
    def depth(self) -> int:
        """Keys that wait for a pass."""
        return sum(dirty.is_set() for dirty in self._dirty.values())

    async def close(self) -> None:
        """Stop all work and wait for its end; what is poked later is left to the next operator."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, key: Key) -> None:
        resource.set(key)
        dirty, failures, look_again_s = self._dirty[key], 0, 0.0
        while True:
            await _wait(dirty, look_again_s)
            dirty.set()
            async with self._slots:
                dirty.clear()
                wait_s = await self._pass(key, failures)
            failures = failures + 1 if isinstance(wait_s, _Retry) else 0
            look_again_s = wait_s.after_s if isinstance(wait_s, _Retry) else wait_s
            if look_again_s is None:
                if dirty.is_set():
                    look_again_s = 0.0  # it was made again meanwhile
                    continue
                del self._tasks[key], self._dirty[key]
                return

    async def _pass(self, key: Key, failures: int) -> float | _Retry | None:
        retry = _Retry(min(MAX_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures, 10)))
        name = "/".join(key)
        try:
            return await self._reconcile(key)
        except ApiError as error:
            if error.status == _CONFLICT or (error.status == _NOT_FOUND and failures == 0):
                return _Retry(GATHER_S)
            _log.error("%s: the API server refused (%s); next try in %.0f s", name, error, retry.after_s)
        except ApiUnavailable as error:
            _log.warning("%s: no answer (%s); next try in %.0f s", name, error, retry.after_s)
        except NotLeader as error:
            _log.warning("%s: %s", name, error)
        except Exception:
            _log.exception("%s: this is a bug of the operator; next try in %.0f s", name, retry.after_s)
        return retry


class _Retry:
    """A pass failed; try again after so many seconds."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s


async def _wait(dirty: asyncio.Event, timeout_s: float) -> None:
    """Until something happened, or the time has come for another look."""
    try:
        async with asyncio.timeout(timeout_s):
            await dirty.wait()
    except TimeoutError:
        return
    await asyncio.sleep(GATHER_S)

"""The pauses of an engine around pushes: only an awaited pause says that it is idle, and it goes on when no pause is under way.

The data-parallel ranks of a mixture of experts step together, and pause and resume by their consensus (vllm/v1/engine/core.py,
DPEngineCoreProc). A core that is told to resume while its pause is under way raises, one whose pause has just ended waits in a
collective for the others: a resume that comes too early leaves the ranks waiting for each other for ever. So a pause that was given
up at a push's deadline is still awaited before data-parallel ranks go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol

from weightsync.errors import DeadlineExceeded
from weightsync.waiting import Deadline

RESUME_S = 30.0
"""Ranks that have paused resume within milliseconds; by then one of them is dead or stands still."""


class Pausable(Protocol):
    """The part of vLLM's EngineClient that pauses it; data-parallel ranks are reached all at once."""

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None: ...
    async def resume_generation(self) -> None: ...


class Pauses:
    """Whether one engine is paused by us."""

    def __init__(self, engine: Pausable, *, together: bool) -> None:
        """together: the engine's ranks go on together or not at all."""
        self._engine = engine
        self._together = together
        self._paused = False
        self._under_way: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.Task[None] | None = None
        self._stuck = ""

    @property
    def stuck(self) -> str:
        """Why the engine computes nothing although it was told to go on; empty as soon as it does."""
        resumed = self._resuming is not None and self._resuming.done() and self._resuming.exception() is None
        return "" if resumed else self._stuck

    async def pause(self, mode: str, deadline: Deadline, *, clear_cache: bool) -> None:
        """Wait until the engine is idle: the awaited pause synchronizes the device. Raises DeadlineExceeded; it may pause later."""
        await within(
            asyncio.shield(self._ask(mode, clear_cache)),
            deadline,
            f"requests in flight did not end (pauseMode {mode})",
        )

    async def stop(self, *, clear_cache: bool) -> None:
        """Abort what runs, and wait until the engine is idle. Raises DeadlineExceeded when it does not become so."""
        stopping = asyncio.shield(self._ask("abort", clear_cache))
        await within(stopping, Deadline(RESUME_S), "the engine did not stop what it ran")

    async def resume(self) -> None:
        """Go on, if paused. Raises DeadlineExceeded when the engine's ranks do not; then `stuck` says so until they do."""
        if not self._paused:
            return
        try:
            if self._together and self._under_way:
                await self._end_pauses()
            await within(asyncio.shield(self._resume()), Deadline(RESUME_S), "the engine's ranks did not all resume")
        except Exception as error:
            self._stuck = str(error)
            raise
        self._paused, self._stuck = False, ""

    async def _end_pauses(self) -> None:
        """A pause that was given up is awaited; what it waits for is aborted where that takes longer than ranks need."""
        await asyncio.wait(self._under_way, timeout=RESUME_S)
        if self._under_way:
            await self.stop(clear_cache=False)

    def _resume(self) -> asyncio.Task[None]:
        """One call at a time: ranks that have not all answered the last one are not told again."""
        if self._resuming is None or self._resuming.done():
            resuming: Any = self._engine.resume_generation()
            self._resuming = asyncio.get_running_loop().create_task(resuming, name="weightsync-resume")
            self._resuming.add_done_callback(_heard)
        return self._resuming

    def _ask(self, mode: str, clear_cache: bool) -> asyncio.Task[None]:
        self._paused = True
        pausing: Any = self._engine.pause_generation(mode=mode, clear_cache=clear_cache)
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(pausing, name="weightsync-pause")
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        _heard(task)


def _heard(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task raises what it raised."""
    if not task.cancelled():
        task.exception()


async def within(work: Awaitable[Any], deadline: Deadline, what: str) -> Any:
    """What `work` returns. Raises DeadlineExceeded with `what` when it has not ended in time; then it is cancelled."""
    try:
        return await asyncio.wait_for(work, max(deadline.left_s, 0.001))
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} within {deadline.timeout_s:.1f} s") from error

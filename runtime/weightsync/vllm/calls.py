"""Calls that every rank of an engine answers, and whether one has gone unanswered for too long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from weightsync.errors import FencedOut, WeightSyncError
from weightsync.rank_state import Description

ANSWER_S = 120.0
"""Ranks answer within milliseconds, unless they copy, digest or pin again all that they hold..."""
HELD_BYTES_PER_S = 200e6
"""...which is granted at this rate besides. By then one of them is dead or stands still."""


class Callee(Protocol):
    """The part of vLLM's EngineClient that reaches its ranks."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]: ...


class Calls:
    """The calls to one engine. None is given up: a rank that goes on carries them out, and the replica has to hear of it."""

    def __init__(self, engine: Callee, held_bytes: Callable[[], int]) -> None:
        """engine: its `collective_rpc` returns what the workers of all engine cores say. held_bytes: weights of all ranks."""
        self._engine = engine
        self._held_bytes = held_bytes
        self._waiting: dict[int, tuple[str, float]] = {}
        self._number = 0

    @property
    def stuck(self) -> str:
        """Which call has waited for longer than any takes; empty as soon as it is answered. Safe on any thread."""
        now, patience_s = time.monotonic(), ANSWER_S + self._held_bytes() / HELD_BYTES_PER_S
        late = [(now - since, method) for method, since in list(self._waiting.values()) if now - since >= patience_s]
        return "the engine's ranks have not all answered {1} for {0:.0f} s".format(*max(late)) if late else ""

    async def start(self, name: str) -> tuple[Description, ...]:
        """What ranks say when they first offer their memory: tracing and probing a model may take any time."""
        return _descriptions(await self._engine.collective_rpc("weightsync_start", args=(name,)))

    async def ask(self, method: str, *args: str) -> tuple[Description, ...]:
        """What all ranks say to a call. Raises what a rank refused."""
        calling: Any = self._engine.collective_rpc(method, args=args)
        task: asyncio.Task[list[Any]] = asyncio.get_running_loop().create_task(calling, name=method)
        self._number += 1
        self._waiting[self._number] = (method, time.monotonic())
        task.add_done_callback(partial(self._answered, self._number))
        return _descriptions(await asyncio.shield(task))

    def _answered(self, number: int, task: asyncio.Task[list[Any]]) -> None:
        del self._waiting[number]
        if not task.cancelled():
            task.exception()  # whoever waits raises it


def _descriptions(told: list[Any]) -> tuple[Description, ...]:
    answers = [json.loads(answer) for answer in told]
    refused = [answer for answer in answers if "error" in answer]
    if refused:
        kind = FencedOut if refused[0]["error"] == FencedOut.__name__ else WeightSyncError
        raise kind(refused[0]["message"])
    return tuple(Description(**answer) for answer in answers)

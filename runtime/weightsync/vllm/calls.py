"""Calls that every rank of an engine answers, and whether one has gone unanswered for too long."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol

from weightsync.errors import FencedOut, WeightSyncError
from weightsync.rank_state import Description

ANSWER_S = 120.0
"""Ranks answer within milliseconds; by then one of them is dead or stands still..."""
SLOW = frozenset({"weightsync_abort", "weightsync_commit", "weightsync_verify"})
"""...except to these, for which a rank may copy, digest or pin again all that it holds..."""
HELD_BYTES_PER_S = 200e6
"""...at this rate or faster."""


class Callee(Protocol):
    """The part of vLLM's EngineClient that reaches its ranks."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]: ...


class Calls:
    """The calls to one engine."""

    def __init__(self, engine: Callee, held_bytes: Callable[[], int]) -> None:
        """engine: its `collective_rpc` returns what the workers of all engine cores say. held_bytes: of the largest rank."""
        self._engine = engine
        self._held_bytes = held_bytes
        self._waiting: dict[int, tuple[str, float]] = {}
        self._number = 0

    @property
    def stuck(self) -> str:
        """Which call has waited for longer than any takes; empty as soon as it is answered. Safe on any thread."""
        now, slow_s = time.monotonic(), self._held_bytes() / HELD_BYTES_PER_S
        waiting = [(now - since, method) for method, since in list(self._waiting.values())]
        late = [each for each in waiting if each[0] >= ANSWER_S + (slow_s if each[1] in SLOW else 0.0)]
        return "the engine's ranks have not all answered {1} for {0:.0f} s".format(*max(late)) if late else ""

    async def start(self, name: str) -> tuple[Description, ...]:
        """What ranks say when they first offer their memory: tracing and probing a model may take any time."""
        return _descriptions(await self._engine.collective_rpc("weightsync_start", args=(name,)))

    async def ask(self, method: str, *args: str) -> tuple[Description, ...]:
        """What all ranks say to a call. Raises what a rank refused."""
        self._number += 1
        number = self._number
        self._waiting[number] = (method, time.monotonic())
        try:
            return _descriptions(await self._engine.collective_rpc(method, args=args))
        finally:
            del self._waiting[number]


def _descriptions(told: list[Any]) -> tuple[Description, ...]:
    answers = [json.loads(answer) for answer in told]
    refused = [answer for answer in answers if "error" in answer]
    if refused:
        kind = FencedOut if refused[0]["error"] == FencedOut.__name__ else WeightSyncError
        raise kind(refused[0]["message"])
    return tuple(Description(**answer) for answer in answers)

"""A replica's own rules, with an engine and a ledger that say what the test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.config import PodFacts
from weightsync.errors import FencedOut
from weightsync.receiver import Description
from weightsync.rendezvous.records import PushRecord
from weightsync.vllm.replica import Replica

DESCRIPTION = Description(
    rank=0,
    incarnation="i",
    layout_digest="l",
    state="CLEAN",
    epoch=1,
    version=1,
    seen_epoch=1,
    digest="0",
    reason="",
)
RECORD = PushRecord(
    push_id="1.2.2",
    session="s",
    epoch=1,
    version=2,
    attempt=2,
    step=2,
    catch_up=False,
    deadline_at=0.0,
    writers=1,
    plan_digests={},
    members={},
)


class HalfOpen:
    """An engine of two ranks, of which the second refuses to open."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None:
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[str]:
        self.calls.append(method)
        refusal = json.dumps({"error": "FencedOut", "message": "a lost writer may still write"})
        opened = json.dumps(dataclasses.asdict(DESCRIPTION))
        return [opened, refusal if method == "weightsync_open" else opened]

    async def check_health(self) -> None: ...


@pytest.mark.failure_mode(13)
@pytest.mark.asyncio
async def test_a_push_that_one_rank_refuses_is_aborted_on_the_ranks_that_opened() -> None:
    """Without the abort they stay open for ever: generation goes on over memory that is offered, and no later push is taken."""
    engine = HalfOpen()
    replica = Replica(
        engine=engine,
        contract=SimpleNamespace(transfer=SimpleNamespace(pause_mode="wait", max_version_skew=0)),  # type: ignore[arg-type]
        facts=PodFacts(name="engine-0", uid="u", ip="127.0.0.1", epoch=None),
        ledger=SimpleNamespace(deadline_to_monotonic=lambda _: time.monotonic() + 5),  # type: ignore[arg-type]
    )
    with pytest.raises(FencedOut, match="a lost writer"):
        await replica.open(RECORD)
    assert engine.calls == ["pause", "weightsync_open", "weightsync_abort", "resume"]
    with pytest.raises(FencedOut):
        await asyncio.wait_for(replica.open(RECORD), 5)  # not busy with the one before

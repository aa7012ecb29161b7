"""Pauses of engines whose ranks go on together or not at all, and of those that do not go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.dataplane.test_replica import Scene
from weightsync.errors import DeadlineExceeded
from weightsync.rendezvous.ledger import Ledger
from weightsync.vllm.endpoint import WeightSyncEndpoint
from weightsync.vllm.pauses import Pauses
from weightsync.waiting import Deadline
from weightsync.wire import Decision


class Consensus:
    """An engine that pauses when all its requests have ended, and breaks when it is told to resume before that.

    A mixture of experts with data parallelism does (vllm/v1/engine/core.py): the ranks whose pause is under way raise, the others
    wait for them in a collective.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.requests_ended = asyncio.Event()
        self.resumes = asyncio.Event()
        self.resumes.set()
        self._pausing = 0

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode}")
        self._pausing += 1
        if mode == "abort":
            self.requests_ended.set()
        await self.requests_ended.wait()
        self._pausing -= 1

    async def resume_generation(self) -> None:
        if self._pausing:
            raise RuntimeError("resume_scheduler called while pause is still in flight")
        self.calls.append("resume")
        await self.resumes.wait()


@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_a_pause_that_was_given_up_is_awaited_before_the_ranks_go_on() -> None:
    """1. requests outlast the deadline; 2. to go on waits for them; 3. they end: it goes on, once."""
    engine = Consensus()
    pauses = Pauses(engine, together=True)
    with pytest.raises(DeadlineExceeded, match="requests in flight did not end"):
        await pauses.pause("wait", Deadline(0.05), clear_cache=True)
    resuming = asyncio.create_task(pauses.resume())
    await asyncio.wait({resuming}, timeout=0.2)
    assert engine.calls == ["pause wait"]
    engine.requests_ended.set()
    await asyncio.wait_for(resuming, 10)
    await pauses.resume()
    assert engine.calls == ["pause wait", "resume"]


@pytest.mark.asyncio
async def test_requests_that_hold_a_pause_up_can_be_aborted_and_the_ranks_go_on() -> None:
    engine = Consensus()
    pauses = Pauses(engine, together=True)
    with pytest.raises(DeadlineExceeded):
        await pauses.pause("wait", Deadline(0.05), clear_cache=True)
    await pauses.stop(clear_cache=True)
    await pauses.resume()
    assert engine.calls == ["pause wait", "pause abort", "resume"]


@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_a_push_that_could_not_pause_ends_when_the_ranks_go_on_and_the_next_one_waits_for_that(
    open_ledger: Callable[..., Ledger],
) -> None:
    """1. requests outlast the push: it is refused at its deadline, not when they end; 2. the next push waits while the ranks have
    not gone on; 3. they end: it opens and commits.
    """
    scene, engine = Scene(open_ledger), Consensus()
    scene.engine._staged = True  # an abort leaves it whole: nothing was written
    scene.replica._pauses = Pauses(engine, together=True)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(scene.replica.open(scene.begin(timeout_s=0.3)), 10)
    record = scene.begin()
    opening = asyncio.create_task(scene.replica.open(record))
    await asyncio.wait({opening}, timeout=0.3)
    assert (opening.done(), engine.calls) == (False, ["pause wait"])
    engine.requests_ended.set()
    await asyncio.wait_for(opening, 10)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert engine.calls == ["pause wait", "resume", "pause wait", "resume"]
    assert scene.replica.view.version == record.version


@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_an_engine_of_which_a_rank_does_not_go_on_is_neither_ready_nor_live(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. the version is committed, and a rank does not go on: readiness and liveness say so; 2. nobody tells it again; 3. it goes
    on late: both are well again at once, and the next push is not held up.
    """
    monkeypatch.setattr("weightsync.vllm.pauses.RESUME_S", 0.2)
    scene, engine = Scene(open_ledger), Consensus()
    engine.requests_ended.set()
    engine.resumes.clear()
    scene.replica._pauses = Pauses(engine, together=True)
    record = scene.begin()
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    with pytest.raises(DeadlineExceeded):
        await scene.concluded()
    assert scene.replica.refusal() == "the engine's ranks did not all resume within 0.2 s"
    endpoint = WeightSyncEndpoint()
    endpoint._replica, endpoint._engine = scene.replica, SimpleNamespace(check_health=scene.engine.check_health)
    assert (await endpoint._live()).status_code == 503
    with pytest.raises(DeadlineExceeded):
        await scene.replica._resume()
    assert engine.calls.count("resume") == 1
    engine.resumes.set()
    await asyncio.wait_for(scene.replica._pauses._resuming, 10)
    assert (scene.replica.refusal(), (await endpoint._live()).status_code) == ("", 200)
    record = scene.begin()
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.replica.view.version == record.version


@pytest.mark.failure_mode(57)
@pytest.mark.asyncio
async def test_a_request_without_end_does_not_keep_the_ranks_paused_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause that was given up waits for it; after `RESUME_S` it is aborted, and the ranks go on."""
    monkeypatch.setattr("weightsync.vllm.pauses.RESUME_S", 0.2)
    engine = Consensus()
    pauses = Pauses(engine, together=True)
    with pytest.raises(DeadlineExceeded):
        await pauses.pause("wait", Deadline(0.05), clear_cache=True)
    await asyncio.wait_for(pauses.resume(), 10)
    assert engine.calls == ["pause wait", "pause abort", "resume"]

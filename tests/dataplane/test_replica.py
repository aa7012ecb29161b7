"""A replica's side of a push with a ledger that is real and an engine that notes what it is asked: order, pauses, verdicts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.dataplane.ledger_makers import begin
from weightsync.config import (
    Contract,
    EndpointSection,
    FabricSection,
    ModelExpressSection,
    ModelSection,
    PodFacts,
    RedisSection,
    TransferSection,
)
from weightsync.errors import FencedOut, LedgerUnavailable
from weightsync.receiver import Description
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord, Verdict
from weightsync.vllm.replica import Replica, View
from weightsync.wire import Decision, ReplicaState

STAGED: dict[str, Any] = {"commit": "staged", "staging": "device"}


def rank_of(number: int, **changes: Any) -> Description:
    fields: dict[str, Any] = {
        "rank": number,
        "incarnation": f"i{number}",
        "layout_digest": "layout",
        "state": "CLEAN",
        "epoch": 0,
        "version": 0,
        "seen_epoch": 0,
        "digest": "00",
        "reason": "",
        "torn": False,
        "push_id": "",
        "copy_seconds": 0.0,
    }
    return Description(**(fields | changes))


class FakeEngine:
    """vLLM's client with two ranks; `calls` is what happened, in order."""

    def __init__(self, *, staged: bool) -> None:
        self.calls: list[str] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.told = asyncio.Event()
        """To pause."""
        self.refuses: set[int] = set()
        """Ranks that find their bytes wrong."""
        self.fences: set[int] = set()
        """Ranks that refuse to open."""
        self._staged = staged
        self._ranks = [rank_of(0), rank_of(1)]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode}{' and drop the cache' if clear_cache else ''}")
        self.told.set()
        if mode != "abort":
            await self.idle.wait()
        self.calls.append("idle")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def check_health(self) -> None: ...

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[str]:
        what = method.removeprefix("weightsync_")
        if what not in ("describe", "start"):
            self.calls.append(what)
        if what == "open":
            record = PushRecord.from_json(args[0])
            self._record = record
            self._ranks = [
                dataclasses.replace(r, state="OPEN" if r.rank in self.refuses else "VERIFIED", push_id=record.push_id)
                for r in self._ranks
            ]
        if what == "commit":
            held = {"state": "CLEAN", "epoch": self._record.epoch, "version": self._record.version, "torn": False}
            self._ranks = [dataclasses.replace(r, **held) for r in self._ranks]
        if what == "abort":
            torn = not self._staged
            state, reason = ("DIRTY", args[1]) if torn else ("CLEAN", "")
            self._ranks = [dataclasses.replace(r, state=state, torn=torn, reason=reason) for r in self._ranks]
        answers = [dataclasses.asdict(rank) for rank in self._ranks]
        if what == "open":
            answers = [{"error": "FencedOut", "message": "no"} if a["rank"] in self.fences else a for a in answers]
        return [json.dumps(answer) for answer in answers]


class Scene:
    """One replica, its engine, and the ledger as a trainer sees it."""

    def __init__(self, open_ledger: Callable[..., Ledger], **transfer: Any) -> None:
        self.ledger = open_ledger()
        self.engine = FakeEngine(staged=transfer.get("commit") == "staged")
        contract = Contract(
            session="s1",
            name="test",
            model=ModelSection(path="/none"),
            redis=RedisSection(host="127.0.0.1"),
            model_express=ModelExpressSection(address="none:1"),
            endpoint=EndpointSection(token_file="/none"),
            fabric=FabricSection(profile="tcp", transports=("tcp",)),
            transfer=TransferSection(**transfer),
        )
        facts = PodFacts(name="engine-0", uid="uid", ip="127.0.0.1", epoch=None)
        self.replica = Replica(engine=self.engine, contract=contract, facts=facts, ledger=open_ledger(retry_s=0.3))
        self.replica.view = View(ranks=(rank_of(0), rank_of(1)), committed=0)
        self.epoch = self.ledger.open_epoch()

    def begin(self, timeout_s: float = 30.0) -> PushRecord:
        return begin(self.ledger, self.epoch, timeout_s=timeout_s)

    async def concluded(self) -> None:
        """Until the push that was opened has ended here."""
        await asyncio.wait_for(asyncio.gather(*self.replica._tasks), 20)


@pytest.mark.failure_mode(16)
@pytest.mark.parametrize(("policy", "pause"), [("reset", "pause wait and drop the cache"), ("keep", "pause wait")])
@pytest.mark.asyncio
async def test_a_staged_push_pauses_for_its_commit_only(
    open_ledger: Callable[..., Ledger], policy: str, pause: str
) -> None:
    scene = Scene(open_ledger, **STAGED, prefix_cache=policy)
    record = scene.begin()
    await scene.replica.open(record)
    assert scene.engine.calls == ["open"]
    assert scene.replica.refusal() == ""
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.engine.calls == ["open", pause, "idle", "commit", "resume"]
    (applied,) = scene.ledger.applied(record.push_id).values()
    assert applied.pause_seconds < 1


@pytest.mark.failure_mode(12)
@pytest.mark.failure_mode(14)
@pytest.mark.failure_mode(56)
@pytest.mark.asyncio
async def test_in_place_memory_is_offered_once_the_engine_is_idle_not_once_it_is_told_to_pause(
    open_ledger: Callable[..., Ledger],
) -> None:
    """vLLM calls itself paused as soon as the flag is set: only the awaited pause says that the device is idle."""
    scene = Scene(open_ledger)
    scene.engine.idle.clear()
    record = scene.begin()
    opening = asyncio.create_task(scene.replica.open(record))
    await asyncio.wait_for(scene.engine.told.wait(), 10)
    assert scene.engine.calls == ["pause wait and drop the cache"]
    scene.engine.idle.set()
    await opening
    assert scene.engine.calls == ["pause wait and drop the cache", "idle", "open"]
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.engine.calls[-2:] == ["commit", "resume"]


@pytest.mark.failure_mode(13)
@pytest.mark.parametrize("transfer", [{}, STAGED])
@pytest.mark.asyncio
async def test_no_rank_commits_where_one_has_not_verified(
    open_ledger: Callable[..., Ledger], transfer: dict[str, Any]
) -> None:
    """A quorum went on without this replica: staged it serves what it had, in place it serves nothing.

    Without the look at all ranks in `Replica._commit`, rank 0 applies the version and rank 1 does not.
    """
    scene = Scene(open_ledger, **transfer)
    scene.engine.refuses = {1}
    record = scene.begin()
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert "commit" not in scene.engine.calls
    if transfer:
        assert scene.engine.calls == ["open", "abort"]
        assert scene.replica.refusal() == ""
    else:
        assert scene.engine.calls[-3:] == ["abort", "pause abort and drop the cache", "idle"]
        assert "it was committed without engine-0: rank 0 is VERIFIED; rank 1 is OPEN" in scene.replica.refusal()
    assert scene.ledger.applied(record.push_id) == {}


@pytest.mark.failure_mode(13)
@pytest.mark.asyncio
async def test_a_push_that_one_rank_refuses_is_aborted_on_all_and_the_next_one_opens(
    open_ledger: Callable[..., Ledger],
) -> None:
    """Without the abort the rank that opened refuses every later push: one is open already."""
    scene = Scene(open_ledger, **STAGED)
    scene.engine.fences = {1}
    with pytest.raises(FencedOut, match="no"):
        await scene.replica.open(scene.begin())
    assert scene.engine.calls == ["open", "abort"]
    scene.engine.fences = set()
    record = scene.begin()
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.replica.view.version == record.version


@pytest.mark.failure_mode(58)
@pytest.mark.parametrize("decision", [Decision.COMMIT, None])
@pytest.mark.asyncio
async def test_the_coordinator_may_die_before_or_after_it_has_decided(
    open_ledger: Callable[..., Ledger], decision: Decision | None
) -> None:
    """A decision that fell counts, whenever it is seen; where none fell, the replica takes it at the deadline."""
    scene = Scene(open_ledger, **STAGED)
    record = scene.begin(timeout_s=0.5)
    await scene.replica.open(record)
    if decision is not None:
        scene.ledger.decide(record.push_id, decision)
    await scene.concluded()
    verdict = scene.ledger.decision(record.push_id)
    assert verdict is not None
    if decision is Decision.COMMIT:
        assert scene.replica.view.version == record.version
    else:
        assert verdict.decision is Decision.ABORT
        assert "no decision within" in verdict.reason
        assert (scene.replica.view.version, scene.engine.calls) == (0, ["open", "abort"])


@pytest.mark.failure_mode(58)
@pytest.mark.asyncio
async def test_a_staged_replica_serves_on_without_a_ledger_and_applies_what_it_then_says(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. committed, and the ledger is gone before the replica has read it; 2. past the deadline it serves, and has aborted nothing;
    3. the ledger is back: the version is applied. In place it would have to assume the worst at step 2.
    """
    scene = Scene(open_ledger, **STAGED)
    away, asked_late = True, asyncio.Event()
    loop, ledger = asyncio.get_running_loop(), scene.replica._ledger
    decide = ledger.decide

    def ask(*question: Any) -> Verdict:
        """What `decide` and `decision` come to when Redis does not answer."""
        if not away:
            return decide(*question)
        if len(question) > 1:  # past the deadline it asks for an abort
            loop.call_soon_threadsafe(asked_late.set)
        raise LedgerUnavailable("Redis is gone")

    monkeypatch.setattr(ledger, "decide", ask)
    monkeypatch.setattr(ledger, "decision", ask)
    record = scene.begin(timeout_s=0.5)
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await asyncio.wait_for(asked_late.wait(), 10)
    assert (scene.engine.calls, scene.replica.refusal()) == (["open"], "")
    away = False
    await scene.concluded()
    assert scene.replica.view.version == record.version


@pytest.mark.failure_mode(57)
def test_ranks_of_two_versions_are_dirty_together() -> None:
    mixed = View(ranks=(rank_of(0, epoch=1, version=2), rank_of(1, epoch=1, version=1)), committed=2)
    assert mixed.state is ReplicaState.DIRTY
    assert mixed.torn
    assert mixed.refusal(5) == "weights are torn"


def test_a_replica_that_is_about_to_switch_lets_requests_wait() -> None:
    behind = View(ranks=(rank_of(0),), committed=1)
    assert behind.refusal(0) == "holds version 0, version 1 is committed"
    assert View(ranks=(rank_of(0, state="VERIFIED"),), committed=1).refusal(0) == ""
    torn = View(ranks=(rank_of(0, state="VERIFIED", torn=True, reason="why"),), committed=1)
    assert torn.refusal(0) == "why"


@pytest.mark.asyncio
async def test_requests_that_outlast_the_deadline_of_a_committed_push_are_aborted(
    open_ledger: Callable[..., Ledger],
) -> None:
    scene = Scene(open_ledger, **STAGED)
    scene.engine.idle.clear()
    record = scene.begin(timeout_s=1.0)
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.engine.calls == [
        "open",
        "pause wait and drop the cache",
        "pause abort and drop the cache",
        "idle",
        "commit",
        "resume",
    ]

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
from weightsync.vllm.calls import Calls
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
        "lends": True,
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
        self.describes = asyncio.Event()
        """Whether ranks say what they hold; else the question waits, as behind a step of the engine's loop."""
        self.describes.set()
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

    def change(self, **fields: Any) -> None:
        """What both ranks will say of themselves."""
        self._ranks = [dataclasses.replace(rank, **fields) for rank in self._ranks]

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[str]:
        what = method.removeprefix("weightsync_")
        if what == "describe":
            await self.describes.wait()
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
    """A quorum went on without this replica: staged it keeps what it had and is behind, in place it holds nothing.

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
        assert scene.replica.refusal() == "holds version 0, version 1 is committed"
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

    def late(*question: Any) -> Verdict:
        """What `decide` comes to when Redis does not answer: past the deadline the replica asks for an abort."""
        if not away:
            return decide(*question)
        loop.call_soon_threadsafe(asked_late.set)
        raise LedgerUnavailable("Redis is gone")

    def wait(*_: Any) -> Verdict:
        raise LedgerUnavailable("Redis is gone")

    monkeypatch.setattr(ledger, "decide", late)
    monkeypatch.setattr(ledger, "await_decision", wait)
    record = scene.begin(timeout_s=0.5)
    await scene.replica.open(record)
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    await asyncio.wait_for(asked_late.wait(), 10)
    assert (scene.engine.calls, scene.replica.refusal()) == (["open"], "")
    away = False
    await scene.concluded()
    assert scene.replica.view.version == record.version


@pytest.mark.failure_mode(46)
@pytest.mark.asyncio
async def test_a_replica_that_leaves_is_no_member_takes_nothing_and_does_not_come_back(
    open_ledger: Callable[..., Ledger],
) -> None:
    scene = Scene(open_ledger)
    heartbeat = scene.replica._heartbeat.start()
    assert heartbeat.wait_first(10)
    assert list(scene.ledger.live_members()) == ["engine-0"]
    await asyncio.to_thread(scene.replica.leave)
    assert (scene.ledger.members(), scene.ledger.replica_statuses()) == ({}, {})
    assert "ending" in scene.replica.refusal()
    with pytest.raises(FencedOut, match="engine-0 is ending: it takes part in no push"):
        await scene.replica.open(scene.begin())
    with pytest.raises(FencedOut, match="it takes part in no push"):
        await scene.replica.lend(scene.begin())
    heartbeat.poke()
    assert not heartbeat._thread.is_alive()
    scene.replica.leave()
    assert scene.ledger.members() == {}


@pytest.mark.asyncio
async def test_a_replica_leaves_without_a_ledger_too(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease says so later. And one whose engine still loads has nothing to leave."""
    scene, asked = Scene(open_ledger), []

    def away(*question: str) -> bool:
        asked.append(question)
        raise LedgerUnavailable("Redis is gone")

    monkeypatch.setattr(Ledger, "leave", away)
    await asyncio.to_thread(scene.replica.leave)
    assert (len(asked), "ending" in scene.replica.refusal()) == (1, True)
    loading = Scene(open_ledger)
    loading.replica.view = View()
    loading.replica.leave()
    assert len(asked) == 1


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


@pytest.mark.parametrize("transfer", [STAGED, {}])
@pytest.mark.asyncio
async def test_a_heartbeat_between_the_decision_and_the_switch_refuses_no_request(
    open_ledger: Callable[..., Ledger], transfer: dict[str, Any]
) -> None:
    """1. the push is committed, and a heartbeat reads so before the ranks are asked what they hold; 2. nothing is refused, and
    where a rank lacks the version everything is, from the moment that this is known.
    """
    scene = Scene(open_ledger, **transfer, max_version_skew=0)
    record = scene.begin()
    scene.engine.describes.clear()
    await scene.replica.open(record)
    scene.engine.change(state="OPEN")
    scene.replica.view = dataclasses.replace(scene.replica.view, ranks=tuple(scene.engine._ranks))
    scene.ledger.decide(record.push_id, Decision.COMMIT)
    scene.replica._beat()
    assert scene.replica.refusal() == ""
    scene.engine.describes.set()
    await scene.concluded()
    assert "committed" in scene.replica.refusal()


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


def repair_of(scene: Scene, timeout_s: float = 30.0) -> PushRecord:
    """A repair of the scene's replica by engine-1, begun in the ledger."""
    source = dataclasses.replace(scene.replica.member(), replica="engine-1", incarnation="healthy.1+healthy.1")
    begun = scene.ledger.begin_repair(
        target=scene.replica.member(), source=source, head=scene.ledger.head(), timeout_s=timeout_s, step=0
    )
    assert begun is not None
    return begun[0]


@pytest.mark.failure_mode(19)
@pytest.mark.asyncio
async def test_a_push_of_a_newer_version_ends_a_repair_and_does_not_wait_for_its_deadline(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. a repair to version 1 is open; 2. a push of version 2 comes: the repair is aborted, its lender gets a moment to end, then
    the push opens.

    Seen to fail without the part about repairs in `Replica._supersede`: the push waits for the repair's deadline, here 30 s.
    """
    monkeypatch.setattr("weightsync.repair.SETTLE_S", 0.2)
    scene = Scene(open_ledger, **STAGED)
    scene.ledger.decide(scene.begin().push_id, Decision.COMMIT)
    repair = repair_of(scene)
    await scene.replica.open(repair)
    push = scene.begin()
    await asyncio.wait_for(scene.replica.open(push), 10)
    verdict = scene.ledger.decision(repair.push_id)
    assert verdict is not None
    assert (verdict.decision, verdict.reason) == (Decision.ABORT, "superseded by version 2 of epoch 1")
    scene.ledger.decide(push.push_id, Decision.COMMIT)
    await scene.concluded()
    assert (scene.replica.view.version, scene.engine.calls[:3]) == (2, ["open", "abort", "open"])


@pytest.mark.asyncio
async def test_a_replica_that_starts_is_neither_paused_nor_measured(open_ledger: Callable[..., Ledger]) -> None:
    """A predecessor's lease may still live when the trainer asks. Seen to fail without `Replica._require_offered`."""
    scene = Scene(open_ledger)
    scene.replica.view = View()
    with pytest.raises(FencedOut, match="engine-0 is starting"):
        await scene.replica.open(scene.begin())
    with pytest.raises(FencedOut, match="engine-0 is starting"):
        await scene.replica.verify()
    assert scene.engine.calls == []


@pytest.mark.failure_mode(19)
@pytest.mark.asyncio
async def test_a_repair_does_not_queue_behind_a_push(open_ledger: Callable[..., Ledger]) -> None:
    """It would stand before the next push. Seen to fail with a `Replica.open` that lets it wait: for the push's deadline."""
    scene = Scene(open_ledger, **STAGED)
    scene.ledger.decide(scene.begin().push_id, Decision.COMMIT)
    repair = repair_of(scene)
    push = scene.begin()
    await scene.replica.open(push)
    with pytest.raises(FencedOut, match="a push is open on engine-0"):
        await asyncio.wait_for(scene.replica.open(repair), 10)
    scene.ledger.decide(push.push_id, Decision.COMMIT)
    await scene.concluded()
    assert scene.replica.view.version == push.version


@pytest.mark.failure_mode(28)
@pytest.mark.asyncio
async def test_a_replica_that_is_being_repaired_does_not_serve(open_ledger: Callable[..., Ledger]) -> None:
    """1. behind and open for a repair: refused; 2. the version is committed to it: serves."""
    scene = Scene(open_ledger)
    push = scene.begin()
    scene.ledger.decide(push.push_id, Decision.COMMIT)
    scene.replica.view = dataclasses.replace(scene.replica.view, committed=1)
    assert scene.replica.late
    repair = repair_of(scene)
    await scene.replica.open(repair)
    assert not scene.replica.late
    scene.engine.change(state="OPEN")
    await scene.replica._rpc("weightsync_describe")
    assert scene.replica.refusal() == "holds version 0, version 1 is committed"
    scene.engine.change(state="VERIFIED")
    scene.ledger.decide(repair.push_id, Decision.COMMIT)
    await scene.concluded()
    assert (scene.replica.view.version, scene.replica.refusal(), scene.replica.late) == (1, "", False)


@pytest.mark.asyncio
async def test_only_what_is_whole_and_asked_for_is_lent(open_ledger: Callable[..., Ledger]) -> None:
    """Then no rank is told to write, so that whoever asked need not fear late bytes."""
    scene = Scene(open_ledger)
    mine = dataclasses.replace(repair_of(scene), source="engine-0", members={"engine-1": "late.1"})
    await scene.replica.lend(mine)
    assert scene.engine.calls == ["lend"]
    for wrong in (
        dataclasses.replace(mine, source="engine-9"),
        dataclasses.replace(mine, version=3),
        dataclasses.replace(mine, session="another"),
    ):
        with pytest.raises(FencedOut, match="engine-0 is CLEAN at"):
            await scene.replica.lend(wrong)
    for change in ({"state": "OPEN"}, {"state": "DIRTY", "torn": True}, {"lends": False}):
        scene.replica.view = View(ranks=(rank_of(0), rank_of(1, **change)), committed=0)
        with pytest.raises(FencedOut, match="engine-0 is"):
            await scene.replica.lend(mine)
    assert scene.engine.calls == ["lend"]


@pytest.mark.asyncio
async def test_a_rank_that_stands_still_is_told_by_readiness_and_liveness_until_it_answers(
    open_ledger: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own health check passes beside a frozen worker: nobody else would restart the pod."""
    scene = Scene(open_ledger)
    scene.engine.describes.clear()
    asking = asyncio.create_task(scene.replica._rpc("weightsync_describe"))
    await asyncio.sleep(0)
    assert scene.replica.stuck == ""
    monkeypatch.setattr("weightsync.vllm.calls.ANSWER_S", 0.0)
    assert scene.replica.refusal() == "the engine's ranks have not all answered weightsync_describe for 0 s"
    scene.engine.describes.set()
    await asking
    assert (scene.replica.stuck, scene.replica.refusal()) == ("", "")


@pytest.mark.parametrize(("method", "patient"), [("weightsync_commit", True), ("weightsync_open", False)])
@pytest.mark.asyncio
async def test_patience_with_what_takes_as_long_as_the_weights_are_large(
    method: str, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 GB of weights in a rank are granted 1000 s besides; what moves none of them is not."""
    monkeypatch.setattr("weightsync.vllm.calls.ANSWER_S", 0.0)
    answered = asyncio.Event()

    class Silent:
        async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[str]:
            await answered.wait()
            return []

    held = 200_000_000_000
    calls = Calls(Silent(), lambda: held)
    asking = asyncio.create_task(calls.ask(method))
    await asyncio.sleep(0)
    assert (calls.stuck == "") is patient
    held = 0
    assert f"have not all answered {method}" in calls.stuck
    answered.set()
    await asking
    assert calls.stuck == ""

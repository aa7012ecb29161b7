"""An engine rank in pushes over real NIXL agents and a real ledger: what lands where, what a verdict does, what an abort leaves."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.dataplane.push_makers import REPLICA, SHAPES, Bench
from tests.fixtures.fleet import until
from weightsync import verify
from weightsync.errors import FencedOut, WeightSyncError
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import WriterReport
from weightsync.transport import Agent, Region, Transfer, TransferState
from weightsync.wire import Decision, ReplicaState

STAGED = {"commit": "staged", "staging": "device"}
Make = Callable[..., Bench]


@pytest.fixture
def make(open_ledger: Callable[..., Ledger]) -> Iterator[Make]:
    made: list[Bench] = []

    def make_one(**options: Any) -> Bench:
        made.append(Bench(open_ledger, **options))
        return made[-1]

    yield make_one
    for bench in made:
        bench.close()


@pytest.mark.failure_mode(10)
@pytest.mark.failure_mode(15)
@pytest.mark.parametrize("transfer", [{}, STAGED, {"commit": "staged", "staging": "pinnedHost"}])
def test_each_push_is_in_live_memory_once_committed_and_addresses_stay(make: Make, transfer: dict[str, str]) -> None:
    bench = make(**transfer)
    addresses = {name: tensor.data_ptr() for name, tensor in bench.params.items()}
    trainer = bench.trainer()
    for version in (1, 2, 3):
        record = bench.push(trainer, version)
        described = bench.receiver.describe()
        assert (described.state, described.version, described.torn) == (ReplicaState.CLEAN, version, False)
        assert bench.holds(version)
        assert described.digest == verify.to_hex(sum(verify.digest_tensor(n, t) for n, t in bench.params.items()))
        (vote,) = bench.ledger.votes(record.push_id).values()
        assert (vote.ok, vote.digest) == (True, described.digest)
        assert vote.bytes == 2 * sum(rows * width for rows, width in SHAPES.values())
        assert bench.receiver.verify().state == ReplicaState.CLEAN
    assert {name: tensor.data_ptr() for name, tensor in bench.params.items()} == addresses
    assert bench.refreshed == 3


@pytest.mark.parametrize("mode", ["full", "sampled", "off"])
def test_two_ranks_that_convert_group_by_group_bring_a_whole_version(make: Make, mode: str) -> None:
    bench = make(verify=mode, **STAGED)
    first, second = [bench.trainer(ranks=2, rank=rank) for rank in range(2)]
    for version in (1, 2):
        record = bench.begin(first, writers=2)
        bench.begin(second, writers=2)  # it plans, too
        bench.receiver.open(record)
        first.convert_and_write(record, version)
        second.convert_and_write(record, version)
        votes = until("the engine has voted", lambda push_id=record.push_id: bench.ledger.votes(push_id), 15)
        assert [vote.ok for vote in votes.values()] == [True]
        bench.ledger.decide(record.push_id, Decision.COMMIT)
        bench.receiver.commit(record.push_id)
        assert bench.holds(version)


@pytest.mark.failure_mode(35)
def test_a_push_is_one_transfer_a_group_and_the_next_push_posts_it_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is small enough to be one group is one transfer of many writes, prepared once for all pushes.

    Seen to fail with a `Writer.learn` that connects to every member at each push.
    """
    prepared: list[int] = []
    prepare = Agent.prepare

    def counted(agent: Agent, peer: str, local: Sequence[Region], remote: Sequence[Region]) -> Transfer:
        prepared.append(len(local))
        return prepare(agent, peer, local, remote)

    monkeypatch.setattr(Agent, "prepare", counted)
    bench = make()
    trainer = bench.trainer()
    for version in (1, 2, 3):
        bench.push(trainer, version)
        assert bench.holds(version)
    assert len(prepared) == 1
    assert prepared[0] >= len(SHAPES)


@pytest.mark.failure_mode(12)
@pytest.mark.failure_mode(20)
def test_staged_bytes_touch_no_live_tensor_before_the_commit(make: Make) -> None:
    """1. version 2 has landed and is verified: live memory is version 1; 2. after the commit it is version 2, and shares no memory
    with staging, into which version 3 then lands.
    """
    bench = make(**STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    record = bench.deliver(trainer, 2)
    assert bench.receiver.describe().state == ReplicaState.VERIFIED
    assert bench.holds(1)
    bench.ledger.decide(record.push_id, Decision.COMMIT)
    bench.receiver.commit(record.push_id)
    assert bench.holds(2)
    bench.deliver(trainer, 3)
    assert bench.holds(2)


@pytest.mark.failure_mode(58)
def test_a_commit_may_be_repeated(make: Make) -> None:
    """A replica whose other rank failed asks all ranks again: one that has applied must not copy a later push's bytes."""
    bench = make(**STAGED)
    trainer = bench.trainer()
    record = bench.push(trainer, 1)
    held = bench.receiver.describe()
    bench.deliver(trainer, 2)
    assert bench.receiver.commit(record.push_id).version == held.version == 1
    assert bench.holds(1)


@pytest.mark.failure_mode(13)
def test_a_commit_that_breaks_off_leaves_the_rank_dirty_until_the_next_push(make: Make) -> None:
    """What an engine derives from its weights could not be made anew: live memory is a mixture.

    Seen to fail with a `Receiver.commit` that says torn only of what it measured: the abort leaves CLEAN.
    """
    bench = make(**STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    record = bench.deliver(trainer, 2)
    bench.ledger.decide(record.push_id, Decision.COMMIT)

    def breaks() -> None:
        raise RuntimeError("out of memory")

    refresh, bench.receiver._refresh = bench.receiver._refresh, breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.receiver.commit(record.push_id)
    described = bench.receiver.abort(record.push_id, "it broke off")
    assert (described.state, described.torn) == (ReplicaState.DIRTY, True)
    bench.receiver._refresh = refresh
    bench.push(trainer, 3)
    assert bench.receiver.describe().state == ReplicaState.CLEAN
    assert bench.holds(3)


def test_what_was_not_verified_is_not_committed(make: Make) -> None:
    bench = make(**STAGED)
    trainer = bench.trainer()
    record = bench.begin(trainer)
    bench.receiver.open(record)
    with pytest.raises(WeightSyncError, match="is committed but this rank is OPEN: not verified"):
        bench.receiver.commit(record.push_id)
    assert bench.receiver.abort(record.push_id, "test").state == ReplicaState.CLEAN


@pytest.mark.failure_mode(13)
def test_a_staged_abort_serves_on_what_was_there(make: Make) -> None:
    bench = make(**STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    record = bench.deliver(trainer, 2)
    incarnation = bench.receiver.incarnation
    described = bench.receiver.abort(record.push_id, "the coordinator said so")
    assert (described.state, described.version, described.torn) == (ReplicaState.CLEAN, 1, False)
    assert (
        described.incarnation == incarnation
    )  # its writer has said that all transfers ended: nothing needs to be retired
    assert bench.holds(1)
    assert bench.push(trainer, 3).version == 3
    assert bench.holds(3)


@pytest.mark.failure_mode(13)
@pytest.mark.failure_mode(49)
def test_an_abort_in_place_leaves_dirty_until_a_push_or_a_catch_up_repairs_it(make: Make) -> None:
    """1. an abort after the bytes landed: DIRTY; 2. its own version again repairs it, as a catch-up."""
    bench = make()
    trainer = bench.trainer()
    bench.push(trainer, 1)
    record = bench.deliver(trainer, 2)
    described = bench.receiver.abort(record.push_id, "no quorum")
    assert (described.state, described.version, described.torn) == (ReplicaState.DIRTY, 1, True)
    assert "no quorum" in described.reason
    record = bench.begin(trainer, catch_up=True)
    assert record.version == 1
    trainer.fill(1)
    trainer.writer.measure(record)
    assert bench.receiver.open(record).torn  # it must not serve while it is being repaired
    trainer.write(record)
    until("the engine has voted", lambda: bench.ledger.votes(record.push_id), 15)
    bench.ledger.decide(record.push_id, Decision.COMMIT)
    described = bench.receiver.commit(record.push_id)
    assert (described.state, described.torn) == (ReplicaState.CLEAN, False)
    assert bench.holds(1)


@pytest.mark.failure_mode(49)
def test_a_rank_at_the_committed_version_takes_a_catch_up_to_it(make: Make) -> None:
    """Of two ranks of a replica one may have applied before the other failed: the repair is for both.

    Without `record.catch_up` in `Receiver._check_fence` the rank that is current refuses, and the replica stays DIRTY for ever.
    """
    bench = make(**STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    record = bench.deliver(trainer, 1, catch_up=True)
    bench.ledger.decide(record.push_id, Decision.COMMIT)
    assert bench.receiver.commit(record.push_id).state == ReplicaState.CLEAN


@pytest.mark.failure_mode(47)
@pytest.mark.parametrize("revocation", ["agent", "process"])
def test_a_silent_writers_arena_is_retired(make: Make, revocation: str) -> None:
    """1. a writer does not say that its transfers ended; 2. the abort moves staging: another address and agent, the old one sealed;
    3. the late writer fails; 4. a new push lands in the new arena.

    Without `StagingArena.retire` the address of step 2 is the old one, which a writer on the same host can still reach, and without
    `Receiver._settle` the write of step 3 is DONE.
    """
    bench = make(revocation=revocation, **STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    old = bench.receiver._staging
    assert old is not None
    address = old.buffer.data_ptr()
    record = bench.begin(trainer)
    trainer.fill(2)
    trainer.writer.measure(record)
    before = bench.receiver.open(record).incarnation
    described = bench.receiver.abort(record.push_id, "a writer fell silent")
    assert (described.state, described.version) == (ReplicaState.CLEAN, 1)
    assert described.incarnation != before
    assert bench.receiver._staging is not None
    assert bench.receiver._staging.buffer.data_ptr() != address
    written = trainer.write(record)
    assert written.failed.keys() == {REPLICA}
    assert bench.holds(1)
    until("the new agent is published", lambda: any(described.incarnation in key for key in bench.book.sources), 10)
    bench.push(bench.trainer(), 3)
    assert bench.holds(3)


@pytest.mark.failure_mode(48)
def test_in_place_memory_is_not_offered_again_while_only_the_writers_death_would_end_its_access(make: Make) -> None:
    bench = make(revocation="process")
    trainer = bench.trainer()
    record = bench.begin(trainer)
    bench.receiver.open(record)
    bench.receiver.abort(record.push_id, "a writer fell silent")
    again = bench.begin(trainer)
    with pytest.raises(FencedOut, match=r"writers \[0\] of push .* have not said"):
        bench.receiver.open(again)
    bench.ledger.report_writer(record.push_id, WriterReport(rank=0, ok=True, in_flight=(REPLICA,)))
    with pytest.raises(FencedOut, match="have not said"):
        bench.receiver.open(again)
    bench.ledger.report_writer(record.push_id, WriterReport(rank=0, ok=True))
    assert bench.receiver.open(again).state == ReplicaState.OPEN
    bench.receiver.abort(again.push_id, "test")


@pytest.mark.failure_mode(10)
@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_a_changed_byte_is_voted_against_where_it_is_measured(
    make: Make, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer whose digests are of other bytes than it sent stands for bytes that changed on their way."""
    bench = make(verify=mode, **STAGED)
    trainer = bench.trainer()
    record = bench.begin(trainer)
    trainer.fill(1)
    trainer.writer.measure(record)
    chosen = verify.chosen_names(bench.params, mode=mode, push_id=record.push_id)
    trainer.writer._slots.buffer.add_(1)
    bench.receiver.open(record)
    trainer.write(record)
    votes = until("the engine has voted", lambda: bench.ledger.votes(record.push_id), 15)
    (vote,) = votes.values()
    assert (vote.ok, vote.reason[:1]) == (False, str(len(chosen)))
    assert "differ from what was sent" in vote.reason
    assert len(chosen) == (4 if mode == "full" else 1)
    bench.receiver.abort(record.push_id, "voted no")


@pytest.mark.failure_mode(11)
def test_off_measures_nothing_and_still_counts_bytes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(verify="off", **STAGED)
    trainer = bench.trainer()
    bench.push(trainer, 1)
    assert bench.holds(1)
    assert bench.receiver.describe().digest == verify.to_hex(0)
    last_word = trainer.writer._last_word
    monkeypatch.setattr(trainer.writer, "_last_word", lambda *a: dataclasses.replace(last_word(*a), bytes_written=4))
    record = bench.deliver(trainer, 2)
    (vote,) = bench.ledger.votes(record.push_id).values()
    assert (vote.ok, "wrote 4 bytes" in vote.reason) == (False, True)
    bench.receiver.abort(record.push_id, "voted no")


def test_a_copy_that_lost_something_leaves_the_rank_dirty(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(**STAGED)
    trainer = bench.trainer()
    record = bench.deliver(trainer, 1)
    bench.ledger.decide(record.push_id, Decision.COMMIT)
    monkeypatch.setattr("weightsync.receiver.copy_all", lambda sources, targets: None)
    described = bench.receiver.commit(record.push_id)
    assert (described.state, described.version, described.torn) == (ReplicaState.DIRTY, 0, True)
    assert "came out of the copy changed" in described.reason


def test_an_abort_while_the_bytes_are_measured_does_not_hang(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that measures wants the receiver's lock when it is done: joining it under that lock was a deadlock."""
    bench = make(**STAGED)
    trainer = bench.trainer()
    record = bench.begin(trainer)
    trainer.fill(1)
    trainer.writer.measure(record)
    bench.receiver.open(record)
    reception = bench.receiver._reception
    assert reception is not None
    checked = reception._on_checked

    told: list[bool] = []
    measured = threading.Event()

    def slow(*found: Any) -> bool:
        measured.set()
        until("the abort waits for this thread", lambda: reception.stopped, 10)
        told.append(checked(*found))
        return told[-1]

    monkeypatch.setattr(reception, "_on_checked", slow)
    trainer.write(record)
    assert measured.wait(10)
    assert bench.receiver.abort(record.push_id, "at once").state == ReplicaState.CLEAN
    assert told == [False]
    assert bench.ledger.votes(record.push_id) == {}


def test_bytes_that_may_still_move_keep_the_arena_as_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """1. a replica is lost in the middle of its transfer: the write returns and says so; 2. converting the next version waits until
    the transfer has ended. Without `Writer._wait_stuck` it would rewrite what is being sent.
    """
    bench = make(**STAGED)
    trainer = bench.trainer()
    record = bench.begin(trainer)
    trainer.fill(1)
    trainer.writer.measure(record)
    bench.receiver.open(record)
    polls = iter([TransferState.IN_FLIGHT] * 40)
    poll = Transfer.poll

    def late(transfer: Transfer) -> TransferState:
        return next(polls, None) or poll(transfer)

    monkeypatch.setattr(Transfer, "poll", late)
    written = trainer.write(record, lost=frozenset({REPLICA}))
    assert (written.bytes, written.in_flight, written.failed.keys()) == (0, (REPLICA,), {REPLICA})
    trainer.fill(2)
    assert next(polls, None) is None
    bench.receiver.abort(record.push_id, "lost")
    assert bench.receiver.incarnation.endswith(".2")  # bytes were said to be under way: its arena was retired
    assert torch.equal(bench.params["p.b"], torch.full(SHAPES["b"], 7.0, dtype=torch.bfloat16))

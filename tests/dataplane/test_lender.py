"""An engine rank that lends its live memory to another one, over real NIXL agents and a real ledger: what is read, what is vouched
for, and what a push in the middle does to it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.dataplane.ledger_makers import member
from tests.dataplane.push_makers import REPLICA, Bench
from tests.fixtures.fleet import until
from weightsync import lender
from weightsync.errors import FencedOut
from weightsync.receiver import Receiver
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Member, PushRecord, Vote, WriterReport
from weightsync.transport import Transfer
from weightsync.wire import Decision, ReplicaState

STAGED = {"commit": "staged", "staging": "device"}
LATE = "engine-1"


def as_member(receiver: Receiver) -> Member:
    told = receiver.describe()
    names = {"version": told.version, "epoch": told.epoch, "state": told.state, "lends": told.lends}
    name = LATE if LATE in told.incarnation else REPLICA
    return member(name, incarnation=told.incarnation, layout_digests=(told.layout_digest,), **names)


class Pair:
    """An engine rank at version 1, the lender, and one that has just been loaded."""

    def __init__(self, open_ledger: Callable[..., Ledger], **options: Any) -> None:
        self.bench = Bench(open_ledger, **options)
        self.lender, self.ledger = self.bench.receiver, self.bench.ledger
        self.trainer = self.bench.trainer()
        self.params, self.late = self.bench.make_receiver(LATE)
        self.bench.push(self.trainer, 1)

    def begin(self) -> PushRecord:
        """Claim the repair and open the late rank for it."""
        begun = self.ledger.begin_repair(
            target=as_member(self.late),
            source=as_member(self.lender),
            head=self.ledger.head(),
            timeout_s=20.0,
            step=0,
        )
        assert begun is not None
        self.late.open(begun[0])
        return begun[0]

    def vote(self, record: PushRecord) -> Vote:
        """What the late rank says of what came."""
        (vote,) = until("it has voted", lambda: self.ledger.votes(record.push_id), 15).values()
        return vote

    def report(self, record: PushRecord) -> WriterReport:
        """How the loan ended."""
        return until("the loan has ended", lambda: self.ledger.writer_reports(record.push_id), 15)[0]

    def equal(self) -> bool:
        return all(torch.equal(self.params[name], tensor) for name, tensor in self.bench.params.items())

    def close(self) -> None:
        self.late.close()
        self.bench.close()


Make = Callable[..., Pair]


@pytest.fixture
def make(open_ledger: Callable[..., Ledger]) -> Iterator[Make]:
    made: list[Pair] = []

    def make_one(**options: Any) -> Pair:
        made.append(Pair(open_ledger, **options))
        return made[-1]

    yield make_one
    for pair in made:
        pair.close()


class Held:
    """Every post of a transfer waits until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        post = Transfer.post

        def held(transfer: Transfer) -> None:
            if threading.current_thread().name.startswith("lend-"):
                self.reached.set()
                assert self.go_on.wait(15)
            post(transfer)

        monkeypatch.setattr(Transfer, "post", held)


@pytest.mark.failure_mode(28)
@pytest.mark.parametrize(
    ("mode", "transfer", "group_bytes"),
    [("full", {}, 1 << 26), ("full", STAGED, 1000), ("sampled", {}, 1000), ("off", STAGED, 1 << 26)],
)
def test_what_is_lent_is_held_byte_for_byte_once_committed(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str, transfer: dict[str, str], group_bytes: int
) -> None:
    """Padding included, which no trainer writes; also where the lender's version was measured in part or not at all."""
    monkeypatch.setattr(lender, "GROUP_BYTES", group_bytes)
    pair = make(verify=mode, **transfer)
    record = pair.begin()
    assert pair.lender.lend(record).state == ReplicaState.CLEAN
    vote, whole = pair.vote(record), sum(tensor.nbytes for tensor in pair.params.values())
    assert (vote.ok, vote.reason, vote.bytes) == (True, "", whole)
    assert (pair.report(record).ok, pair.report(record).bytes) == (True, whole)
    pair.ledger.decide(record.push_id, Decision.COMMIT)
    told = pair.late.commit(record.push_id)
    assert (told.state, told.version, told.torn) == (ReplicaState.CLEAN, 1, False)
    assert pair.equal()
    assert pair.bench.holds(1)
    assert pair.late.verify().state == ReplicaState.CLEAN


def test_a_loan_stays_until_its_last_word_was_heard(make: Make) -> None:
    """Its agent sends what is left of a long word: 1. all is written and told, and nobody has decided; 2. the loan lives on; 3. the
    repair is decided, and it ends.
    """
    pair = make()
    record = pair.begin()
    pair.lender.lend(record)
    assert pair.report(record).ok
    pair.vote(record)
    (loan,) = pair.lender._lender._loans
    loan.join(0.3)
    assert loan.is_alive()
    pair.ledger.decide(record.push_id, Decision.ABORT, "that is all")
    loan.join(20)
    assert not loan.is_alive()


@pytest.mark.failure_mode(49)
def test_a_torn_rank_is_repaired_to_its_own_version_whatever_epoch_it_has_seen(make: Make) -> None:
    """1. repaired once; 2. a push of a later epoch tears it and is aborted; 3. repaired again, to the version of the old epoch.

    Seen to fail with the newest epoch seen held against a repair in `Receiver._check_fence`: step 3 is refused for ever.
    """
    pair = make()
    record = pair.begin()
    pair.lender.lend(record)
    pair.vote(record)
    pair.ledger.decide(record.push_id, Decision.COMMIT)
    pair.late.commit(record.push_id)
    torn = dataclasses.replace(record, push_id="2.2.9", epoch=2, version=2, source="", catch_up=False)
    pair.late.open(torn)
    pair.params["p.a"][3, 3] += 1
    assert pair.late.abort(torn.push_id, "test").state == ReplicaState.DIRTY
    again = pair.begin()
    pair.lender.lend(again)
    assert pair.vote(again).ok
    pair.ledger.decide(again.push_id, Decision.COMMIT)
    assert pair.late.commit(again.push_id).state == ReplicaState.CLEAN
    assert pair.equal()


@pytest.mark.failure_mode(12)
@pytest.mark.failure_mode(13)
@pytest.mark.parametrize("transfer", [{}, STAGED])
def test_a_lender_that_a_push_changes_does_not_vouch_for_what_it_sent(
    make: Make, monkeypatch: pytest.MonkeyPatch, transfer: dict[str, str]
) -> None:
    """1. a loan stands before its first byte; 2. a push is committed on the lender, which waits for no loan; 3. the loan ends
    without its last word, and says why; 4. the late rank serves nothing of it.

    Seen to fail with a `Lender.memory_changes` that counts nothing: the last word is given.
    """
    held = Held(monkeypatch)
    pair = make(**transfer)
    record = pair.begin()
    pair.lender.lend(record)
    assert held.reached.wait(15)
    pair.bench.push(pair.trainer, 2)
    held.go_on.set()
    report = pair.report(record)
    assert (report.ok, "a push changes" in report.reason) == (False, True)
    assert pair.ledger.votes(record.push_id) == {}
    told = pair.late.abort(record.push_id, report.reason)
    assert told.version == 0
    assert (told.state == ReplicaState.CLEAN) == bool(transfer)
    assert pair.bench.holds(2)


@pytest.mark.failure_mode(10)
@pytest.mark.failure_mode(13)
def test_bytes_of_two_versions_are_found_by_the_one_that_gets_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second guard, with the first one taken out: a lender that does not notice the push vouches for version 1, and sends
    version 2.
    """
    monkeypatch.setattr(lender.Lender, "memory_changes", lambda self: None)
    held = Held(monkeypatch)
    pair = make()
    record = pair.begin()
    pair.lender.lend(record)
    assert held.reached.wait(15)
    pair.bench.push(pair.trainer, 2)
    held.go_on.set()
    vote = pair.vote(record)
    assert (vote.ok, vote.reason[:32]) == (False, "4 of 4 targets differ from what ")
    assert pair.late.abort(record.push_id, vote.reason).state == ReplicaState.DIRTY


@pytest.mark.failure_mode(10)
def test_digests_are_those_of_the_commit_and_not_of_what_is_sent(make: Make) -> None:
    """A byte changed in the lender's memory since, as a stray write would: the late rank finds it, by name.

    Seen to fail with digests that are measured when the loan begins: the late rank takes the changed byte for the version's.
    """
    pair = make()
    pair.bench.params["p.c"][7, 1] += 1
    record = pair.begin()
    pair.lender.lend(record)
    vote = pair.vote(record)
    assert (vote.ok, vote.reason) == (False, "1 of 4 targets differ from what was sent: p.c")
    assert pair.late.abort(record.push_id, vote.reason).state == ReplicaState.DIRTY


def test_a_rank_that_is_not_what_was_asked_for_lends_nothing_and_says_so(make: Make) -> None:
    """Another incarnation, another version, a push that is open in place; each is a new word of the same rank in the ledger."""
    pair = make()
    record = pair.begin()

    def refused(asked: PushRecord, why: str) -> bool:
        pair.lender.lend(asked)
        return until(why, lambda: why in pair.report(record).reason and not pair.report(record).ok, 15)

    incarnation = pair.lender.incarnation
    assert refused(dataclasses.replace(record, source_incarnation="another.1"), f"this engine is {incarnation}")
    assert refused(dataclasses.replace(record, version=5), "it holds (1, 1), (1, 5) is asked for")
    push = pair.bench.begin(pair.trainer)
    pair.lender.open(push)
    assert refused(record, f"push {push.push_id} is open on it")
    pair.lender.abort(push.push_id, "test")


@pytest.mark.failure_mode(3)
def test_an_engine_with_parameters_that_are_no_targets_lends_nothing(open_ledger: Callable[..., Ledger]) -> None:
    """They would stay as they are in the other one: what is lent is a whole version or nothing.

    Seen to fail with a `Lender` that does not ask for `covers`.
    """
    bench = Bench(open_ledger)
    try:
        assert bench.receiver.describe().lends is True
        _, other = bench.make_receiver(LATE, more={"packed": torch.zeros(8)})
        assert other.describe().lends is False
        other.close()
    finally:
        bench.close()


@pytest.mark.failure_mode(31)
def test_a_rank_lends_to_so_many_at_once_and_no_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    pair = make()
    records = []
    for _ in range(lender.LOANS_AT_ONCE + 1):
        begun = pair.ledger.begin_repair(
            target=as_member(pair.late), source=as_member(pair.lender), head=pair.ledger.head(), timeout_s=20.0, step=0
        )
        assert begun is not None
        records.append(begun[0])
        pair.lender.lend(begun[0])
    assert "it lends to 2 replicas already" in pair.report(records[-1]).reason
    held.go_on.set()

    def reports(record: PushRecord) -> dict[int, WriterReport]:
        pair.late._agent.notifications()  # makes progress, as the reception of a push that is open does
        return pair.ledger.writer_reports(record.push_id)

    ended = [until("the loan has ended", lambda record=record: reports(record), 15)[0] for record in records]
    assert [report.ok for report in ended] == [True, True, False]


@pytest.mark.failure_mode(47)
@pytest.mark.failure_mode(48)
def test_memory_that_a_silent_lender_may_still_write_is_offered_to_nobody_before_its_process_is_replaced(
    make: Make,
) -> None:
    """1. where only death ends a writer's access, a lender falls silent; 2. neither a repair nor a push is taken, a new epoch of
    the trainer proves nothing; 3. the lender joins again, as the same process with another agent: still none; 4. from another one.

    Seen to fail with the rule for trainers (a newer epoch) applied to lenders: step 2 offers memory that may be written.
    """
    pair = make(revocation="process")
    record = pair.begin()
    pair.late.abort(record.push_id, "the lender fell silent")
    pair.ledger.join(as_member(pair.lender), 60.0)
    push = dataclasses.replace(record, push_id="2.2.9", epoch=2, version=2, source="", catch_up=False)
    with pytest.raises(FencedOut, match=f"restart engine {REPLICA}"):
        pair.late.open(push)
    process = pair.lender.incarnation.rpartition(".")[0]
    pair.ledger.join(dataclasses.replace(as_member(pair.lender), incarnation=f"{process}.2"), 60.0)
    with pytest.raises(FencedOut, match="have not said"):
        pair.late.open(push)
    pair.ledger.join(dataclasses.replace(as_member(pair.lender), incarnation="successor.1"), 60.0)
    assert pair.late.open(push).state == ReplicaState.OPEN
    pair.late.abort(push.push_id, "test")

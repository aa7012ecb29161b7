"""Rules of a publisher that need no fleet: it is made without its parts, and given a coordinator that says what the test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.dataplane.ledger_makers import begin
from tests.fixtures.servers import RedisServer
from weightsync import publisher as publisher_module
from weightsync.errors import ConversionError, LedgerUnavailable, PushAborted
from weightsync.publisher import Publisher
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord, WriterReport
from weightsync.telemetry import Stopwatch
from weightsync.wire import Decision


class RefusedOnce:
    """A coordinator whose catch-up is aborted after the other ranks have taken part in it."""

    def __init__(self) -> None:
        self.sequences: list[int] = []

    def catch_up(self, *, version: int, sequence: int, step: int) -> None:
        self.sequences.append(sequence)
        raise PushAborted("the engine holds it already")

    def push(self, *, step: int, sequence: int, call: int) -> Any:
        self.sequences.append(sequence)
        return SimpleNamespace(version=4, step=step)


@pytest.mark.failure_mode(22)
def test_a_push_after_an_aborted_catch_up_is_a_new_one_to_the_other_ranks() -> None:
    """With the number of the catch-up they take it for the one that they have seen, and wait for their deadline."""
    publisher: Any = Publisher.__new__(Publisher)
    publisher._coordinator = coordinator = RefusedOnce()
    publisher._held, publisher._sequence, publisher._calls = SimpleNamespace(version=3, step=1), 5, 1
    with pytest.raises(PushAborted):
        publisher._catch_up()
    publisher._push_once(2)
    assert coordinator.sequences == [6, 7]


class Away:
    """A coordinator that found no ledger for longer than a push takes."""

    def push(self, *, step: int, sequence: int, call: int) -> Any:
        raise LedgerUnavailable("Redis is away")


def made_without_parts(ledger: Ledger, *, rank: int, timeout_s: float = 5.0) -> Any:
    """A publisher of a gang of two whose epoch is 1. Rank 0's pushes fail; rank 1 takes part in one by returning its record."""
    publisher: Any = Publisher.__new__(Publisher)
    publisher._rank, publisher._world_size, publisher._epoch = rank, 2, 1
    publisher._coordinator = Away() if rank == 0 else None
    publisher._contract = SimpleNamespace(transfer=SimpleNamespace(timeout_seconds=timeout_s))
    publisher._ledger, publisher._lock, publisher._closing = ledger, threading.Lock(), threading.Event()
    publisher._sequence = publisher._calls = 0
    publisher._ended, publisher._held, publisher._followed = (0, 0), None, None
    publisher._writer = SimpleNamespace(settle=lambda: None)
    publisher._scales, publisher._metrics = SimpleNamespace(forget=lambda: None), SimpleNamespace(failed=lambda: None)
    publisher._follow = lambda record: record
    return publisher


@pytest.fixture
def gang(ledger: Ledger) -> Ledger:
    """A ledger in whose epoch 1 rank 0 lives."""
    ledger.open_epoch(1)
    ledger.hold_writer_lease(1, 0, 60.0)
    return ledger


@pytest.mark.failure_mode(22)
def test_a_push_that_rank_0_gave_up_without_a_ledger_is_waited_for_by_no_other_rank(
    redis_server: RedisServer, open_ledger: Callable[..., Ledger]
) -> None:
    """Rank 0's keeper tells as soon as there is a ledger again. Untold, the others waited for it to begin in each of their four
    attempts; the kill matrix showed it (Redis stopped in verify: 50 s, where a push takes 6 s at most).
    """
    lead, other = made_without_parts(open_ledger(retry_s=0.1), rank=0, timeout_s=0.0), made_without_parts(open_ledger(), rank=1)
    keeper = threading.Thread(target=lead._keep_current)
    redis_server.kill()
    with pytest.raises(LedgerUnavailable):
        lead.push(step=7)
    keeper.start()
    redis_server.start()
    other._ledger.hold_writer_lease(1, 0, 60.0)
    try:
        began = time.monotonic()
        with pytest.raises(PushAborted, match="rank 0 has ended its push of step 7"):
            other.push(step=7)
        assert time.monotonic() - began < 4.0
    finally:
        lead._closing.set()
        keeper.join()
    other._calls += 1
    assert other._take_next(7) is None  # the next one may begin yet, also for the same step


def test_a_rank_joins_a_later_call_of_rank_0_for_its_step_and_counts_on_from_there(gang: Ledger) -> None:
    """Rank 0 gave up and tried again while this one was still in its call. With a count of its own it would find its next call
    over before it began.
    """
    other = made_without_parts(gang, rank=1)
    gang.tell_ended(1, 1, 7)
    joined = begin(gang, 1, sequence=4, step=7, call=2)
    other._calls = 1
    assert other._follow_push(7) == joined
    gang.tell_ended(1, 2, 7)
    other._calls += 1
    assert other._take_next(8) is None
    assert other._take_next(7) is None


def test_a_rank_that_left_a_call_out_waits_for_the_step_that_it_pushes(gang: Ledger) -> None:
    other = made_without_parts(gang, rank=1)
    other._calls = 1
    gang.tell_ended(1, 5, 6)
    assert other._take_next(7) is None
    joined = begin(gang, 1, sequence=9, step=7, call=6)
    assert other._follow_push(7) == joined
    assert other._calls == 6


def test_a_rank_whose_call_is_over_leaves_the_next_one_of_rank_0_alone(gang: Ledger) -> None:
    """Refusing it, as the push of another step, would end it for rank 0; and it is there for this rank's next call."""
    other = made_without_parts(gang, rank=1)
    gang.tell_ended(1, 1, 7)
    later = begin(gang, 1, sequence=2, step=8, call=2)
    with pytest.raises(PushAborted, match="rank 0 has ended its push of step 7"):
        other.push(step=7)
    assert gang.writer_reports(later.push_id) == {}
    assert other._follow_push(8) == later


def test_calls_that_rank_0_gave_up_one_after_another_refuse_one_call_of_another_rank(gang: Ledger) -> None:
    """Its loop failed four times before this rank looked: the fifth may succeed."""
    other = made_without_parts(gang, rank=1)
    gang.tell_ended(1, 4, 7)
    with pytest.raises(PushAborted, match="rank 0 has ended its push of step 7"):
        other.push(step=7)
    other._calls += 1
    assert other._take_next(7) is None


class Lost:
    """Takes part in one push, and loses the ledger before it hears what became of it."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.records: list[PushRecord] = []

    def __call__(self, record: PushRecord) -> Any:
        self.records.append(record)
        raise self.error


@pytest.mark.parametrize("heard", ["told", "a later call's push", "a later call ended", "at its last attempt"])
@pytest.mark.parametrize("decision", [Decision.COMMIT, Decision.ABORT])
def test_a_push_that_was_committed_is_one_though_its_rank_did_not_hear_so(
    gang: Ledger, decision: Decision, heard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was not ends at once. Rank 0 has left the call, and is at the next one or over with it as well, of which this
    rank must neither take a push nor refuse one.
    """
    other = made_without_parts(gang, rank=1)
    other._watch, other._metrics.committed = Stopwatch(), lambda *_: None
    other._follow = lost = Lost(PushAborted("lost") if "attempt" in heard else LedgerUnavailable("Redis is away"))
    monkeypatch.setattr(publisher_module, "ATTEMPTS", 1 if "attempt" in heard else 4)
    record = begin(gang, 1, sequence=1, step=7, call=1)
    gang.decide(record.push_id, decision, "a test")
    later = None
    if heard == "told":
        gang.tell_ended(1, 1, 7)
    elif heard == "a later call ended":
        gang.tell_ended(1, 2, 8)
    monkeypatch.setattr(publisher_module, "OUTAGE_PAUSE_S", 0.0)
    if heard == "a later call's push":  # of the same step, as labels may be
        ended = other._take_next

        def take_next(step: int) -> PushRecord | None:
            nonlocal later
            if lost.records and later is None:
                later = begin(gang, 1, sequence=2, step=7, call=2)
            return ended(step)

        other._take_next = take_next
    if decision is Decision.COMMIT:
        assert other.push(step=7).version == record.version
    else:
        with pytest.raises(PushAborted):
            other.push(step=7)
    assert lost.records == [record]
    assert later is None or gang.writer_reports(later.push_id) == {}


def test_a_tensor_that_no_attempt_can_send_is_told_though_rank_0_has_left(gang: Ledger) -> None:
    other = made_without_parts(gang, rank=1)
    other._follow = Lost(LedgerUnavailable("Redis is away"))
    record = begin(gang, 1, sequence=1, step=7, call=1)
    gang.report_writer(record.push_id, WriterReport(rank=0, ok=False, final=True, reason="w is a NaN"))
    gang.decide(record.push_id, Decision.ABORT, "w is a NaN")
    gang.tell_ended(1, 1, 7)
    with pytest.raises(ConversionError, match="w is a NaN"):
        other.push(step=7)

"""Pushes: versions only rise, each push ends once, and what the ledger lost is aborted."""

from __future__ import annotations

import threading
import time
import types
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataplane.ledger_makers import begin, commit, member
from tests.fixtures.servers import RedisServer
from weightsync.errors import FencedOut
from weightsync.rendezvous import connection
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Vote, WriterReport
from weightsync.telemetry import Span
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import PUSHES_KEPT, Decision, PushSummary

OpenLedger = Callable[..., Ledger]


def test_every_push_has_a_version_of_its_own_also_after_an_abort(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    first, second = begin(ledger, 1), begin(ledger, 1)
    ledger.decide(second.push_id, Decision.ABORT, "a writer died")
    third = begin(ledger, 1, floor_version=9)
    assert [push.version for push in (first, second, third)] == [1, 2, 10]
    assert ledger.push(third.push_id) == third
    assert ledger.head().version == 0


def test_commit_moves_the_head_and_abort_does_not(ledger: Ledger, open_ledger: OpenLedger) -> None:
    ledger.open_epoch(1)
    committed, aborted = begin(ledger, 1), begin(ledger, 1)
    assert ledger.decide(committed.push_id, Decision.COMMIT).decision is Decision.COMMIT
    assert ledger.decide(aborted.push_id, Decision.ABORT, "vote of engine-0").reason == "vote of engine-0"
    head = open_ledger().head()
    assert (head.order, head.published) == ((1, 1), 2)


def test_a_commit_is_not_undone_by_an_older_push_of_the_epoch(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    older, newer = begin(ledger, 1), begin(ledger, 1)
    ledger.decide(newer.push_id, Decision.COMMIT)
    verdict = ledger.decide(older.push_id, Decision.COMMIT)
    assert verdict.decision is Decision.ABORT
    assert "version 2 of epoch 1 is committed already" in verdict.reason
    assert ledger.head().version == 2


def test_catch_up_brings_the_committed_version_again_under_another_push_id(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    push = commit(ledger, 1)
    again = commit(ledger, 1, catch_up=True, floor_version=push.version)
    assert (again.version, again.catch_up) == (push.version, True)
    assert again.push_id != push.push_id
    assert ledger.head().order == (1, push.version)
    assert begin(ledger, 1).version == push.version + 1


def test_a_new_epoch_has_nothing_to_catch_up_to_before_its_first_push(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    commit(ledger, 1)
    ledger.open_epoch(2)
    with pytest.raises(FencedOut, match=r"nothing to catch up to .* version 1 was committed in epoch 1"):
        begin(ledger, 2, catch_up=True)


def test_catch_up_to_another_version_than_the_trainer_holds_is_refused(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    commit(ledger, 1)
    with pytest.raises(FencedOut, match="at version 5"):
        begin(ledger, 1, catch_up=True, floor_version=5)


@pytest.mark.failure_mode(58)
def test_of_many_deciders_exactly_one_wins_and_all_hear_the_same(open_ledger: OpenLedger) -> None:
    ledgers = [open_ledger() for _ in range(8)]
    ledgers[0].open_epoch(1)
    outcomes = set()
    for _ in range(25):
        push = begin(ledgers[0], 1)
        barrier = threading.Barrier(len(ledgers))

        def decide(
            index: int, push_id: str = push.push_id, barrier: threading.Barrier = barrier
        ) -> tuple[Decision, str]:
            barrier.wait()
            wanted = Decision.COMMIT if index % 2 else Decision.ABORT
            verdict = ledgers[index].decide(push_id, wanted, f"by {index}")
            return verdict.decision, verdict.reason

        with ThreadPoolExecutor(len(ledgers)) as pool:
            verdicts = set(pool.map(decide, range(len(ledgers))))
        assert len(verdicts) == 1
        ((decision, _),) = verdicts
        outcomes.add(decision)
        assert (ledgers[0].head().version == push.version) == (decision is Decision.COMMIT)
    assert outcomes == {Decision.COMMIT, Decision.ABORT}


def test_nothing_commits_after_the_deadline_by_the_ledgers_clock(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    push = begin(ledger, 1, timeout_s=0.05)
    wait_until(lambda: ledger.now() > push.deadline_at or None, deadline=Deadline(5), what="the push's deadline")
    verdict = ledger.decide(push.push_id, Decision.COMMIT)
    assert verdict.decision is Decision.ABORT
    assert "its deadline passed" in verdict.reason
    assert ledger.decision(push.push_id) == verdict
    assert ledger.head().version == 0


def test_deadline_is_the_same_moment_for_clients_whose_clocks_differ(
    open_ledger: OpenLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A push has 30 s. 2. Clients whose clocks were set or started elsewhere all see those seconds, never more."""
    trainer, receiver = open_ledger(), open_ledger()
    trainer.open_epoch(1)
    push = begin(trainer, 1, timeout_s=30.0)
    for ahead_s in (0.0, 5000.0, -4000.0):

        def monotonic(ahead_s: float = ahead_s) -> float:
            return time.monotonic() + ahead_s

        clock = types.SimpleNamespace(monotonic=monotonic, time=lambda: 0.0, sleep=time.sleep)
        monkeypatch.setattr(connection, "time", clock)
        left_s = receiver.deadline_to_monotonic(push.deadline_at) - monotonic()
        assert 28.0 < left_s <= 30.0


def test_deadline_can_still_be_told_when_the_ledger_has_gone(
    redis_server: RedisServer, open_ledger: OpenLedger
) -> None:
    receiver = open_ledger(retry_s=0.1)
    deadline_at = receiver.now() + 30.0
    redis_server.kill()
    left_s = receiver.deadline_to_monotonic(deadline_at) - time.monotonic()
    assert 20.0 < left_s <= 30.0


@pytest.mark.failure_mode(30)
def test_a_push_that_the_ledger_lost_is_aborted_for_everyone(
    redis_server: RedisServer, open_ledger: OpenLedger
) -> None:
    trainer, receiver = open_ledger(), open_ledger()
    trainer.open_epoch(1)
    push = begin(trainer, 1)
    redis_server.restart(with_data=False)
    assert receiver.decision(push.push_id) is None
    assert receiver.push(push.push_id) is None
    assert not receiver.vote(push.push_id, Vote(replica="engine-0", rank=0, ok=True))
    assert receiver.decision(push.push_id) is None
    verdict = trainer.decide(push.push_id, Decision.COMMIT)
    assert verdict.decision is Decision.ABORT
    assert "lost its data" in verdict.reason
    assert receiver.decide(push.push_id, Decision.COMMIT) == verdict
    assert begin(trainer, 1).version > push.version


def test_a_decision_survives_a_crash_of_redis(redis_server: RedisServer, ledger: Ledger) -> None:
    ledger.open_epoch(1)
    push = commit(ledger, 1)
    redis_server.restart(with_data=True)
    verdict = ledger.decision(push.push_id)
    assert verdict is not None
    assert verdict.decision is Decision.COMMIT
    assert ledger.head().order == (1, push.version)


def test_ranks_find_the_push_of_their_own_count(ledger: Ledger, open_ledger: OpenLedger) -> None:
    ledger.open_epoch(4)
    assert ledger.current_push(4) is None
    begin(ledger, 4, sequence=6)
    push = begin(ledger, 4, sequence=7)
    assert open_ledger().current_push(4) == (7, push.push_id)
    assert open_ledger().current_push(3) is None


def test_reports_and_votes_are_read_back_by_rank(ledger: Ledger, open_ledger: OpenLedger) -> None:
    ledger.open_epoch(1)
    push = begin(ledger, 1)
    reports = {
        rank: WriterReport(rank=rank, ok=True, bytes=rank, spans=(Span("wire", 1.0, 0.5),)) for rank in (0, 1, 10)
    }
    votes = {
        (replica, rank): Vote(replica=replica, rank=rank, ok=replica != "b:1", digest="ff", reason="torn")
        for replica in ("a", "b:1")
        for rank in (0, 1)
    }
    for report in reports.values():
        assert ledger.report_writer(push.push_id, report)
    for vote in votes.values():
        assert ledger.vote(push.push_id, vote)
    reader = open_ledger()
    assert reader.writer_reports(push.push_id) == reports
    assert reader.votes(push.push_id) == votes


def test_list_of_pushes_is_bounded_newest_first_and_without_doubles(ledger: Ledger) -> None:
    for number in range(PUSHES_KEPT + 3):
        summary = PushSummary(push_id=f"1.{number}.{number}", epoch=1, version=number, step=number, outcome="COMMIT")
        ledger.publish_push(summary)
        ledger.publish_push(summary)
    versions = [push.version for push in ledger.pushes()]
    assert versions == list(range(PUSHES_KEPT + 2, 2, -1))


EVENTS = st.lists(st.sampled_from(["commit", "abort", "catch_up", "new_trainer", "lose", "report"]), max_size=16)


@given(events=EVENTS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.failure_mode(50)
def test_committed_versions_only_rise_whatever_happens(redis_server: RedisServer, events: list[str]) -> None:
    """Trainers without an operator come and go, Redis loses its data, one receiver lives through it all.

    The receiver joins again before a new trainer begins (the trainer waits for it: an empty ledger has no members).
    """
    session, committed, push_ids = uuid.uuid4().hex, [(0, 0)], set()

    def connect() -> Ledger:
        return Ledger(session=session, host="127.0.0.1", port=redis_server.port)

    def report() -> None:
        epoch, version = committed[-1]
        receiver.join(member(epoch=epoch, version=version, seen_epoch=trainer_epoch), ttl_s=60)

    with redis_server.client() as keys, connect() as receiver:
        trainer, trainer_epoch = connect(), 0
        trainer_epoch = trainer.open_epoch()
        for event in events:
            if event == "lose":
                keys.delete(*keys.keys(f"ws:{session}:*") or ["none"])
            elif event == "report":
                report()
            elif event == "new_trainer":
                report()
                trainer.close()
                trainer = connect()
                previous, trainer_epoch = trainer_epoch, trainer.open_epoch()
                assert trainer_epoch > previous
            elif event != "catch_up" or committed[-1][0] == trainer_epoch:
                push = begin(trainer, trainer_epoch, catch_up=event == "catch_up")
                assert push.push_id not in push_ids
                push_ids.add(push.push_id)
                wanted = Decision.ABORT if event == "abort" else Decision.COMMIT
                assert trainer.decide(push.push_id, wanted).decision is wanted
                order = (push.epoch, push.version)
                assert order == committed[-1] if event == "catch_up" else order > committed[-1]
                committed += [order] if event == "commit" else []
        trainer.close()


@pytest.mark.parametrize("wanted", [Decision.COMMIT, Decision.ABORT])
def test_whoever_waits_for_a_decision_is_told_when_it_falls(
    ledger: Ledger, open_ledger: OpenLedger, monkeypatch: pytest.MonkeyPatch, wanted: Decision
) -> None:
    """1. one that waits, and 2. one that asks later, hear it with its reason, and need not look at the push itself.

    Fails without the stream: they would find out when their wait ends, up to half a second late.
    """
    ledger.open_epoch(1)
    push, replica = begin(ledger, 1), open_ledger()
    monkeypatch.setattr(replica, "decision", lambda _: pytest.fail("nothing was told, so it had to look"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(replica.await_decision, push.push_id, 30.0)
        decided = ledger.decide(push.push_id, wanted, "a vote")
        assert waiting.result(5) == decided
    assert decided.decision is wanted
    assert replica.await_decision(push.push_id, 0.0) == decided


def test_a_wait_for_a_decision_ends_by_itself(ledger: Ledger) -> None:
    """1. an open push is OPEN after the patience; 2. one that the ledger does not know is None."""
    ledger.open_epoch(1)
    push, started = begin(ledger, 1), time.monotonic()
    verdict = ledger.await_decision(push.push_id, 0.05)
    assert verdict is not None and verdict.decision is Decision.OPEN
    assert ledger.await_decision("1.9.9", 0.05) is None
    assert time.monotonic() - started < 2


def test_the_clock_is_asked_again_after_a_fault_only(ledger: Ledger, redis_server: RedisServer) -> None:
    """1. two deadlines cost one question; 2. a Redis that restarted may be on another host, whose clock is another."""

    def asked() -> int:
        return redis_server.client().info("commandstats").get("cmdstat_time", {"calls": 0})["calls"]

    assert ledger.known_moment(1000.0) is None
    first = ledger.deadline_to_monotonic(1000.0)
    before = asked()
    assert ledger.deadline_to_monotonic(1000.0) == ledger.known_moment(1000.0) == first
    assert asked() == before
    redis_server.restart(with_data=True)
    ledger.head()
    before = asked()
    assert ledger.known_moment(1000.0) is None
    ledger.deadline_to_monotonic(1000.0)
    assert asked() == before + 1

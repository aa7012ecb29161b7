"""What a coordinator knows of its push: told by a stream, read again where the stream or the ledger was lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.dataplane.ledger_makers import begin
from tests.fixtures.servers import RedisServer
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.progress import PushProgress
from weightsync.rendezvous.records import Vote, WriterReport
from weightsync.wire import Decision, Keys

PATIENCE_S = 20.0


def take_until(progress: PushProgress, known: Callable[[], Any]) -> None:
    """Take in what comes until it is known; a wait of the ledger's ends by itself."""
    for _ in range(100):
        if known():
            return
        progress.take(PATIENCE_S)
    raise AssertionError(f"not known: {vars(progress)}")


def test_all_that_is_said_of_a_push_is_known_in_its_own_words(ledger: Ledger) -> None:
    push = begin(ledger, ledger.open_epoch(1))
    progress = PushProgress(ledger, push.push_id)
    report, vote = (
        WriterReport(rank=1, ok=True, bytes=8),
        Vote(replica="engine-0", rank=0, ok=False, reason="other bytes"),
    )
    applied = Applied(replica="engine-0", digest="2a", pause_seconds=0.1)
    ledger.report_planned(push.push_id, 1, "met in 1")
    ledger.report_ready(push.push_id, 0)
    ledger.report_writer(push.push_id, report)
    ledger.vote(push.push_id, vote)
    ledger.report_applied(push.push_id, applied)
    ledger.decide(push.push_id, Decision.ABORT, "enough")
    progress.take(PATIENCE_S)
    assert (progress.planned, progress.ready) == ({1: "met in 1"}, {0})
    assert (progress.reports, progress.votes, progress.applied) == (
        {1: report},
        {("engine-0", 0): vote},
        {"engine-0": applied},
    )
    assert progress.verdict == ledger.decision(push.push_id)


def test_a_fleet_that_speaks_at_once_is_heard_in_one_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word costs one entry, and no look at the whole push."""
    push = begin(ledger, ledger.open_epoch(1))
    progress = PushProgress(ledger, push.push_id)
    for number in range(64):
        ledger.vote(push.push_id, Vote(replica=f"engine-{number}", rank=0, ok=True))
    monkeypatch.setattr(ledger, "fields_of", lambda _: pytest.fail("the whole push was read"))
    progress.take(PATIENCE_S)
    assert len(progress.votes) == 64


def test_a_wait_ends_when_somebody_speaks(ledger: Ledger, open_ledger: Callable[..., Ledger]) -> None:
    push = begin(ledger, ledger.open_epoch(1))
    progress, other = PushProgress(ledger, push.push_id), open_ledger()
    speaker = threading.Timer(0.05, lambda: other.report_planned(push.push_id, 3, ""))
    speaker.start()
    take_until(progress, lambda: progress.planned)
    speaker.join()
    assert progress.planned == {3: ""}


def test_what_a_lost_stream_does_not_tell_is_read_from_the_push(ledger: Ledger, redis_server: RedisServer) -> None:
    """1. the stream is gone, with an entry that nobody has read; 2. in the silence the push is read; 3. the stream goes on."""
    push = begin(ledger, ledger.open_epoch(1))
    progress = PushProgress(ledger, push.push_id)
    ledger.report_planned(push.push_id, 1, "met in 1")
    redis_server.client().delete(Keys(ledger.session).told(push.push_id))
    take_until(progress, lambda: progress.planned)
    ledger.report_planned(push.push_id, 2, "")
    progress.take(PATIENCE_S)
    assert progress.planned == {1: "met in 1", 2: ""}


@pytest.mark.failure_mode(30)
def test_a_ledger_that_lost_the_push_is_found_out_in_the_silence(ledger: Ledger, redis_server: RedisServer) -> None:
    push = begin(ledger, ledger.open_epoch(1))
    progress = PushProgress(ledger, push.push_id)
    ledger.report_planned(push.push_id, 1, "met in 1")
    progress.take(PATIENCE_S)
    redis_server.client().flushall()
    take_until(progress, lambda: progress.verdict is None)
    assert progress.planned == {1: "met in 1"}

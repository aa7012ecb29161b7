"""Rules of a publisher that need no fleet: it is made without its parts, and given a coordinator that says what the test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures.servers import RedisServer
from weightsync.errors import LedgerUnavailable, PushAborted
from weightsync.publisher import Publisher
from weightsync.rendezvous.ledger import Ledger


class RefusedOnce:
    """A coordinator whose catch-up is aborted after the other ranks have taken part in it."""

    def __init__(self) -> None:
        self.sequences: list[int] = []

    def catch_up(self, *, version: int, sequence: int, step: int) -> None:
        self.sequences.append(sequence)
        raise PushAborted("the engine holds it already")

    def push(self, *, step: int, sequence: int) -> Any:
        self.sequences.append(sequence)
        return SimpleNamespace(version=4, step=step)


@pytest.mark.failure_mode(22)
def test_a_push_after_an_aborted_catch_up_is_a_new_one_to_the_other_ranks() -> None:
    """With the number of the catch-up they take it for the one that they have seen, and wait for their deadline."""
    publisher: Any = Publisher.__new__(Publisher)
    publisher._coordinator = coordinator = RefusedOnce()
    publisher._held, publisher._sequence = SimpleNamespace(version=3, step=1), 5
    with pytest.raises(PushAborted):
        publisher._catch_up()
    publisher._push_once(2)
    assert coordinator.sequences == [6, 7]


class Away:
    """A coordinator that found no ledger for longer than a push takes."""

    def push(self, *, step: int, sequence: int) -> Any:
        raise LedgerUnavailable("Redis is away")


def made_without_parts(ledger: Ledger, *, rank: int, timeout_s: float) -> Any:
    """A publisher of a gang of two whose epoch is 1; rank 0's pushes fail."""
    publisher: Any = Publisher.__new__(Publisher)
    publisher._rank, publisher._world_size, publisher._epoch = rank, 2, 1
    publisher._coordinator = Away() if rank == 0 else None
    publisher._contract = SimpleNamespace(transfer=SimpleNamespace(timeout_seconds=timeout_s))
    publisher._ledger, publisher._lock = ledger, threading.Lock()
    publisher._sequence = publisher._calls = publisher._ended = publisher._told = 0
    publisher._writer = SimpleNamespace(settle=lambda: None)
    publisher._scales, publisher._metrics = SimpleNamespace(forget=lambda: None), SimpleNamespace(failed=lambda: None)
    return publisher


@pytest.mark.failure_mode(22)
def test_a_push_that_rank_0_gave_up_without_a_ledger_is_waited_for_by_no_other_rank(
    redis_server: RedisServer, open_ledger: Callable[..., Ledger]
) -> None:
    """Rank 0 tells as soon as there is a ledger again. Untold, the others waited for it to begin in each of their four attempts;
    the kill matrix showed it (Redis stopped in verify: 50 s, where a push takes 6 s at most).
    """
    lead = made_without_parts(open_ledger(retry_s=0.1), rank=0, timeout_s=0.0)
    other = made_without_parts(open_ledger(), rank=1, timeout_s=5.0)
    redis_server.kill()
    with pytest.raises(LedgerUnavailable):
        lead.push(step=7)
    lead._tell_ended()
    redis_server.start()
    other._ledger.hold_writer_lease(1, 0, 60.0)
    other._calls = 1
    assert other._take_next() is None  # rank 0 could not tell
    other._calls = 0
    lead._tell_ended()
    began = time.monotonic()
    with pytest.raises(PushAborted, match="rank 0 has ended its push"):
        other.push(step=7)
    assert time.monotonic() - began < 4.0
    other._calls += 1
    assert other._take_next() is None  # the next push may begin yet


def test_a_rank_that_left_a_call_out_is_refused_once(redis_server: RedisServer, open_ledger: Callable[..., Ledger]) -> None:
    ledger = open_ledger()
    ledger.hold_writer_lease(1, 0, 60.0)
    ledger.tell_ended_calls(1, 5)
    other = made_without_parts(ledger, rank=1, timeout_s=5.0)
    with pytest.raises(PushAborted, match="rank 0 has ended its push"):
        other.push(step=7)
    other._calls += 1
    assert other._take_next() is None

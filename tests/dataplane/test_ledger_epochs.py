"""Epochs: one trainer at a time, and no way back, also when Redis forgot everything."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataplane.ledger_makers import begin, commit, member
from tests.fixtures.servers import RedisServer
from weightsync.errors import FencedOut
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import Decision

OpenLedger = Callable[..., Ledger]


def test_operators_epoch_is_in_force_for_all_ranks_of_a_trainer(ledger: Ledger, open_ledger: OpenLedger) -> None:
    assert ledger.open_epoch(3) == 3
    assert open_ledger().open_epoch(3) == 3
    assert ledger.head().epoch == 3


@pytest.mark.failure_mode(19)
def test_older_epoch_is_refused_with_both_numbers(ledger: Ledger, open_ledger: OpenLedger) -> None:
    ledger.open_epoch(3)
    with pytest.raises(FencedOut, match=r"epoch 2 .* epoch 3 is in force"):
        open_ledger().open_epoch(2)


def test_without_an_operator_the_epoch_is_above_all_that_is_known(ledger: Ledger, open_ledger: OpenLedger) -> None:
    assert ledger.open_epoch() == 1
    assert ledger.open_epoch(floor=(4, 9)) == 5
    ledger.join(member(seen_epoch=11), ttl_s=30)
    assert open_ledger().open_epoch() == 12


def test_trainers_that_start_at_once_without_an_operator_get_different_epochs(open_ledger: OpenLedger) -> None:
    ledgers = [open_ledger() for _ in range(12)]
    with ThreadPoolExecutor(len(ledgers)) as pool:
        epochs = list(pool.map(lambda one: one.open_epoch(), ledgers))
    assert sorted(epochs) == list(range(1, 13))


@pytest.mark.failure_mode(50)
def test_epoch_rises_above_receivers_after_redis_came_back_empty(
    redis_server: RedisServer, ledger: Ledger, open_ledger: OpenLedger
) -> None:
    """1. A receiver has seen epoch 7. 2. Redis restarts empty. 3. The receiver joins again: the next trainer gets 8."""
    receiver = open_ledger()
    ledger.open_epoch(7)
    joined = receiver.join(member(epoch=7, seen_epoch=7, version=40), ttl_s=30)
    redis_server.restart(with_data=False)
    receiver.join(joined, ttl_s=30)
    newcomer = open_ledger()
    assert newcomer.open_epoch() == 8
    assert begin(newcomer, 8).version == 41


@pytest.mark.failure_mode(50)
def test_trainers_own_word_keeps_its_epoch_after_redis_came_back_empty(
    redis_server: RedisServer, ledger: Ledger
) -> None:
    ledger.open_epoch(7)
    first = commit(ledger, 7)
    redis_server.restart(with_data=False)
    second = commit(ledger, 7)
    assert (second.epoch, second.version) == (7, first.version + 1)
    assert second.push_id != first.push_id
    assert ledger.head().order == (7, second.version)


@pytest.mark.failure_mode(19)
def test_trainer_of_an_older_epoch_can_neither_begin_nor_commit(ledger: Ledger, open_ledger: OpenLedger) -> None:
    old, new = ledger, open_ledger()
    old.open_epoch(1)
    push = begin(old, 1)
    new.open_epoch(2)
    verdict = old.decide(push.push_id, Decision.COMMIT)
    assert verdict.decision is Decision.ABORT
    assert "epoch 2 is in force" in verdict.reason
    with pytest.raises(FencedOut, match="epoch 2 is in force"):
        begin(old, 1)
    assert new.head().version == 0


PAIRS = st.tuples(st.integers(0, 5), st.integers(0, 50))


@given(said=st.lists(PAIRS, min_size=1, max_size=8), lost_before=st.integers(0, 8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.failure_mode(30)
def test_head_is_the_greatest_that_anyone_asserted_in_any_order(
    redis_server: RedisServer, said: list[tuple[int, int]], lost_before: int
) -> None:
    """Also when the ledger lost its data before any of the words: whoever knows more says so with its next change."""
    session = uuid.uuid4().hex
    with redis_server.client() as keys, Ledger(session=session, host="127.0.0.1", port=redis_server.port) as ledger:
        for index, (epoch, version) in enumerate(said):
            if index == lost_before:
                keys.delete(*keys.keys(f"ws:{session}:*") or ["none"])
            ledger.raise_head(epoch, version)
        head = ledger.head()
    assert head.order == max(said)
    assert head.epoch == max(epoch for epoch, _ in said)
    assert head.published == max(version for _, version in said)

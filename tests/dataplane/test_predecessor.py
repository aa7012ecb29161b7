"""A gang that dies whole tells nobody how its push ended: the trainer of the next epoch does."""

from __future__ import annotations

import dataclasses

import pytest

from tests.dataplane.ledger_makers import begin, commit
from weightsync.accounts import unaccounted
from weightsync.predecessor import account_for_predecessor
from weightsync.publisher import Publisher
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Verdict
from weightsync.wire import Decision


def agree_on_epoch(ledger: Ledger, given: int) -> int:
    """Open an epoch as the first rank of a trainer does."""
    publisher = Publisher.__new__(Publisher)
    publisher._ledger, publisher._rank, publisher._world_size = ledger, 0, 1
    return publisher._agree_on_epoch(given)


@pytest.mark.failure_mode(58)
def test_a_push_that_a_whole_gang_died_in_is_aborted_and_listed_by_the_next_epoch(ledger: Ledger) -> None:
    """Its successor aborts it, and the list of pushes has it."""
    first = agree_on_epoch(ledger, 1)
    ledger.publish_push(unaccounted(commit(ledger, first), Verdict(decision=Decision.COMMIT, reason="")))
    died = begin(ledger, first, sequence=2)
    assert agree_on_epoch(ledger, 3) == 3
    told, before = ledger.pushes()
    assert (told.push_id, told.outcome, told.replicas) == (died.push_id, Decision.ABORT, ["engine-0"])
    assert told.reason == "the trainer of epoch 1 ended without an account of it, epoch 3 is in force"
    assert (before.version, before.outcome) == (1, Decision.COMMIT)
    verdict = ledger.decision(died.push_id)
    assert verdict is not None and verdict.decision is Decision.ABORT
    agree_on_epoch(ledger, 4)
    assert len(ledger.pushes()) == 2


def test_who_decided_it_first_is_named(ledger: Ledger) -> None:
    died = begin(ledger, ledger.open_epoch(1))
    ledger.decide(died.push_id, Decision.ABORT, "engine-0: no decision within 6.0 s")
    told = account_for_predecessor(ledger, 1, 2)
    assert told is not None
    assert told.reason.startswith("engine-0: no decision within 6.0 s; the trainer of epoch 1 ended")


def test_a_commit_without_an_account_is_listed_as_one(ledger: Ledger) -> None:
    push = commit(ledger, ledger.open_epoch(1))
    agree_on_epoch(ledger, 2)
    (told,) = ledger.pushes()
    assert (told.push_id, told.outcome, told.reason) == (push.push_id, Decision.COMMIT, "")


def test_the_first_account_of_a_push_stays(ledger: Ledger) -> None:
    """A trainer without an operator may live on, fenced, and tell of its push after its successor has."""
    push = commit(ledger, ledger.open_epoch(1))
    told = account_for_predecessor(ledger, 1, 2)
    assert told is not None
    ledger.publish_push(dataclasses.replace(told, seconds=3.0))
    (listed,) = ledger.pushes()
    assert ledger.summary(push.push_id) == listed
    assert (listed.seconds, listed.finished_at) == (0.0, told.finished_at)
    assert account_for_predecessor(ledger, 1, 2) is None


def test_an_epoch_that_pushed_nothing_leaves_nothing_to_tell(ledger: Ledger) -> None:
    ledger.open_epoch(1)
    agree_on_epoch(ledger, 2)
    assert ledger.pushes() == []

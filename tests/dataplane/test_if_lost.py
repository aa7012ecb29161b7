"""Before a checkpoint replaces a version, the ledger is asked once more whether it is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.dataplane.ledger_makers import member
from weightsync.commands.push import _found_again
from weightsync.rendezvous.ledger import Ledger
from weightsync.wire import ReplicaState

LOST = 42


@pytest.mark.parametrize(
    ("version", "state", "why"),
    [
        (LOST, ReplicaState.CLEAN, "engine-0 holds version 42"),
        (LOST, ReplicaState.OPEN, "engine-0 holds version 42"),
        (LOST, ReplicaState.DIRTY, ""),
        (LOST - 1, ReplicaState.CLEAN, ""),
        (0, ReplicaState.CLEAN, ""),
    ],
)
def test_an_engine_that_lives_and_holds_it_keeps_it(
    open_ledger: Callable[..., Ledger], version: int, state: ReplicaState, why: str
) -> None:
    ledger = open_ledger()
    ledger.raise_head(3, LOST)
    ledger.join(member(version=version, epoch=3 if version else 0, state=state), 9.0)
    assert _found_again(ledger, LOST) == why


def test_a_version_that_was_committed_since_is_kept(open_ledger: Callable[..., Ledger]) -> None:
    """The pod was evicted after its push, and is started again."""
    ledger = open_ledger()
    ledger.raise_head(4, LOST + 1)
    assert _found_again(ledger, LOST) == "version 43 was committed since"


@pytest.mark.failure_mode(50)
def test_a_ledger_that_lost_it_is_told_so_that_the_next_version_is_newer(open_ledger: Callable[..., Ledger]) -> None:
    """Else the checkpoint becomes version 1, and the status stands at 42 for ever."""
    ledger = open_ledger()
    assert _found_again(ledger, LOST) == ""
    assert (ledger.head().version, ledger.head().published) == (LOST, LOST)

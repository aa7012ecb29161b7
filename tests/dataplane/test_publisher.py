"""Rules of a publisher that need no fleet: it is made without its parts, and given a coordinator that says what the test wants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.errors import PushAborted
from weightsync.publisher import Publisher


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

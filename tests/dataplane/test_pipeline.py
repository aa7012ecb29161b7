"""Groups go on the wire in order, each once it is converted, and a fault on either side ends both."""

from __future__ import annotations

import threading

import pytest

from weightsync import pipeline

DONE = 10.0


def test_groups_are_posted_in_order_once_they_are_converted() -> None:
    """A group that takes its time is waited for, and what was posted before makes progress meanwhile."""
    looks, polls, posted = iter([False, False, True]), [], []

    def convert(number: int):
        return (lambda: next(looks)) if number == 1 else (lambda: True)

    pipeline.run(3, convert, posted.append, lambda: polls.append(list(posted)))
    assert posted == [0, 1, 2]
    assert polls == [[0], [0]]


def test_the_next_group_is_converted_while_one_is_posted() -> None:
    """The post of group 0 returns only when group 1 is being converted, as one over shared memory does."""
    second = threading.Event()

    def convert(number: int):
        if number == 1:
            second.set()
        return lambda: True

    def post(number: int) -> None:
        if number == 0:
            assert second.wait(DONE)

    pipeline.run(2, convert, post, lambda: None)


def test_a_group_that_cannot_be_converted_is_the_last_to_be_looked_at() -> None:
    posted = []

    def convert(number: int):
        if number == 1:
            raise ValueError("an infinity")
        return lambda: True

    with pytest.raises(ValueError, match="an infinity"):
        pipeline.run(3, convert, posted.append, lambda: None)
    assert posted == [0]


def test_a_post_that_fails_is_raised_to_who_converts() -> None:
    with pytest.raises(RuntimeError, match="no route"):
        pipeline.run(2, lambda _: lambda: True, _fail, lambda: None)


def test_a_group_is_converted_when_those_whose_memory_it_takes_were_posted_and_have_left() -> None:
    """The post of group 0 takes until group 1 is converted; group 2 takes its memory, and must wait for both it and its readers."""
    told: list[str] = []
    second = threading.Event()

    def convert(number: int):
        told.append(f"convert {number}")
        if number == 1:
            second.set()
        return lambda: True

    def post(number: int) -> None:
        if number == 0:
            assert second.wait(DONE)
        told.append(f"posted {number}")

    after = [frozenset(), frozenset(), frozenset({0})]
    pipeline.run(3, convert, post, lambda: None, after=after, await_left=lambda n: told.append(f"left {sorted(n)}"))
    assert told.index("posted 0") < told.index("left [0]") < told.index("convert 2") < told.index("posted 2")


def test_who_waits_for_memory_hears_of_a_post_that_failed() -> None:
    """Group 0 will never be posted: waiting for it would never end."""
    after = [frozenset(), frozenset({0})]
    with pytest.raises(RuntimeError, match="no route"):
        pipeline.run(2, lambda _: lambda: True, _fail, lambda: None, after=after)


def _fail(_: int) -> None:
    raise RuntimeError("no route")

"""Trainer ranks agree on FP8 scales by real gloo, each rank a thread here, and again after one of them stayed away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from weightsync.errors import DeadlineExceeded, PushAborted, TransportError
from weightsync.scale_exchange import ScaleExchange
from weightsync.waiting import Deadline

RANKS = 3


def vector(rank: int) -> torch.Tensor:
    return torch.tensor([rank, -rank, 7], dtype=torch.int32)


@pytest.fixture
def exchanges() -> list[ScaleExchange]:
    store = HashStore()
    return [ScaleExchange(store, rank, RANKS) for rank in range(RANKS)]


def push(
    exchanges: list[ScaleExchange],
    push_id: str,
    timeout_s: float,
    ranks: range = range(RANKS),
    look: Callable[[], object] = lambda: None,
) -> list[object]:
    """What `ranks` find, or what they raise; each has been told of everybody's group, as the ledger tells it."""
    groups = {rank: exchange.group for rank, exchange in enumerate(exchanges)}

    def one(rank: int) -> object:
        try:
            return exchanges[rank].within(push_id, Deadline(timeout_s), groups, look)(vector(rank)).tolist()
        except (TransportError, DeadlineExceeded, PushAborted) as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, ranks))


def test_every_rank_has_the_maximum_push_after_push_by_one_group(exchanges: list[ScaleExchange]) -> None:
    for push_id in ("1.1.1", "1.2.1"):
        assert push(exchanges, push_id, 10.0) == [[RANKS - 1, 0, 7]] * RANKS
    assert {exchange.group for exchange in exchanges} == {"1.1.1"}


@pytest.mark.parametrize("met_before", [False, True], ids=["meeting", "exchanging"])
def test_a_rank_that_stays_away_holds_the_others_to_the_deadline_and_the_next_push_works(
    exchanges: list[ScaleExchange], met_before: bool
) -> None:
    """Without `forget` in `_agree`, or without the comparison in `within`, the last exchange fails: its group is of no use."""
    if met_before:
        push(exchanges, "1.1.1", 10.0)
    started = time.monotonic()
    found = push(exchanges, "1.2.1", 1.0, range(RANKS - 1))
    assert time.monotonic() - started < 3.0
    assert all(isinstance(each, TransportError if met_before else DeadlineExceeded) for each in found), found
    assert all("push 1.2.1: trainer rank" in str(each) for each in found), found
    assert push(exchanges, "1.3.1", 10.0) == [[RANKS - 1, 0, 7]] * RANKS


def test_a_rank_that_lost_its_group_makes_all_meet_anew(exchanges: list[ScaleExchange]) -> None:
    """As rank 0 does when a push fails before the others hear of it."""
    push(exchanges, "1.1.1", 10.0)
    exchanges[0].forget()
    assert push(exchanges, "1.3.1", 10.0) == [[RANKS - 1, 0, 7]] * RANKS
    assert {exchange.group for exchange in exchanges} == {"1.3.1"}


def test_nobody_waits_for_a_rank_whose_part_failed(exchanges: list[ScaleExchange]) -> None:
    """It closes its connections while the others exchange, long before the deadline."""
    push(exchanges, "1.1.1", 10.0)
    failing = threading.Timer(0.3, exchanges[RANKS - 1].forget)
    failing.start()
    started = time.monotonic()
    found = push(exchanges, "1.2.1", 60.0, range(RANKS - 1))
    assert time.monotonic() - started < 20.0
    assert all(isinstance(each, TransportError) for each in found), found
    failing.join()


def test_ranks_that_meet_hear_that_the_push_is_over(exchanges: list[ScaleExchange]) -> None:
    """A rank was told of its end first, and does not come: nothing interrupts gloo's own wait for it."""
    over = Deadline(0.3)

    def look() -> None:
        if over.passed:
            raise PushAborted("trainer rank 2 is lost")

    started = time.monotonic()
    found = push(exchanges, "1.2.1", 60.0, range(RANKS - 1), look)
    assert time.monotonic() - started < 20.0
    assert all(isinstance(each, PushAborted) for each in found), found
    assert push(exchanges, "1.3.1", 10.0) == [[RANKS - 1, 0, 7]] * RANKS


def test_one_rank_agrees_with_itself() -> None:
    assert ScaleExchange(None, 0, 1).within("1.1.1", Deadline(0.0), {0: ""}, lambda: None)(vector(0)).tolist() == [
        0,
        0,
        7,
    ]

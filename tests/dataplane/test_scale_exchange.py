"""Trainer ranks agree on FP8 scales by real gloo, each rank a thread here, and again after one of them stayed away."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from weightsync.errors import TransportError
from weightsync.scale_exchange import ScaleExchange
from weightsync.waiting import Deadline

RANKS = 3


def vector(rank: int) -> torch.Tensor:
    return torch.tensor([rank, -rank, 7], dtype=torch.int32)


@pytest.fixture
def exchanges() -> list[ScaleExchange]:
    store = dist.HashStore()
    return [ScaleExchange(store, rank, RANKS) for rank in range(RANKS)]


def push(exchanges: list[ScaleExchange], push_id: str, timeout_s: float, ranks: range = range(RANKS)) -> list[object]:
    """What `ranks` find, or what they raise."""

    def one(rank: int) -> object:
        try:
            return exchanges[rank].within(push_id, Deadline(timeout_s))(vector(rank)).tolist()
        except TransportError as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, ranks))


def test_every_rank_has_the_maximum_push_after_push(exchanges: list[ScaleExchange]) -> None:
    for push_id in ("1.1.1", "1.2.1"):
        assert push(exchanges, push_id, 10.0) == [[RANKS - 1, 0, 7]] * RANKS


@pytest.mark.parametrize("met_before", [False, True], ids=["meeting", "exchanging"])
def test_a_rank_that_stays_away_holds_the_others_to_the_deadline_and_the_next_push_works(
    exchanges: list[ScaleExchange], met_before: bool
) -> None:
    """Without `forget` in `_agree` and after it, the last exchange fails: the group of the second one is of no use."""
    if met_before:
        push(exchanges, "1.1.1", 10.0)
    started = time.monotonic()
    found = push(exchanges, "1.2.1", 1.0, range(RANKS - 1))
    assert time.monotonic() - started < 3.0
    assert all(isinstance(each, TransportError) and "push 1.2.1 had left" in str(each) for each in found), found
    for exchange in exchanges:  # the rank that stayed away hears of the push's end in the ledger
        exchange.forget()
    assert push(exchanges, "1.3.1", 10.0) == [[RANKS - 1, 0, 7]] * RANKS


def test_ranks_that_differ_about_how_a_push_ended_agree_again_one_push_later(exchanges: list[ScaleExchange]) -> None:
    push(exchanges, "1.1.1", 10.0)
    exchanges[0].forget()
    found = push(exchanges, "1.2.1", 1.0)
    assert any(isinstance(each, TransportError) for each in found), found
    for exchange in exchanges:
        exchange.forget()
    assert push(exchanges, "1.3.1", 10.0) == [[RANKS - 1, 0, 7]] * RANKS


def test_one_rank_agrees_with_itself() -> None:
    assert ScaleExchange(None, 0, 1).within("1.1.1", Deadline(0.0))(vector(0)).tolist() == [0, 0, 7]

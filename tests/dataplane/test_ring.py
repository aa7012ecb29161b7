"""A ring of arenas: no byte is taken before its readers are done, none lies outside the budget, what arrives is what was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dataplane.push_makers import Bench
from tests.dataplane.test_writer import RECORD, Scripted, make_writer
from weightsync.config import TransferSection
from weightsync.errors import DeadlineExceeded, PlanError
from weightsync.layout.forms import GROUP_ALIGN_BYTES, Group
from weightsync.layout.ring import Ring, make_ring
from weightsync.rendezvous.ledger import Ledger
from weightsync.transport import TransferState
from weightsync.waiting import Deadline
from weightsync.wire import Decision
from weightsync.writer import _Peer

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=24)


def groups_of(lengths: list[int]) -> tuple[list[Group], int]:
    """Groups one behind the other, as an arena has them, and the bytes that they take."""
    padded = [-(-length // GROUP_ALIGN_BYTES) * GROUP_ALIGN_BYTES for length in lengths]
    starts = [0, *accumulate(padded)][: len(lengths)]
    groups = [Group(i, i + 1, start, start + lengths[i]) for i, start in enumerate(starts)]
    return groups, groups[-1].stop_bytes


@given(lengths=LENGTHS, slack=st.integers(0, 20_000))
def test_a_group_takes_only_memory_whose_readers_it_has_waited_for(lengths: list[int], slack: int) -> None:
    """1. each group lies within the budget; 2. whoever lay where it lies has been waited for, by it or by one before it; 3. it
    waits for nobody else: groups that lie elsewhere stay on the wire.
    """
    groups, arena_bytes = groups_of(lengths)
    budget = -(-max(lengths) // GROUP_ALIGN_BYTES) * GROUP_ALIGN_BYTES + slack
    ring = make_ring(groups, arena_bytes, budget)
    spans = [(start, start + g.stop_bytes - g.start_bytes) for g, start in zip(groups, ring.starts, strict=True)]
    assert all(start >= 0 and stop <= ring.length_bytes <= max(budget, 1) for start, stop in spans)
    reading: set[int] = set()
    for number, (start, stop) in enumerate(spans):
        there = {other for other in reading if spans[other][0] < stop and start < spans[other][1]}
        assert there <= ring.after[number] <= reading
        for other in ring.after[number]:
            padded = -(-spans[other][1] // GROUP_ALIGN_BYTES) * GROUP_ALIGN_BYTES
            assert spans[other][0] < -(-stop // GROUP_ALIGN_BYTES) * GROUP_ALIGN_BYTES and start < padded
        reading = (reading - ring.after[number]) | {number}
    assert ring.whole == (arena_bytes <= budget) or len(lengths) == 1


@given(lengths=LENGTHS)
def test_without_a_budget_or_within_it_everything_lies_where_it_did(lengths: list[int]) -> None:
    groups, arena_bytes = groups_of(lengths)
    for budget in (None, arena_bytes, arena_bytes + 1):
        ring = make_ring(groups, arena_bytes, budget)
        assert ring == Ring(arena_bytes, tuple(group.start_bytes for group in groups), (frozenset(),) * len(groups))


def test_a_group_that_is_more_than_the_budget_is_refused_with_the_numbers() -> None:
    groups, arena_bytes = groups_of([100, 3000])
    with pytest.raises(PlanError, match=r"arenaBudget is 2048 bytes, and group 1 of 2, slots 1 to 2, takes 3072 alone"):
        make_ring(groups, arena_bytes, 2048)


def test_a_ring_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="arenaBudgetBytes needs commit staged"):
        TransferSection(arena_budget_bytes=1)


@pytest.fixture
def staged(open_ledger: Callable[..., Ledger]) -> Iterator[Bench]:
    made = Bench(open_ledger, commit="staged", staging="device")
    yield made
    made.close()


@pytest.mark.failure_mode(48)
def test_versions_through_a_ring_arrive_byte_for_byte(staged: Bench) -> None:
    """1. The arena is smaller than what it carries; 2. each of
    three versions is held byte for byte, and its digests agree; 3. a catch-up from it is refused, since it holds no version.
    """
    trainer = staged.trainer(budget_bytes=8192)
    for version in (1, 2, 3):
        record = staged.begin(trainer)
        staged.receiver.open(record)
        written = trainer.convert_and_write(record, version)
        assert (trainer.slots.buffer.numel(), trainer.slots.whole) == (8192, False)
        assert (written.failed, written.bytes > 8192) == ({}, True)
        staged.voted(record)
        assert staged.ledger.decide(record.push_id, Decision.COMMIT).decision is Decision.COMMIT
        staged.receiver.commit(record.push_id)
        assert staged.holds(version)
    with pytest.raises(PlanError, match="the arenas hold no whole version"):
        staged.begin(trainer, catch_up=True)


class Slots:
    """Three groups of which the last takes the memory of the first; notes which transfers had ended when it was converted."""

    def __init__(self, transfers: list[Scripted]) -> None:
        self.groups, self.ring = [None] * 3, Ring(2, (0, 1, 0), (frozenset(), frozenset(), frozenset({0})))
        self.buffer = SimpleNamespace(is_cuda=False)
        self.seen: list[bool] = []
        self._transfers = transfers

    def fill_group(self, number: int) -> Callable[[], bool]:
        if number == 2:
            self.seen = [transfer.ended for transfer in self._transfers]
        return lambda: True

    def check(self) -> None: ...


def ring_writer(polls: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Slots]:
    """A writer of three groups to one peer; group 0's transfer is in flight for so many polls."""
    transfers = [Scripted("first", n, TransferState.DONE) for n in (polls, 10**6, 1)]
    writer, _ = make_writer()
    writer._slots = slots = Slots(transfers)  # type: ignore[assignment]
    monkeypatch.setattr(writer, "_post_elsewhere", lambda *_: None)
    writer._peers["first", 0, "i"] = _Peer("first", "layout", tuple(transfers))  # type: ignore[arg-type]
    writer._planned["layout"] = SimpleNamespace(meters=[SimpleNamespace(launch=lambda: None)] * 3, partials=dict)  # type: ignore[assignment]
    return writer, slots


def test_a_group_is_not_converted_over_one_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group 1, which lies elsewhere, is on its way still, and not waited for."""
    writer, slots = ring_writer(50, monkeypatch)
    monkeypatch.setattr(writer, "_finish", lambda *_: None)
    writer.convert_and_write(RECORD, {"first"}, Deadline(30), frozenset)
    assert slots.seen == [True, False, False]


def test_a_peer_that_keeps_its_arena_beyond_the_deadline_ends_the_push_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, slots = ring_writer(10**6, monkeypatch)
    monkeypatch.setattr(writer, "_wait_terminal", lambda *_: None)
    with pytest.raises(DeadlineExceeded, match="the arena is full of groups that are on their way to 1 peers, first"):
        writer.convert_and_write(RECORD, {"first"}, Deadline(0.05), frozenset)
    assert slots.seen == []

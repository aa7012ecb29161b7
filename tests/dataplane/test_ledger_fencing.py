"""Fences: which message about a push is believed, and which push a receiver may open."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.errors import FencedOut
from weightsync.rendezvous.fencing import Fence, Notification
from weightsync.rendezvous.records import PushRecord

PUSH = PushRecord(
    push_id="5.12.3",
    session="s1",
    epoch=5,
    version=12,
    attempt=3,
    step=0,
    catch_up=False,
    deadline_at=0.0,
    writers=2,
    plan_digests={"layout-a": "plan-a", "layout-b": "plan-b"},
    members={},
)
FENCE = Fence.of(PUSH, "layout-a")
SAID = Notification(
    session="s1",
    push_id="5.12.3",
    epoch=5,
    version=12,
    plan_digest="plan-a",
    writer_rank=1,
    bytes_written=1 << 40,
    partial_digests={0: (1 << 64) - 1, 7: 0},
)


@given(
    partials=st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), max_size=50),
    bytes_written=st.integers(0, 2**63),
    push_id=st.text(max_size=20),
)
def test_notification_comes_back_as_it_was_sent(partials: dict[int, int], bytes_written: int, push_id: str) -> None:
    said = dataclasses.replace(SAID, partial_digests=partials, bytes_written=bytes_written, push_id=push_id)
    assert Notification.decode(said.encode()) == said


def test_notification_of_a_large_engine_stays_small() -> None:
    said = dataclasses.replace(SAID, partial_digests=dict.fromkeys(range(20_000), 1))
    assert len(said.encode()) < 20_000 * 17


@given(message=st.binary(max_size=200))
def test_noise_is_refused_and_never_crashes(message: bytes) -> None:
    with pytest.raises(FencedOut, match="is not ours"):
        Notification.decode(message)


@given(cut=st.integers(0, len(SAID.encode()) - 1))
def test_cut_notification_is_refused(cut: int) -> None:
    with pytest.raises(FencedOut, match="is not ours"):
        Notification.decode(SAID.encode()[:cut])


def test_word_of_this_push_is_believed() -> None:
    SAID.require(FENCE)


@pytest.mark.failure_mode(19)
@pytest.mark.parametrize(
    "change", [{"session": "s2"}, {"push_id": "5.12.2"}, {"epoch": 4}, {"version": 11}, {"plan_digest": "plan-b"}]
)
def test_word_of_another_push_session_or_plan_is_refused(change: dict[str, object]) -> None:
    (field,) = change
    with pytest.raises(FencedOut, match=rf"writer 1 speaks of {field} "):
        dataclasses.replace(SAID, **change).require(FENCE)  # type: ignore[arg-type]


def test_push_without_a_plan_for_the_layout_is_refused() -> None:
    with pytest.raises(FencedOut, match="no plan for layout layout-c; it has plans for layout-a, layout-b"):
        Fence.of(PUSH, "layout-c")


@pytest.mark.parametrize(
    ("held", "seen_epoch", "repairs"),
    [
        ((5, 11), 5, False),
        ((4, 57), 4, False),  # a trainer that went back to an older step is a newer epoch (failure mode 49)
        ((0, 0), 0, False),
        ((5, 12), 5, True),  # a catch-up, or the repair of a DIRTY engine at its own version (failure mode 49)
    ],
)
@pytest.mark.failure_mode(49)
def test_push_that_is_newer_or_repairs_may_be_opened(held: tuple[int, int], seen_epoch: int, repairs: bool) -> None:
    FENCE.require_admissible(session="s1", seen_epoch=seen_epoch, held=held, repairs=repairs)


@pytest.mark.parametrize(
    ("held", "seen_epoch", "repairs", "why"),
    [
        ((5, 12), 5, False, r"brings \(epoch, version\) \(5, 12\), this engine holds \(5, 12\)"),
        ((5, 13), 5, True, r"this engine holds \(5, 13\)"),
        ((5, 11), 6, False, "has seen epoch 6"),
        ((6, 1), 6, True, "has seen epoch 6"),
    ],
)
@pytest.mark.failure_mode(19)
def test_older_push_is_refused(held: tuple[int, int], seen_epoch: int, repairs: bool, why: str) -> None:
    with pytest.raises(FencedOut, match=why):
        FENCE.require_admissible(session="s1", seen_epoch=seen_epoch, held=held, repairs=repairs)


def test_push_of_another_session_is_refused() -> None:
    with pytest.raises(FencedOut, match="is of session s1, this engine of s9"):
        FENCE.require_admissible(session="s9", seen_epoch=0, held=(0, 0), repairs=False)

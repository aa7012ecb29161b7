"""Slots that nothing converts, read where the model keeps them, and what of a rank's writes comes from which memory. Pure.

Plans speak of an arena in which everything lies, so that every rank plans alike whatever is copied where. Here a rank's own writes
are cut at the bounds of its live slots, and counted from where the bytes are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence, Set

import numpy as np

from weightsync.layout.forms import Group
from weightsync.layout.records import ITEM_BYTES

ARENA = -1
"""The owner of bytes that are in the arena."""


@dataclasses.dataclass(frozen=True)
class LiveSpan:
    """Bytes [start, stop) of the arena as it is planned with, which nobody copies there."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Share:
    """Writes (dtype `plan.WRITE`) that come from one memory; `slot_offset` counts elements from its first byte."""

    owner: int
    """Index of the live span, ARENA for the arena's buffer."""
    writes: np.ndarray


def shares(
    writes: np.ndarray, item_bytes: np.ndarray, groups: Sequence[Group], shifts: Sequence[int], live: Sequence[LiveSpan]
) -> tuple[tuple[Share, ...], ...]:
    """By group: a rank's writes by the memory that they come from.

    item_bytes: [targets] size of an element. shifts: of each group, from the arena into its buffer. live: ascending, apart.
    """
    writes = cut(writes, item_bytes, live)
    size = item_bytes[writes["target_index"]]
    first = writes["slot_offset"] * size
    group = np.searchsorted([g.stop_bytes for g in groups], first, side="right")
    owner = _owner(first, live)
    moved = np.array(shifts, dtype=np.int64)
    origin = np.array([-span.start for span in live] or [0], dtype=np.int64)
    if len(writes):
        writes["slot_offset"] += np.where(owner == ARENA, moved[group], origin[np.maximum(owner, 0)]) // size
    return tuple(tuple(_by_owner(writes[group == number], owner[group == number])) for number in range(len(groups)))


def cut(writes: np.ndarray, item_bytes: np.ndarray, live: Sequence[LiveSpan]) -> np.ndarray:
    """The same writes, none of them across a bound of a live span: neighbours in the arena lie apart in the model."""
    if not live or not len(writes):
        return writes.copy()
    bounds = np.unique([bound for span in live for bound in (span.start, span.stop)])
    size = item_bytes[writes["target_index"]]
    first = writes["slot_offset"] * size
    last = first + writes["length"] * size
    low = np.searchsorted(bounds, first, side="right")
    count = np.searchsorted(bounds, last - 1, side="right") - low + 1
    row = np.repeat(np.arange(len(writes)), count)
    step = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    inner = np.concatenate([bounds, [np.iinfo(np.int64).max]])
    begin = np.where(step == 0, first[row], inner[low[row] + step - 1])
    end = np.minimum(last[row], inner[low[row] + step])
    parts = writes[row]
    parts["slot_offset"] = begin // size[row]
    parts["target_offset"] += (begin - first[row]) // size[row]
    parts["length"] = (end - begin) // size[row]
    return parts


def begins(groups: Sequence[Group], offsets: Sequence[int], live_slots: Set[int]) -> tuple[int, ...]:
    """Of each group the first byte that is not live; its end where all are. offsets: first byte of each slot."""
    first = [next((i for i in range(g.first, g.stop) if i not in live_slots), None) for g in groups]
    return tuple(group.stop_bytes if i is None else offsets[i] for group, i in zip(groups, first, strict=True))


def span_of(offset_bytes: int, numel: int, dtype: str) -> LiveSpan:
    """Of a slot, by its place in the arena as it is planned with."""
    return LiveSpan(offset_bytes, offset_bytes + numel * ITEM_BYTES[dtype])


def _owner(first: np.ndarray, live: Sequence[LiveSpan]) -> np.ndarray:
    if not live:
        return np.full(len(first), ARENA)
    index = np.searchsorted([span.start for span in live], first, side="right") - 1
    inside = (index >= 0) & (first < np.array([span.stop for span in live])[np.maximum(index, 0)])
    return np.where(inside, index, ARENA)


def _by_owner(writes: np.ndarray, owner: np.ndarray) -> Iterator[Share]:
    order = np.argsort(owner, kind="stable")
    writes, owner = writes[order], owner[order]
    bounds = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            yield Share(int(owner[start]), writes[start:stop])

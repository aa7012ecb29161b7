"""Which element comes from which, told element by element, as few strided boxes. numpy only.

A loader may gather, repeat or concatenate small tensors (block scales that vLLM refines for a tensor-parallel rank). Fed with
tensors whose elements are their own numbers, it stores a map of numbers; a map is boxes that `records.Copy` can express.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """Elements of a map, at `at` and on from there with `shape`: number `start` plus `strides` times the place in the box."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]
    """None is negative; 0 repeats an element."""


def boxes(numbers: np.ndarray, bounds: np.ndarray) -> Iterator[Box]:
    """Boxes that hold each element of a map once, none of them across a bound.

    numbers: [..] integers. bounds: [B] ascending; a box's numbers lie between two neighbouring ones.
    """
    if numbers.size:
        yield from _within(numbers, np.searchsorted(bounds, numbers, side="right"), (0,) * numbers.ndim)


def _within(numbers: np.ndarray, owner: np.ndarray, at: tuple[int, ...]) -> Iterator[Box]:
    if (owner == owner.flat[0]).all():
        yield from _separated(numbers, at)
        return
    rows = owner.reshape(len(owner), -1)
    only = [int(row[0]) if (row == row[0]).all() else None for row in rows]
    for one, group in itertools.groupby(range(len(only)), key=lambda row: only[row]):
        members = list(group)
        if one is not None:
            yield from _separated(numbers[members[0] : members[-1] + 1], (at[0] + members[0], *at[1:]))
            continue
        for row in members:
            for box in _within(numbers[row], owner[row], at[1:]):
                yield _beneath(at[0] + row, box)


def _separated(numbers: np.ndarray, at: tuple[int, ...]) -> Iterator[Box]:
    """When numbers are a sum of one term for each dim, the boxes are the product of the terms' runs; else row by row."""
    first = int(numbers.flat[0])
    terms = [
        numbers[(0,) * dim + (slice(None),) + (0,) * (numbers.ndim - dim - 1)] - first for dim in range(numbers.ndim)
    ]
    total = np.full(numbers.shape, first, dtype=np.int64)
    for dim, term in enumerate(terms):
        total += term.reshape([-1 if d == dim else 1 for d in range(numbers.ndim)])
    if not np.array_equal(total, numbers):
        for row in range(len(numbers)):
            for box in _separated(numbers[row], at[1:]):
                yield _beneath(at[0] + row, box)
        return
    for runs in itertools.product(*(list(_runs(term)) for term in terms)):
        yield Box(
            at=tuple(start + run[0] for start, run in zip(at, runs, strict=True)),
            shape=tuple(run[1] for run in runs),
            start=first + sum(run[2] for run in runs),
            strides=tuple(run[3] for run in runs),
        )


def _beneath(row: int, box: Box) -> Box:
    return Box((row, *box.at), (1, *box.shape), box.start, (0, *box.strides))


def _runs(term: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(place, length, value, step) of maximal runs with one step that is not negative."""
    steps = np.diff(term).tolist()
    place = 0
    while place < len(term):
        step = steps[place] if place < len(steps) and steps[place] >= 0 else 0
        stop = place + 1
        while stop < len(term) and steps[stop - 1] == step:
            stop += 1
        yield place, stop - place, int(term[place]), step if stop - place > 1 else 0
        place = stop

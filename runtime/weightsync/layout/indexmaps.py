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
    """Elements of a map: number `start` at the place `at`, and on from there along some of its dims, maybe along one twice."""

    at: tuple[int, ...]
    start: int
    shape: tuple[int, ...]
    """How often each step is taken."""
    strides: tuple[int, ...]
    """What a step adds to the number: nothing negative; 0 repeats an element."""
    steps: tuple[tuple[int, int], ...]
    """(dim of the map, places along it) of a step."""


Runs = tuple[int, int, tuple[tuple[int, int, int], ...]]
"""(place, value, ((count, stride, places), ..)) of a part of one dim."""


def boxes(numbers: np.ndarray, bounds: np.ndarray) -> Iterator[Box]:
    """Boxes that hold each element of a map once, none of them across a bound.

    numbers: [..] integers. bounds: [B] ascending; a box's numbers lie between two neighbouring ones.
    """
    if numbers.size:
        yield from _within(numbers, np.searchsorted(bounds, numbers, side="right"), (0,) * numbers.ndim, 0)


def _within(numbers: np.ndarray, owner: np.ndarray, at: tuple[int, ...], dim: int) -> Iterator[Box]:
    """Boxes of the map's part at `at`, which has the map's dims from `dim` on."""
    if (owner == owner.flat[0]).all():
        yield from _separated(numbers, at, dim)
        return
    rows = owner.reshape(len(owner), -1)
    only = [int(row[0]) if (row == row[0]).all() else None for row in rows]
    for one, group in itertools.groupby(range(len(only)), key=lambda row: only[row]):
        members = list(group)
        if one is not None:
            yield from _separated(numbers[members[0] : members[-1] + 1], _moved(at, dim, members[0]), dim)
            continue
        for row in members:
            yield from _within(numbers[row], owner[row], _moved(at, dim, row), dim + 1)


def _separated(numbers: np.ndarray, at: tuple[int, ...], dim: int) -> Iterator[Box]:
    """When numbers are a sum of one term for each dim, the boxes are the product of the terms' runs; else row by row."""
    n_dims, first = numbers.ndim, int(numbers.flat[0])
    terms = [numbers[(0,) * d + (slice(None),) + (0,) * (n_dims - d - 1)] - first for d in range(n_dims)]
    total = np.full(numbers.shape, first, dtype=np.int64)
    for d, term in enumerate(terms):
        total += term.reshape([-1 if other == d else 1 for other in range(n_dims)])
    if not np.array_equal(total, numbers):
        for row in range(len(numbers)):
            yield from _separated(numbers[row], _moved(at, dim, row), dim + 1)
        return
    for runs in itertools.product(*(list(_runs(term)) for term in terms)):
        steps = [(count, stride, (dim + d, places)) for d, run in enumerate(runs) for count, stride, places in run[2]]
        yield Box(
            at=at[:dim] + tuple(start + run[0] for start, run in zip(at[dim:], runs, strict=True)),
            start=first + sum(run[1] for run in runs),
            shape=tuple(count for count, *_ in steps),
            strides=tuple(stride for _, stride, _ in steps),
            steps=tuple(step for *_, step in steps),
        )


def _moved(at: tuple[int, ...], dim: int, row: int) -> tuple[int, ...]:
    return (*at[:dim], at[dim] + row, *at[dim + 1 :])


def _runs(term: np.ndarray) -> Iterator[Runs]:
    """Parts of a dim: values that grow by one step, each of them as often repeated as the others."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(term)) + 1])
    repeats = np.diff(np.append(starts, len(term))).tolist()
    values, places = term[starts].tolist(), starts.tolist()
    k = 0
    while k < len(values):
        stride = values[k + 1] - values[k] if k + 1 < len(values) else 0
        stop = k + 1
        while (
            stride > 0
            and stop < len(values)
            and repeats[stop] == repeats[k]
            and values[stop] - values[stop - 1] == stride
        ):
            stop += 1
        dims = ((stop - k, stride, repeats[k]),) if stop - k > 1 else ()
        dims += ((repeats[k], 0, 1),) if repeats[k] > 1 else ()
        yield places[k], values[k], dims
        k = stop

"""Strided views reduced to runs of neighbouring elements. Imports numpy and the errors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from weightsync.errors import PlanError

Outer = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def canonical(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[Outer, int]:
    """Merge the dims of views of one shape as far as all of them allow.

    Returns (outer, run): `outer` lists (count, stride in each view) with strides of the first view descending, `run`
    is the number of elements that are neighbours in every view. A shape without elements gives a run of 0. Raises PlanError
    for what no tensor has.
    """
    if any(len(view) != len(shape) or min(view, default=0) < 0 for view in strides) or min(shape, default=0) < 0:
        raise PlanError(
            f"no view has shape {shape} and strides {strides}: one count and one stride a dim, none negative"
        )
    if 0 in shape:
        return (), 0
    dims = sorted(
        ((n, *s) for n, *s in zip(shape, *strides, strict=True) if n > 1), key=lambda dim: dim[1:], reverse=True
    )
    merged: list[tuple[int, ...]] = []
    for dim in dims:
        n = dim[0]
        if merged and all(outer == n * inner for outer, inner in zip(merged[-1][1:], dim[1:], strict=True)):
            merged[-1] = (merged[-1][0] * n, *dim[1:])
        else:
            merged.append(dim)
    innermost = next((dim for dim in merged if all(stride == 1 for stride in dim[1:])), (1,))
    return tuple(dim for dim in merged if dim is not innermost), innermost[0]


def extent(outer: Outer, run: int, view: int = 0) -> int:
    """Elements from the first to the last that the canonical form touches in its view number `view`, both included."""
    return run + sum((n - 1) * strides[view] for n, *strides in outer)


def steps(outer: Outer, view: int = 0) -> np.ndarray:
    """Offset of each run of the canonical form from the first one, in its view number `view`."""
    offsets = np.zeros(1, dtype=np.int64)
    for n, *strides in outer:
        offsets = (offsets[:, None] + np.arange(n) * strides[view]).ravel()
    return offsets


def is_nested(outer: Outer, run: int) -> bool:
    """True when the first view's dims (strides descending) lie inside one another, so that no element is met twice."""
    inside = run
    for n, stride, *_ in reversed(outer):
        if stride < inside:
            return False
        inside += (n - 1) * stride
    return True


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [c0, c1, ..]: which entry each of sum(counts) items belongs to, and its number within it."""
    owner = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - first[owner]

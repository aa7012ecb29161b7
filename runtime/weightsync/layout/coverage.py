"""The proof that a layout gives every element of every target a value, exactly once. numpy only."""

from __future__ import annotations

import numpy as np

from weightsync.errors import CoverageError, PlanError
from weightsync.layout.records import Shape, Target, TargetLayout
from weightsync.layout.strides import canonical, extent, spread, steps
from weightsync.layout.table import Axis

SHOWN = 5
"""Faults that a message spells out; the rest are counted."""


def prove_coverage(layout: TargetLayout, targets: Axis[Target]) -> None:
    """Raise CoverageError naming each target of which an element is written by nobody, or more than once.

    Raises PlanError for a write outside its target.
    """
    faults = coverage_faults(layout, targets)
    if faults:
        raise CoverageError(listed([message for _, message in faults]))


def coverage_faults(layout: TargetLayout, targets: Axis[Target]) -> list[tuple[str, str]]:
    """(target, what is wrong) for each target of which an element is written by nobody, or more than once.

    Raises PlanError for a write outside its target.
    """
    start, stop = _written(layout, targets)
    order = np.lexsort((stop, start))
    start, stop = start[order], stop[order]
    reached = np.concatenate([[0], np.maximum.accumulate(stop)]) if len(stop) else np.zeros(1, dtype=np.int64)
    ends = np.concatenate([start, targets.bounds[-1:]])
    gaps, overlaps = ends > reached, ends < reached
    overlaps[-1] = False
    if not gaps.any() and not overlaps.any():
        return []
    faults = _missing(targets, reached[gaps], ends[gaps])
    _, first = np.unique(np.searchsorted(targets.bounds, ends[overlaps], side="right"), return_index=True)
    return faults + [_twice(layout, targets, position) for position in ends[overlaps][first].tolist()]


def listed(faults: list[str]) -> str:
    """The first few of many faults, and how many there are."""
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def target_ranges(targets: Axis[Target], views: list[tuple[str, int, Shape, Shape]]) -> tuple[np.ndarray, np.ndarray]:
    """Ranges [start, stop) of the target axis that views (target, offset, strides, shape) touch, [R] each."""
    if not views:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    numbers: dict[tuple[Shape, Shape], int] = {}
    form = np.fromiter((numbers.setdefault((s, t), len(numbers)) for _, _, t, s in views), np.int64)
    target = np.fromiter((targets.index[name] for name, *_ in views), np.int64)
    offset = np.fromiter((offset for _, offset, *_ in views), np.int64)
    forms = [canonical(shape, strides) for shape, strides in numbers]
    reach = np.fromiter((extent(outer, run) for outer, run in forms), np.int64)
    outside = (offset < 0) | (offset + reach[form] > np.diff(targets.bounds)[target])
    for name, at, _, shape in (views[i] for i in np.flatnonzero(outside).tolist()):
        numel = targets.tensors[targets.index[name]].numel
        raise PlanError(f"{name}: a write at element {at}, shape {shape}, leaves its {numel} elements")
    order = np.argsort(form, kind="stable")
    begins = np.split((targets.bounds[target] + offset)[order], np.cumsum(np.bincount(form))[:-1])
    starts = [(first[:, None] + steps(outer)).ravel() for first, (outer, _) in zip(begins, forms, strict=True)]
    lengths = np.repeat(np.fromiter((run for _, run in forms), np.int64), [len(each) for each in starts])
    start = np.concatenate(starts)
    return start[lengths > 0], (start + lengths)[lengths > 0]


def _written(layout: TargetLayout, targets: Axis[Target]) -> tuple[np.ndarray, np.ndarray]:
    views = [(c.target, c.target_offset, c.target_strides, c.shape) for c in layout.copies]
    views += [(f.target, f.offset, f.strides, f.shape) for f in layout.fills]
    unknown = sorted({name for name, *_ in views} - targets.index.keys())
    if unknown:
        raise PlanError(
            f"writes to {', '.join(unknown[:SHOWN])} ({len(unknown)} names), which the layout does not list as targets"
        )
    return target_ranges(targets, views)


def _missing(targets: Axis[Target], starts: np.ndarray, stops: np.ndarray) -> list[tuple[str, str]]:
    """One fault a target, for gaps [start, stop) of the target axis; a gap may span several targets."""
    begin = np.searchsorted(targets.bounds, starts, side="right") - 1
    gap, number = spread(np.searchsorted(targets.bounds, stops, side="left") - begin)
    target = begin[gap] + number
    low = np.maximum(starts[gap], targets.bounds[target]) - targets.bounds[target]
    high = np.minimum(stops[gap], targets.bounds[target + 1]) - targets.bounds[target]
    lost = np.bincount(target, weights=high - low, minlength=len(targets.tensors)).astype(np.int64)
    found, first = np.unique(target, return_index=True)
    return [
        (targets.tensors[i].name, _gap(targets.tensors[i], int(low[at]), int(high[at]), int(lost[i])))
        for i, at in zip(found.tolist(), first.tolist(), strict=True)
        if lost[i]
    ]


def _gap(target: Target, start: int, stop: int, count: int) -> str:
    return (
        f"{target.name} {list(target.shape)}: {count} of {target.numel} elements are written by nobody, "
        f"first [{start}, {stop}): offer the loader the source tensor that it lacks"
    )


def _twice(layout: TargetLayout, targets: Axis[Target], position: int) -> tuple[str, str]:
    target, element = targets.locate(position)
    origins = sorted({c.source for c in layout.copies if c.target == target.name})
    origins += ["a fill"] * any(f.target == target.name for f in layout.fills)
    message = (
        f"{target.name} {list(target.shape)}: element {element} is written more than once "
        f"(the target gets {', '.join(origins[:SHOWN])}): offer one of them"
    )
    return target.name, message

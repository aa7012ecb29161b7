"""What stays of a loader's fills once its copies are known. No torch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from weightsync.errors import UnsupportedLayout
from weightsync.layout.coverage import target_ranges
from weightsync.layout.records import Copy, Fill, Target
from weightsync.layout.table import Axis

Range = tuple[int, int]


def surviving_fills(
    fills: Sequence[tuple[Fill, int]], copies: Sequence[Copy], targets: Axis[Target]
) -> tuple[Fill, ...]:
    """Fills as contiguous ranges, less what later copies and fills overwrite.

    Each fill comes with the number of copies that preceded it. Raises UnsupportedLayout when one erases copied
    elements.
    """
    result: list[Fill] = []
    for name in sorted({fill.target for fill, _ in fills}):
        mine = [(i, copy) for i, copy in enumerate(copies) if copy.target == name]
        base = int(targets.bounds[targets.index[name]])
        taken = _union(range_ for _, copy in mine for range_ in _copied(targets, copy))
        for fill, n_before in [entry for entry in reversed(fills) if entry[0].target == name]:
            filled = _filled(targets, fill)
            earlier = _union(range_ for i, copy in mine if i < n_before for range_ in _copied(targets, copy))
            if any(list(_subtract(range_, earlier)) != [range_] for range_ in filled):
                raise UnsupportedLayout(f"the loader fills elements of {name} that it copied a source into before")
            kept = [piece for range_ in filled for piece in _subtract(range_, taken)]
            result += [Fill(name, low - base, (1,), (high - low,), fill.value_bits) for low, high in kept]
            taken = _union([*taken, *kept])
    return tuple(result)


def _copied(targets: Axis[Target], copy: Copy) -> Iterator[Range]:
    return _ranges(targets, (copy.target, copy.target_offset, copy.target_strides, copy.shape))


def _filled(targets: Axis[Target], fill: Fill) -> list[Range]:
    return _union(_ranges(targets, (fill.target, fill.offset, fill.strides, fill.shape)))


def _ranges(targets: Axis[Target], view: tuple[str, int, tuple[int, ...], tuple[int, ...]]) -> Iterator[Range]:
    start, stop = target_ranges(targets, [view])
    return zip(start.tolist(), stop.tolist(), strict=True)


def _union(ranges: Iterator[Range] | Sequence[Range]) -> list[Range]:
    """Sorted, disjoint, neighbours joined."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _subtract(range_: Range, taken: Sequence[Range]) -> Iterator[Range]:
    """What of a range lies in none of the sorted, disjoint ones."""
    low, high = range_
    for start, stop in taken[max(0, bisect.bisect_right(taken, (low, low)) - 1) :]:
        if start >= high:
            break
        if low < start:
            yield low, start
        low = max(low, stop)
    if low < high:
        yield low, high

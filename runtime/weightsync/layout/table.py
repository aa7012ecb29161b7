"""The loader's copies as numpy columns, so that a plan of tens of thousands of tensors is arithmetic on arrays.

All source tensors lie one behind the other on one axis (the source axis): a position on it is a source element. Copies of one
shape and strides (a form) are reduced once; what is done for each copy is arithmetic. Imports numpy and the records.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

import numpy as np

from weightsync.errors import PlanError, UnsupportedLayout
from weightsync.layout.records import Copy, Shape, SourceTensor, Target, TargetLayout
from weightsync.layout.strides import canonical, extent, is_nested, spread

T = TypeVar("T", SourceTensor, Target)


class Axis(Generic[T]):
    """Tensors laid one behind the other, sorted by name."""

    def __init__(self, tensors: Sequence[T]) -> None:
        self.tensors = sorted(tensors, key=attrgetter("name"))
        self.index = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        if len(self.index) != len(self.tensors):
            twice = next(a.name for a, b in itertools.pairwise(self.tensors) if a.name == b.name)
            raise PlanError(f"tensor {twice} is listed twice in one layout")
        self.bounds = np.cumsum([0, *(math.prod(tensor.shape) for tensor in self.tensors)], dtype=np.int64)
        """[len(tensors) + 1]: tensor i takes positions [bounds[i], bounds[i + 1])."""

    def locate(self, position: int) -> tuple[T, int]:
        """The tensor at a position and the element's index in it."""
        i = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return self.tensors[i], position - int(self.bounds[i])


@dataclasses.dataclass(frozen=True)
class CopyTable:
    """Row c is one copy: `run[c]` neighbouring elements, repeated over K outer dims (count 1 where it has fewer).

    Outer dims are sorted by descending source stride and lie inside one another on the source side, or have stride 0.
    """

    source_start: np.ndarray
    """[C] position of the first element on the source axis."""
    target: np.ndarray
    """[C] index of the target among the sorted targets."""
    target_start: np.ndarray
    """[C] element index within the target."""
    count: np.ndarray
    source_stride: np.ndarray
    target_stride: np.ndarray
    """[C, K] each."""
    run: np.ndarray
    """[C]"""

    @property
    def extent(self) -> np.ndarray:
        """[C] positions from the first to the last element read, both included."""
        return self.run + ((self.count - 1) * self.source_stride).sum(1)

    @property
    def numel(self) -> np.ndarray:
        """[C] elements of each copy."""
        return self.run * self.count.prod(1)

    def reads(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which copy reads how many elements of which of these ascending, disjoint ranges of the source axis.

        Returns (copy, range, count), [P] each, of the pairs that read something.
        """
        first = np.searchsorted(stop, self.source_start, side="right")
        last = np.searchsorted(start, self.source_start + self.extent, side="left")
        copy, number = spread(np.maximum(last - first, 0))
        item = first[copy] + number
        count = self.read_below(copy, stop[item]) - self.read_below(copy, start[item])
        some = count > 0
        return copy[some], item[some], count[some]

    def read_below(self, rows: np.ndarray, position: np.ndarray) -> np.ndarray:
        """[N] how many elements copy rows[n] reads at source positions below position[n], repeats counted."""
        left = position - self.source_start[rows]
        inner = np.multiply.accumulate(np.column_stack([self.run, self.count[:, ::-1]]), axis=1)[:, ::-1][rows]
        total = np.where(left >= self.extent[rows], inner[:, 0], 0)
        left = np.where((left <= 0) | (total > 0), 0, left)
        for k in range(self.count.shape[1]):
            stride, count = self.source_stride[rows, k], self.count[rows, k]
            whole = np.where(stride > 0, np.minimum(left // np.maximum(stride, 1), count), 0)
            total += whole * inner[:, k + 1]
            left = np.where(whole == count, np.where(stride > 0, 0, left), left - whole * stride)
        repeats = np.where(self.source_stride > 0, 1, self.count).prod(1)
        return total + np.minimum(left, self.run[rows]) * repeats[rows]

    def runs_within(self, rows: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, ...]:
        """Runs of copy rows[n] clipped to source positions [start[n], stop[n]).

        Returns (n, source position, target index, target element, length), [R] each.
        """
        item = np.arange(len(rows))
        source, target = self.source_start[rows], self.target_start[rows]
        inside = self.extent[rows]
        for k in range(self.count.shape[1]):
            row = rows[item]
            count, stride = self.count[row, k], self.source_stride[row, k]
            inside = inside - (count - 1) * stride
            step = np.maximum(stride, 1)
            first = np.where(stride > 0, np.clip(-((source + inside - 1 - start[item]) // step), 0, count), 0)
            last = np.where(stride > 0, np.clip(-((source - stop[item]) // step), 0, count), count)
            parent, number = spread(np.maximum(last - first, 0))
            number = number + first[parent]
            source = source[parent] + number * stride[parent]
            target = target[parent] + number * self.target_stride[row, k][parent]
            item, inside = item[parent], inside[parent]
        low, high = np.maximum(source, start[item]), np.minimum(source + self.run[rows[item]], stop[item])
        kept = low < high
        item, source, target, low, high = (column[kept] for column in (item, source, target, low, high))
        return item, low, self.target[rows[item]], target + (low - source), high - low


def copy_table(
    layout: TargetLayout, sources: Axis[SourceTensor], targets: Axis[Target], origin: np.ndarray
) -> CopyTable:
    """Put the copies of a layout in columns; `origin` [n] is where each of the sorted sources begins on the source axis.

    Raises PlanError for a copy that leaves its tensors, UnsupportedLayout for one that reads overlapping windows.
    """
    copies = layout.copies
    source = _column(sources.index.get(c.source, -1) for c in copies)
    target = _column(targets.index.get(c.target, -1) for c in copies)
    source_offset = _column(c.source_offset for c in copies)
    target_offset = _column(c.target_offset for c in copies)
    _check_tensors(copies, sources, targets, source, target)
    numbers: dict[tuple[Shape, Shape, Shape], int] = {}
    form = _column(numbers.setdefault((c.shape, c.source_strides, c.target_strides), len(numbers)) for c in copies)
    forms = [canonical(*views) for views in numbers]
    source_end = source_offset + _column(extent(outer, run, 0) for outer, run in forms)[form]
    target_end = target_offset + _column(extent(outer, run, 1) for outer, run in forms)[form]
    _check_inside(copies, sources, source, source_offset, source_end)
    _check_inside(copies, targets, target, target_offset, target_end)
    overlaps = [not is_nested(tuple(dim for dim in outer if dim[1] > 0), run) for outer, run in forms]
    for copy in _those(copies, np.array(overlaps, dtype=bool)[form]):
        raise UnsupportedLayout(
            f"{copy.target}: the loader reads overlapping windows of {copy.source} "
            f"(shape {copy.shape}, strides {copy.source_strides})"
        )
    depth = max((len(outer) for outer, _ in forms), default=0)
    dims = np.array([[*outer, *[(1, 0, 0)] * (depth - len(outer))] for outer, _ in forms], dtype=np.int64)
    count, source_stride, target_stride = np.moveaxis(dims.reshape(len(forms), depth, 3)[form], 2, 0)
    return CopyTable(
        source_start=origin[source] + source_offset,
        target=target,
        target_start=target_offset,
        count=count,
        source_stride=source_stride,
        target_stride=target_stride,
        run=_column(run for _, run in forms)[form],
    )


def _column(numbers: Iterable[int]) -> np.ndarray:
    return np.fromiter(numbers, np.int64)


def _those(copies: Sequence[Copy], at_fault: np.ndarray) -> list[Copy]:
    return [copies[i] for i in np.flatnonzero(at_fault).tolist()]


def _check_tensors(
    copies: Sequence[Copy], sources: Axis[SourceTensor], targets: Axis[Target], source: np.ndarray, target: np.ndarray
) -> None:
    """Both tensors of each copy are listed (index -1: not), and in one dtype."""
    for copy in _those(copies, (source < 0) | (target < 0)):
        raise PlanError(f"copy from {copy.source} to {copy.target}: its layout does not list both tensors")
    numbers: dict[str, int] = {}
    of_source = _column(numbers.setdefault(tensor.dtype, len(numbers)) for tensor in sources.tensors)
    of_target = _column(numbers.setdefault(tensor.dtype, len(numbers)) for tensor in targets.tensors)
    for copy in _those(copies, of_source[source] != of_target[target]):
        have, want = sources.tensors[sources.index[copy.source]], targets.tensors[targets.index[copy.target]]
        raise PlanError(f"{want.name} is {want.dtype}, but {have.name} is {have.dtype}: writes convert nothing")


def _check_inside(
    copies: Sequence[Copy], axis: Axis[T], tensor: np.ndarray, offset: np.ndarray, end: np.ndarray
) -> None:
    outside = np.flatnonzero((offset < 0) | (end > np.diff(axis.bounds)[tensor]))
    for i in outside.tolist():
        copy, touched = copies[i], axis.tensors[int(tensor[i])]
        raise PlanError(
            f"copy from {copy.source} to {copy.target} touches elements beyond the {touched.numel} of {touched.name}"
        )

"""The loader's copies as numpy columns, so that a plan of tens of thousands of tensors is arithmetic on arrays.

All source tensors lie one behind the other on one axis (the source axis, in the order of sorted names): a position on
it is a source element. Imports numpy and the records.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from weightsync.errors import PlanError, UnsupportedLayout
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.layout.strides import canonical, extent, is_nested, spread

T = TypeVar("T", SourceTensor, Target)


class Axis(Generic[T]):
    """Tensors laid one behind the other, sorted by name."""

    def __init__(self, tensors: Sequence[T]) -> None:
        self.tensors = sorted(tensors, key=lambda tensor: tensor.name)
        self.index = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        if len(self.index) != len(self.tensors):
            twice = next(a.name for a, b in itertools.pairwise(self.tensors) if a.name == b.name)
            raise PlanError(f"tensor {twice} is listed twice in one layout")
        self.bounds = np.cumsum([0, *(tensor.numel for tensor in self.tensors)], dtype=np.int64)
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


def copy_table(layout: TargetLayout, sources: Axis[SourceTensor], targets: Axis[Target]) -> CopyTable:
    """Put the copies of a layout in columns.

    Raises PlanError for a copy that leaves its tensors, UnsupportedLayout for one that reads overlapping windows.
    """
    forms = [_source_form(copy, sources, targets) for copy in layout.copies]
    depth = max((len(outer) for outer, _ in forms), default=0)
    dims = np.array([[*outer, *[(1, 0, 0)] * (depth - len(outer))] for outer, _ in forms], dtype=np.int64).reshape(
        len(forms), depth, 3
    )
    source = np.array([sources.index[copy.source] for copy in layout.copies], dtype=np.int64)
    return CopyTable(
        source_start=sources.bounds[source] + np.array([copy.source_offset for copy in layout.copies], dtype=np.int64),
        target=np.array([targets.index[copy.target] for copy in layout.copies], dtype=np.int64),
        target_start=np.array([copy.target_offset for copy in layout.copies], dtype=np.int64),
        count=dims[:, :, 0],
        source_stride=dims[:, :, 1],
        target_stride=dims[:, :, 2],
        run=np.array([run for _, run in forms], dtype=np.int64),
    )


def _source_form(
    copy: Copy, sources: Axis[SourceTensor], targets: Axis[Target]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    if copy.source not in sources.index or copy.target not in targets.index:
        raise PlanError(f"copy from {copy.source} to {copy.target}: its layout does not list both tensors")
    source, target = sources.tensors[sources.index[copy.source]], targets.tensors[targets.index[copy.target]]
    if source.dtype != target.dtype:
        raise PlanError(f"{target.name} is {target.dtype}, but {source.name} is {source.dtype}: writes convert nothing")
    outer, run = canonical(copy.shape, copy.source_strides, copy.target_strides)
    for view, (tensor, offset) in enumerate(((source, copy.source_offset), (target, copy.target_offset))):
        if offset < 0 or offset + extent(outer, run, view) > tensor.numel:
            raise PlanError(
                f"copy from {copy.source} to {copy.target} touches elements beyond the {tensor.numel} of {tensor.name}"
            )
    if not is_nested(tuple(dim for dim in outer if dim[1] > 0), run):
        raise UnsupportedLayout(
            f"{copy.target}: the loader reads overlapping windows of {copy.source} "
            f"(shape {copy.shape}, strides {copy.source_strides})"
        )
    return outer, run

"""Engines that keep a finer grid of scales than the checkpoint's: one scale a divisor of a block, each repeated.

A rank whose share of a matrix ends inside a block cannot keep one scale a block: vLLM repeats scales until each stands for a part
that lies in one share (96 rows of Qwen3-30B at TP 8: parts of 32 by 32). A trace notes that as copies which read a scale many
times, element by element. Here they are recognised as what they are: a rectangle of the matrix, with a scale for each part of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from weightsync.layout.forms import BLOCK
from weightsync.layout.records import Copy
from weightsync.layout.strides import steps

Block = tuple[int, int]
"""Rows and columns of a matrix that one scale is for."""
WHOLE: Block = (BLOCK, BLOCK)
_SIZES = tuple(BLOCK >> i for i in range(BLOCK.bit_length()))


@dataclasses.dataclass(frozen=True, slots=True)
class Rectangle:
    """What a copy reads of a matrix: rows [row, row + rows), columns [start, stop)."""

    row: int
    rows: int
    start: int
    stop: int

    def grid(self, block: Block, width: int) -> tuple[int, int] | None:
        """Scales down and across; None where a block's end is not the rectangle's. width: columns of the matrix."""
        if self.row % block[0] or self.start % block[1] or (self.stop % block[1] and self.stop != width):
            return None
        return -(-self.rows // block[0]), -(-(self.stop - self.start) // block[1])


class Grids:
    """Recognises grids of scales; those of a layer's experts are alike, and looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], dict[Block, int]] = {}

    def of(self, rectangle: Rectangle, width: int, scales: Sequence[Copy]) -> dict[Block, int]:
        """The blocks that these copies of a matrix's scales can be read as, and for each the elements from one row of scales to the
        next in the target.

        The first scale of the rectangle goes to the least target element. width: columns of the matrix. Empty when the copies are
        something else, or go to several targets.
        """
        if not scales or len({copy.target for copy in scales}) > 1:
            return {}
        first = min(copy.target_offset for copy in scales)
        views = [
            (c.shape, c.source_offset, c.source_strides, c.target_offset - first, c.target_strides) for c in scales
        ]
        key = (rectangle, width, *views)
        if key not in self._known:
            self._known[key] = dict(_fitting(rectangle, width, scales, first))
        return self._known[key]


def _fitting(rectangle: Rectangle, width: int, scales: Sequence[Copy], first: int) -> Iterable[tuple[Block, int]]:
    source, target = _elements(scales, first)
    for block in itertools.product(_SIZES, _SIZES):
        grid = rectangle.grid(block, width)
        if grid is None or grid[0] * grid[1] != len(target):
            continue
        down, across = (np.arange(count) for count in grid)
        stride = int(target[grid[1]]) if grid[0] > 1 else grid[1]
        read = (rectangle.row + down * block[0]) // BLOCK * -(-width // BLOCK)
        want = read[:, None] + (rectangle.start + across * block[1]) // BLOCK
        place = down[:, None] * stride + across
        if np.array_equal(target, place.ravel()) and np.array_equal(source, want.ravel()):
            yield block, stride


def _elements(copies: Sequence[Copy], first: int) -> tuple[np.ndarray, np.ndarray]:
    """(source element, target element from `first` on) of all that copies write, in the order of the target."""
    source, target = [], []
    for copy in copies:
        dims = tuple(zip(copy.shape, copy.source_strides, copy.target_strides, strict=True))
        source.append(copy.source_offset + steps(dims, 0))
        target.append(copy.target_offset - first + steps(dims, 1))
    sources, targets = np.concatenate(source), np.concatenate(target)
    order = np.argsort(targets, kind="stable")
    return sources[order], targets[order]

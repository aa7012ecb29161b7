"""What a trainer rank's slot arena carries: the elements that it holds in the forms that the engines want.

A tensor that an engine stores in FP8 is two tensors to it: `X` as float8_e4m3fn and `X_scale_inv`, one fp32 scale for each block of
128 by 128 (DeepSeek-V3's checkpoint format). A rank that holds some rows of X carries those rows and the scales of every block that
they touch; two ranks that share a block carry the same scale. A matrix that engines want in column slices is carried slice by
slice, also where slices end inside blocks (`layout.packing`). Arenas are laid out in `layout.arenas`. Standard library and records
only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from weightsync.errors import PlanError
from weightsync.layout.records import Holding, Shape, SourceLayout, SourceTensor, TargetLayout

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
FP8 = "float8_e4m3fn"
ALIGN_BYTES = 16
"""Each slot begins at such an address of its arena, for vector loads and for any dtype; scales stand one behind the other."""
GROUP_BYTES = 512 << 20
"""A group's slots are converted together and written together, while the next group is converted."""
GROUP_ALIGN_BYTES = 256
"""Each group begins at such an address."""
SCALE = "float32"
"""Dtype of scales."""


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """A derived tensor: columns [start, stop) of every row of a matrix."""

    name: str
    start: int
    stop: int
    block: tuple[int, int] = (BLOCK, BLOCK)
    """Rows and columns that one carried scale is for, in FP8; they divide a block's, where engines refined their grid."""

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def blocks(self) -> range:
        """Columns of blocks of the matrix that the slice touches."""
        return range(self.start // BLOCK, -(-self.stop // BLOCK))


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A piece of one rank's arena: what becomes of one holding, or of a column slice of it."""

    name: str
    """Of the tensor as it is carried: the holding's, or a derived one."""
    holding: Holding
    """The elements that it is made from, in the checkpoint's dtype: of a trainer's holding, or a part of one."""
    shape: Shape
    """Of the whole tensor as it is carried."""
    dtype: str
    through: str
    """The checkpoint's dtype, which elements are rounded to on the way to `dtype`."""
    offset_bytes: int
    start: int
    stop: int
    """Elements of the carried tensor that it has."""
    part: int = 0
    """Number of the part that it is, of those in which engines want the tensor's rows."""
    columns: Columns | None = None
    """Which columns of the holding's rows; None for all of its elements."""
    scales: Holding | None = None
    """For FP8: the scales of the blocks that it touches; `local_offset` counts fp32 elements of the arena."""

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Of a matrix, how many it has."""
        return self.numel // self.shape[1]

    @property
    def row_start(self) -> int:
        """Index of a matrix's first row in the whole tensor."""
        return self.start // self.shape[1]


@dataclasses.dataclass(frozen=True)
class Group:
    """Slots [first, stop) of an arena and the bytes [start_bytes, stop_bytes) that they and their scales take."""

    first: int
    stop: int
    start_bytes: int
    stop_bytes: int


class BlockRow(NamedTuple):
    """A row of FP8 blocks of a tensor as it is carried."""

    name: str
    number: int
    blocks: int
    """How many."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """What one rank's arena carries, as all ranks know it."""

    layout: SourceLayout
    """In the engines' dtypes, to plan with."""
    arena_bytes: int
    parted: frozenset[BlockRow]
    """Of which one of its slots has some rows only: their greatest elements are agreed upon."""
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Carried(Outline):
    """And how it is made: for the rank itself."""

    slots: tuple[Slot, ...]


def wanted_of(layouts: Mapping[str, TargetLayout]) -> dict[str, SourceTensor]:
    """The source tensors that engines with these layouts (by digest) want, by name.

    Raises PlanError naming a tensor that two of them want in different shapes or dtypes.
    """
    wanted: dict[str, SourceTensor] = {}
    for _, layout in sorted(layouts.items()):
        for tensor in layout.sources:
            other = wanted.setdefault(tensor.name, tensor)
            if other != tensor:
                raise PlanError(
                    f"{tensor.name}: engines want it as {list(tensor.shape)} {tensor.dtype} and as {list(other.shape)} "
                    f"{other.dtype}: all engines of a session must load the same model in the same format"
                )
    return wanted


def scale_grid(shape: Shape, block: tuple[int, int] = (BLOCK, BLOCK)) -> Shape:
    """Blocks of a matrix by rows and columns."""
    rows, columns = shape
    return (-(-rows // block[0]), -(-columns // block[1]))


def aligned(offset_bytes: int, to_bytes: int) -> int:
    """The next multiple of `to_bytes`."""
    return -(-offset_bytes // to_bytes) * to_bytes

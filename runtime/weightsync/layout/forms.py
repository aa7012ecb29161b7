"""From what a trainer rank holds to what its slot arena carries: the same elements in the forms that the engines want.

A tensor that an engine stores in FP8 is two tensors to it: `X` as float8_e4m3fn and `X_scale_inv`, one fp32 scale for each block of
128 by 128 (DeepSeek-V3's checkpoint format). A rank that holds some rows of X carries those rows and the scales of every block that
they touch; two ranks that share a block carry the same scale. Pure: every rank works out what all ranks carry. Standard library
and records only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from weightsync.errors import PlanError, UnsupportedLayout
from weightsync.layout.records import ITEM_BYTES, Holding, Shape, SourceLayout, SourceTensor, TargetLayout

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
ALIGN_BYTES = 256
"""Each slot begins at such an address of its arena, for vector loads and for any dtype."""
_FP8, _SCALE = "float8_e4m3fn", "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A piece of one rank's arena: what becomes of one holding."""

    holding: Holding
    """What it is made from, in the checkpoint's dtype."""
    shape: Shape
    """Of the whole tensor."""
    dtype: str
    through: str
    """The checkpoint's dtype, which elements are rounded to on the way to `dtype`."""
    offset_bytes: int
    scales: Holding | None = None
    """For FP8: the scales of the blocks that the holding touches; `local_offset` counts fp32 elements of the arena."""

    @property
    def numel(self) -> int:
        return self.holding.stop - self.holding.start


@dataclasses.dataclass(frozen=True)
class Carried:
    """What one rank's arena carries."""

    layout: SourceLayout
    """In the engines' dtypes, to plan with."""
    slots: tuple[Slot, ...]
    arena_bytes: int


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


def carry(held: SourceLayout, wanted: Mapping[str, SourceTensor]) -> Carried:
    """Lay out the arena of the rank that holds `held`; what nobody wants is left out.

    Raises UnsupportedLayout when a rank holds part of a row of a tensor that is wanted in FP8, PlanError when the engines' scales
    do not fit their tensor.
    """
    tensors = {tensor.name: tensor for tensor in held.tensors}
    arena = _Arena()
    slots: list[Slot] = []
    holdings: list[Holding] = []
    for holding in held.holdings:
        want = wanted.get(holding.name)
        if want is None or holding.start == holding.stop:
            continue
        numel = holding.stop - holding.start
        whole = tensors[holding.name]
        scales = _scales(holding, whole.shape, wanted) if want.dtype == _FP8 else None
        offset = arena.take(numel, want.dtype)
        holdings.append(dataclasses.replace(holding, local_offset=offset // ITEM_BYTES[want.dtype]))
        if scales is not None:
            at = arena.take(scales.stop - scales.start, _SCALE) // ITEM_BYTES[_SCALE]
            scales = dataclasses.replace(scales, local_offset=at)
            holdings.append(scales)
        slots.append(Slot(holding, whole.shape, want.dtype, whole.dtype, offset, scales))
    produced = tuple(form for tensor in held.tensors for form in _produced(tensor, wanted))
    return Carried(SourceLayout(held.rank, produced, tuple(holdings)), tuple(slots), arena.used_bytes)


def scale_grid(shape: Shape) -> Shape:
    """Blocks of a matrix by rows and columns."""
    rows, columns = shape
    return (-(-rows // BLOCK), -(-columns // BLOCK))


def _produced(tensor: SourceTensor, wanted: Mapping[str, SourceTensor]) -> tuple[SourceTensor, ...]:
    """What a rank can say that it carries of a tensor: in the wanted dtype, with its own shape, and its scales."""
    want = wanted.get(tensor.name)
    if want is None:
        return ()
    whole = dataclasses.replace(tensor, dtype=want.dtype)
    if want.dtype != _FP8:
        return (whole,)
    return (whole, SourceTensor(tensor.name + SCALE_SUFFIX, scale_grid(tensor.shape), _SCALE))


def _scales(holding: Holding, shape: Shape, wanted: Mapping[str, SourceTensor]) -> Holding:
    """The scales of every block that the holding's rows touch."""
    name = holding.name + SCALE_SUFFIX
    want = wanted.get(name)
    if len(shape) != 2 or want is None or (want.shape, want.dtype) != (scale_grid(shape), _SCALE):
        found = "none" if want is None else f"{list(want.shape)} {want.dtype}"
        raise PlanError(
            f"{holding.name} {list(shape)} is wanted in FP8 with {found} as {name}: want a matrix and one {_SCALE} scale a "
            f"{BLOCK} by {BLOCK} block"
        )
    columns = shape[1]
    if holding.start % columns or holding.stop % columns:
        raise UnsupportedLayout(
            f"{holding.name}: a rank holds elements [{holding.start}, {holding.stop}), parts of rows of {columns}: FP8 blocks need "
            "whole rows; shard it along dim 0, or serve it unquantized"
        )
    first, last = holding.start // columns // BLOCK, -(-holding.stop // columns // BLOCK)
    across = scale_grid(shape)[1]
    return Holding(name, first * across, last * across, 0)


class _Arena:
    def __init__(self) -> None:
        self.used_bytes = 0

    def take(self, numel: int, dtype: str) -> int:
        """Offset in bytes of the next slot."""
        if dtype not in ITEM_BYTES:
            raise PlanError(f"engines want {dtype}: a trainer can carry {sorted(ITEM_BYTES)}")
        offset = self.used_bytes
        self.used_bytes = -(-(offset + numel * ITEM_BYTES[dtype]) // ALIGN_BYTES) * ALIGN_BYTES
        return offset

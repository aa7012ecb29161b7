"""From what a trainer rank holds to what its slot arena carries: the same elements in the forms that the engines want.

A tensor that an engine stores in FP8 is two tensors to it: `X` as float8_e4m3fn and `X_scale_inv`, one fp32 scale for each block of
128 by 128 (DeepSeek-V3's checkpoint format). A rank that holds some rows of X carries those rows and the scales of every block that
they touch; two ranks that share a block carry the same scale. A matrix that engines want in column slices is carried slice by slice
(`layout.packing`). Pure: every rank works out what all ranks carry. Standard library and records only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from weightsync.errors import PlanError, UnsupportedLayout
from weightsync.layout.records import ITEM_BYTES, Holding, Shape, SourceLayout, SourceTensor, TargetLayout

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
FP8 = "float8_e4m3fn"
ALIGN_BYTES = 16
"""Each slot begins at such an address of its arena, for vector loads and for any dtype; scales stand one behind the other."""
GROUP_BYTES = 512 << 20
"""A group's slots are converted together and written together, while the next group is converted."""
_GROUP_ALIGN_BYTES = 256
_SCALE = "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """A derived tensor: columns [start, stop) of every row of a matrix."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


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


@dataclasses.dataclass(frozen=True)
class Carried:
    """What one rank's arena carries."""

    layout: SourceLayout
    """In the engines' dtypes, to plan with."""
    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
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


def carry(
    held: SourceLayout,
    wanted: Mapping[str, SourceTensor],
    columns: Mapping[str, tuple[Columns, ...]] = MappingProxyType({}),
    rows: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    *,
    group_bytes: int = GROUP_BYTES,
) -> Carried:
    """Lay out the arena of the rank that holds `held`; what nobody wants is left out.

    columns: the derived tensors of matrices that are carried in slices; `wanted` names those. rows: where else to part matrices
    (`layout.packing.Packed`). Groups keep the holdings' order.
    Raises UnsupportedLayout when a rank holds part of a row of a tensor that is wanted in FP8, PlanError when the engines' scales
    do not fit their tensor.
    """
    tensors = {tensor.name: tensor for tensor in held.tensors}
    arena = _Arena()
    slots: list[Slot] = []
    groups: list[Group] = []
    pending: list[Slot] = []
    pending_bytes = 0
    for holding in held.holdings:
        whole = tensors[holding.name]
        parts = _parted(holding, whole.shape, rows.get(holding.name, ()))
        new = [slot for part in parts for slot in _slots_of(part, whole, wanted, columns) if slot.numel]
        new_bytes = sum(slot.numel * _item_bytes(slot.dtype) for slot in new)
        if pending and pending_bytes + new_bytes > group_bytes:
            groups.append(arena.place(pending, slots))
            pending, pending_bytes = [], 0
        pending += new
        pending_bytes += new_bytes
    if pending:
        groups.append(arena.place(pending, slots))
    holdings = [
        Holding(slot.name, slot.start, slot.stop, slot.offset_bytes // ITEM_BYTES[slot.dtype]) for slot in slots
    ]
    holdings += [slot.scales for slot in slots if slot.scales is not None]
    produced = tuple(form for tensor in held.tensors for form in _produced(tensor, wanted, columns))
    return Carried(SourceLayout(held.rank, produced, tuple(holdings)), tuple(slots), tuple(groups), arena.used_bytes)


def scale_grid(shape: Shape) -> Shape:
    """Blocks of a matrix by rows and columns."""
    rows, columns = shape
    return (-(-rows // BLOCK), -(-columns // BLOCK))


def _parted(holding: Holding, shape: Shape, rows: Sequence[int]) -> Iterator[tuple[int, Holding]]:
    """(number of the part, the part of a holding that lies in it)."""
    width = math.prod(shape[1:])
    for number, (first, stop) in enumerate(itertools.pairwise((0, *rows, shape[0] if shape else 1))):
        start, end = max(holding.start, first * width), min(holding.stop, stop * width)
        if start < end:
            yield number, dataclasses.replace(holding, start=start, stop=end)


def _slots_of(
    part: tuple[int, Holding],
    whole: SourceTensor,
    wanted: Mapping[str, SourceTensor],
    columns: Mapping[str, tuple[Columns, ...]],
) -> Iterator[Slot]:
    """The slots of a part of a holding of `whole`, not yet placed."""
    number, holding = part
    shape = whole.shape
    if holding.name not in columns:
        want = wanted.get(holding.name)
        if want is not None:
            scales = _scales(holding, shape, wanted) if want.dtype == FP8 else None
            ends = (holding.start, holding.stop)
            yield Slot(holding.name, holding, shape, want.dtype, whole.dtype, 0, *ends, number, scales=scales)
        return
    first, last = holding.start // shape[1], holding.stop // shape[1]
    for piece in columns[holding.name]:
        want = wanted.get(piece.name)
        if want is not None:
            carried = Holding(piece.name, first * piece.width, last * piece.width, 0)
            scales = _scales(carried, want.shape, wanted) if want.dtype == FP8 else None
            ends = (carried.start, carried.stop)
            yield Slot(piece.name, holding, want.shape, want.dtype, whole.dtype, 0, *ends, number, piece, scales)


def _produced(
    tensor: SourceTensor, wanted: Mapping[str, SourceTensor], columns: Mapping[str, tuple[Columns, ...]]
) -> Iterator[SourceTensor]:
    """What a rank can say that it carries of a tensor: in the wanted dtype, with its own shape, and its scales."""
    parts = columns.get(tensor.name)
    carried = [tensor] if parts is None else [_slice(tensor, part) for part in parts]
    for whole in carried:
        want = wanted.get(whole.name)
        if want is not None:
            yield dataclasses.replace(whole, dtype=want.dtype)
            if want.dtype == FP8:
                yield SourceTensor(whole.name + SCALE_SUFFIX, scale_grid(whole.shape), _SCALE)


def _slice(tensor: SourceTensor, part: Columns) -> SourceTensor:
    return SourceTensor(part.name, (tensor.shape[0], part.width), tensor.dtype)


def _item_bytes(dtype: str) -> int:
    if dtype not in ITEM_BYTES:
        raise PlanError(f"engines want {dtype}: a trainer can carry {sorted(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]


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

    def place(self, pending: Sequence[Slot], slots: list[Slot]) -> Group:
        """Append a group: like parts and slices side by side, then scales, so that an engine's neighbours are neighbours here."""
        self.used_bytes = _aligned(self.used_bytes, _GROUP_ALIGN_BYTES) + (_GROUP_ALIGN_BYTES if slots else 0)
        start, first = self.used_bytes, len(slots)
        ordered = sorted(pending, key=lambda slot: (-1 if slot.columns is None else slot.columns.start, slot.part))
        placed = [
            dataclasses.replace(slot, offset_bytes=self._take(slot.numel * _item_bytes(slot.dtype))) for slot in ordered
        ]
        self.used_bytes = _aligned(self.used_bytes, ALIGN_BYTES)
        slots += [slot if slot.scales is None else self._place_scales(slot, slot.scales) for slot in placed]
        return Group(first, len(slots), start, self.used_bytes)

    def _place_scales(self, slot: Slot, scales: Holding) -> Slot:
        at = self.used_bytes // ITEM_BYTES[_SCALE]
        self.used_bytes += (scales.stop - scales.start) * ITEM_BYTES[_SCALE]
        return dataclasses.replace(slot, scales=dataclasses.replace(scales, local_offset=at))

    def _take(self, length_bytes: int) -> int:
        """Offset in bytes of the next slot."""
        offset = _aligned(self.used_bytes, ALIGN_BYTES)
        self.used_bytes = offset + length_bytes
        return offset


def _aligned(offset_bytes: int, to_bytes: int) -> int:
    return -(-offset_bytes // to_bytes) * to_bytes

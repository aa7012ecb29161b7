"""Slot arenas laid out: where a trainer rank's elements are converted to, and in which forms.

Every rank lays out the arenas of all ranks, since a plan needs to know what each of them carries; at a thousand billion parameters
that is most of what planning costs. So what ranks have in common (the forms that a tensor takes) is worked out once, and a slot is
made once, in its place. Pure; standard library and records only.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from weightsync.errors import PlanError, UnsupportedLayout
from weightsync.layout.forms import (
    ALIGN_BYTES,
    BLOCK,
    FP8,
    GROUP_ALIGN_BYTES,
    GROUP_BYTES,
    SCALE,
    SCALE_SUFFIX,
    BlockRow,
    Carried,
    Columns,
    Group,
    Outline,
    Slot,
    aligned,
    scale_grid,
)
from weightsync.layout.records import ITEM_BYTES, Holding, Shape, SourceLayout, SourceTensor


class Carrier:
    """Lays out the arenas of ranks for what engines want.

    columns: the derived tensors of matrices that are carried in slices; `wanted` names those. rows: where else to part matrices
    (`layout.packing.Packed`). group_bytes: what is converted at once, at least.
    """

    def __init__(
        self,
        wanted: Mapping[str, SourceTensor],
        columns: Mapping[str, tuple[Columns, ...]] = MappingProxyType({}),
        rows: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        *,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self._wanted, self._columns, self._rows, self._group_bytes = wanted, columns, rows, group_bytes
        self._forms: dict[str, tuple[SourceTensor, tuple[_Form, ...]]] = {}
        self._stated: tuple[SourceTensor, ...] = ()
        self._produced: tuple[SourceTensor, ...] = ()

    def carry(self, held: SourceLayout) -> Carried:
        """Lay out the arena of the rank that holds `held`; what nobody wants is left out. Groups keep the holdings' order.

        Raises UnsupportedLayout when a rank holds part of a row of a tensor that is wanted in FP8, PlanError when the engines'
        scales do not fit their tensor.
        """
        arena = self._laid_out(held)
        slots = tuple(piece.slot(offset, scales) for piece, offset, scales in arena.placed)
        return Carried(self._layout(held, arena), arena.used_bytes, arena.parted(), tuple(arena.groups), slots)

    def outline(self, held: SourceLayout) -> Outline:
        """As `carry`, of a rank whose slots nobody here fills."""
        arena = self._laid_out(held)
        return Outline(self._layout(held, arena), arena.used_bytes, arena.parted(), tuple(arena.groups))

    def _laid_out(self, held: SourceLayout) -> _Arena:
        tensors = {tensor.name: tensor for tensor in held.tensors}
        arena = _Arena()
        pending: list[_Piece] = []
        pending_bytes = 0
        for holding in held.holdings:
            new = self._pieces(holding, tensors[holding.name])
            new_bytes = sum((piece.stop - piece.start) * piece.form.item_bytes for piece in new)
            if pending and pending_bytes + new_bytes > self._group_bytes:
                arena.place(pending)
                pending, pending_bytes = [], 0
            pending += new
            pending_bytes += new_bytes
        if pending:
            arena.place(pending)
        return arena

    def _layout(self, held: SourceLayout, arena: _Arena) -> SourceLayout:
        return SourceLayout(held.rank, self._produced_of(held.tensors), arena.holdings())

    def _pieces(self, holding: Holding, whole: SourceTensor) -> list[_Piece]:
        forms = self._forms_of(whole)
        if not forms or holding.start >= holding.stop:
            return []
        parts = _parted(holding, whole.shape, self._rows.get(holding.name, ()))
        pieces = [form.piece(number, part) for number, part in parts for form in forms]
        for form in forms:
            form.check(holding, self._wanted.get(form.scales))
        return [piece for piece in pieces if piece.start < piece.stop]

    def _forms_of(self, tensor: SourceTensor) -> tuple[_Form, ...]:
        """Worked out once for all ranks that state the tensor alike; `Held` refuses those that do not."""
        known = self._forms.get(tensor.name)
        if known is None or (known[0] is not tensor and known[0] != tensor):
            known = (tensor, tuple(_forms(tensor, self._wanted, self._columns.get(tensor.name))))
            self._forms[tensor.name] = known
        return known[1]

    def _produced_of(self, stated: tuple[SourceTensor, ...]) -> tuple[SourceTensor, ...]:
        """What a rank can say that it carries: in the wanted dtypes, with its own shapes, and scales. Mostly all state the same."""
        if stated != self._stated or not self._produced:
            self._stated = stated
            self._produced = tuple(t for tensor in stated for form in self._forms_of(tensor) for t in form.tensors())
        return self._produced


class _Form(NamedTuple):
    """What a tensor becomes in every arena: as a whole, or one of its column slices."""

    name: str
    shape: Shape
    dtype: str
    item_bytes: int
    through: str
    columns: Columns | None
    row: int
    """Elements of a row of the whole tensor."""
    grid: Shape | None
    """Of its scales, in FP8."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that one carried scale is for, in FP8."""
        return (BLOCK, BLOCK) if self.columns is None else self.columns.block

    @property
    def scales(self) -> str:
        """Name of its scales, in FP8."""
        return self.name + SCALE_SUFFIX

    def tensors(self) -> Iterator[SourceTensor]:
        """It, and its scales."""
        yield SourceTensor(self.name, self.shape, self.dtype)
        if self.grid is not None:
            yield SourceTensor(self.scales, self.grid, SCALE)

    def check(self, holding: Holding, scales: SourceTensor | None) -> None:
        """Raise unless what a rank holds of the tensor can be carried in this form, with the scales that engines want."""
        if self.grid is None:
            return
        if len(self.shape) != 2 or scales is None or (scales.shape, scales.dtype) != (self.grid, SCALE):
            found = "none" if scales is None else f"{list(scales.shape)} {scales.dtype}"
            raise PlanError(
                f"{self.name} {list(self.shape)} is wanted in FP8 with {found} as {self.scales}: want a matrix and one {SCALE} "
                f"scale a {self.block[0]} by {self.block[1]} block"
            )
        if holding.start % self.row or holding.stop % self.row:
            raise UnsupportedLayout(
                f"{self.name}: a rank holds elements [{holding.start}, {holding.stop}), parts of rows of {self.row}: FP8 blocks "
                "need whole rows; shard it along dim 0, or serve it unquantized"
            )

    def piece(self, number: int, part: Holding) -> _Piece:
        """What becomes of a part of a holding."""
        if self.columns is None:
            return _Piece(self, part, number, part.start, part.stop)
        width = self.shape[1]
        return _Piece(self, part, number, part.start // self.row * width, part.stop // self.row * width)


class _Piece(NamedTuple):
    """What becomes of a part of a holding in one form; it has no place yet."""

    form: _Form
    holding: Holding
    number: int
    """Of the part."""
    start: int
    stop: int

    @property
    def order(self) -> tuple[bool, int, int]:
        """Within its group: like parts and slices side by side, so that an engine's neighbours are neighbours in the arena.

        What may be read where the model keeps it, whole and in the checkpoint's dtype, comes first: it may take no memory.
        """
        columns, converts = self.form.columns, self.form.dtype != self.form.through
        if columns is None or columns.width == self.form.row:
            return (converts, -1, self.number)
        return (converts, columns.start, self.number)

    def scales_at(self, offset: int) -> Holding | None:
        """The scales of every block that its rows touch, from fp32 element `offset` of the arena on."""
        form = self.form
        if form.grid is None:
            return None
        width, across, block_rows = form.shape[1], form.grid[1], form.block[0]
        first, last = self.start // width // block_rows, -(-self.stop // width // block_rows)
        return Holding(form.scales, first * across, last * across, offset)

    def parted(self) -> Iterator[BlockRow]:
        """Its first and last row of FP8 blocks, where it has some rows of them only."""
        rows, width = self.form.shape
        columns = self.form.columns
        blocks = -(-width // BLOCK) if columns is None else len(columns.blocks)
        start, stop = self.start // width, self.stop // width
        for number in {start // BLOCK, (stop - 1) // BLOCK}:
            if start > number * BLOCK or stop < min(rows, (number + 1) * BLOCK):
                yield BlockRow(self.form.name, number, blocks)

    def slot(self, offset_bytes: int, scales: Holding | None) -> Slot:
        form = self.form
        return Slot(
            form.name,
            self.holding,
            form.shape,
            form.dtype,
            form.through,
            offset_bytes,
            self.start,
            self.stop,
            self.number,
            form.columns,
            scales,
        )


class _Arena:
    def __init__(self) -> None:
        self.used_bytes = 0
        self.placed: list[tuple[_Piece, int, Holding | None]] = []
        """(piece, its offset in bytes, its scales)"""
        self.groups: list[Group] = []

    def place(self, pending: list[_Piece]) -> None:
        """Append a group: pieces in order, then their scales, one behind the other."""
        self.used_bytes = aligned(self.used_bytes, GROUP_ALIGN_BYTES) + (GROUP_ALIGN_BYTES if self.placed else 0)
        start, first = self.used_bytes, len(self.placed)
        pending.sort(key=lambda piece: piece.order)
        offsets = [self._take((piece.stop - piece.start) * piece.form.item_bytes) for piece in pending]
        self.used_bytes = aligned(self.used_bytes, ALIGN_BYTES)
        for piece, offset in zip(pending, offsets, strict=True):
            scales = piece.scales_at(self.used_bytes // ITEM_BYTES[SCALE])
            if scales is not None:
                self.used_bytes += (scales.stop - scales.start) * ITEM_BYTES[SCALE]
            self.placed.append((piece, offset, scales))
        self.groups.append(Group(first, len(self.placed), start, self.used_bytes))

    def holdings(self) -> tuple[Holding, ...]:
        """What the arena carries and where, in elements."""
        carried = [Holding(p.form.name, p.start, p.stop, at // p.form.item_bytes) for p, at, _ in self.placed]
        return (*carried, *(scales for *_, scales in self.placed if scales is not None))

    def parted(self) -> frozenset[BlockRow]:
        """Rows of FP8 blocks of which a piece has some rows only."""
        return frozenset(row for piece, *_ in self.placed if piece.form.grid is not None for row in piece.parted())

    def _take(self, length_bytes: int) -> int:
        """Offset in bytes of the next slot."""
        offset = aligned(self.used_bytes, ALIGN_BYTES)
        self.used_bytes = offset + length_bytes
        return offset


def _forms(
    tensor: SourceTensor, wanted: Mapping[str, SourceTensor], columns: tuple[Columns, ...] | None
) -> Iterator[_Form]:
    """The forms of a tensor that engines want."""
    row = math.prod(tensor.shape[1:])
    for part in columns or (None,):
        name, shape = (tensor.name, tensor.shape) if part is None else (part.name, (tensor.shape[0], part.width))
        want = wanted.get(name)
        if want is not None:
            block = (BLOCK, BLOCK) if part is None else part.block
            grid = None if want.dtype != FP8 else scale_grid(shape, block) if len(shape) == 2 else ()
            yield _Form(name, shape, want.dtype, _item_bytes(want.dtype), tensor.dtype, part, row, grid)


def _parted(holding: Holding, shape: Shape, rows: Sequence[int]) -> Iterator[tuple[int, Holding]]:
    """(number of the part, the part of a holding that lies in it).

    rows: where the matrix is parted, ascending, its ends left out.
    """
    row = math.prod(shape[1:])
    start, number = holding.start, bisect.bisect_right(rows, holding.start // row) if rows else 0
    while number < len(rows) and rows[number] * row < holding.stop:
        yield number, Holding(holding.name, start, rows[number] * row, holding.local_offset)
        start = rows[number] * row
        number += 1
    yield (
        number,
        holding if start == holding.start else Holding(holding.name, start, holding.stop, holding.local_offset),
    )


def _item_bytes(dtype: str) -> int:
    if dtype not in ITEM_BYTES:
        raise PlanError(f"engines want {dtype}: a trainer can carry {sorted(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]

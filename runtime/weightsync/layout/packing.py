"""Column slices become tensors of their own, so that what an engine wants of a row-parallel matrix is one run and not one a row.

A tensor-parallel rank wants columns [c0, c1) of every row of a down or output projection: in the whole tensor that is a write of a
few hundred bytes a row. Where the engines' slices cut a matrix into columns, and trainer ranks hold whole rows, `pack` replaces the
matrix by one derived tensor a slice (`X[:, c0:c1]`, with its scales `X[:, c0:c1]_scale_inv` in FP8); conversions write each of them
packed. Rows at which engines part a matrix are noted, so that like parts of neighbours (gate and up of all experts) stand side by
side. What does not fit this form stays as it is: slower, not wrong. Pure; standard library and records only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from weightsync.layout.forms import BLOCK, FP8, SCALE_SUFFIX, Columns
from weightsync.layout.records import Copy, SourceLayout, SourceTensor, TargetLayout


@dataclasses.dataclass(frozen=True)
class Packed:
    """The engines' layouts in terms of derived tensors."""

    layouts: Mapping[str, TargetLayout]
    """By the digest of the layout as the engine published it."""
    columns: Mapping[str, tuple[Columns, ...]]
    """Derived tensors of each matrix that is cut, and of its scales, in the order of their columns."""
    rows: Mapping[str, tuple[int, ...]]
    """Rows of each matrix at which what some engine wants begins or ends, where slots may be parted; ascending."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Rectangle:
    """What a copy reads of a matrix: rows [row, row + rows), columns [start, stop)."""

    row: int
    rows: int
    start: int
    stop: int


def pack(layouts: Mapping[str, TargetLayout], held: Sequence[SourceLayout]) -> Packed:
    """Cut every matrix that engines want in column slices. `held` is what all trainer ranks hold: each of them decides alike."""
    wanted = {tensor.name: tensor for layout in layouts.values() for tensor in layout.sources}
    read = _rectangles(layouts.values(), wanted)
    ends = {name: _ends(wanted[name].shape[1], ((r.start, r.stop) for r in found)) for name, found in read.items()}
    cuts = {name: found for name, found in ends.items() if len(found) > 2}
    parted = _held_in_parts(held)
    cut = {name: cuts[name] for name in cuts if name not in parted and _fits_blocks(name, cuts, wanted)}
    cut |= {
        name + SCALE_SUFFIX: tuple(-(-at // BLOCK) for at in found)
        for name, found in cut.items()
        if wanted[name].dtype == FP8
    }
    cut = {name: found for name, found in cut.items() if not name.endswith(SCALE_SUFFIX) or _matrix_of(name) in cut}
    columns = {name: _columns(name, found, cut) for name, found in cut.items()}
    rows = {
        name: _ends(wanted[name].shape[0], ((r.row, r.row + r.rows) for r in found)) for name, found in read.items()
    }
    rows = {name: tuple(at for at in found[1:-1] if _may_part(at, wanted[name])) for name, found in rows.items()}
    return Packed({digest: _rewritten(layout, columns) for digest, layout in layouts.items()}, columns, rows)


def in_terms_of(columns: Mapping[str, tuple[Columns, ...]], layout: TargetLayout) -> TargetLayout | None:
    """Another engine's layout by the derived tensors that there are; None when it reads a matrix across their ends."""
    whole = {tensor.name: tensor for tensor in layout.sources}
    for copy in layout.copies:
        if copy.source in columns:
            rectangle = _rectangle(copy, whole[copy.source])
            if rectangle is None:
                return None
            read = sum(part.width for part in columns[copy.source] if _within(part, rectangle))
            if read != rectangle.stop - rectangle.start:
                return None
    return _rewritten(layout, columns)


def _rectangles(layouts: Iterable[TargetLayout], wanted: Mapping[str, SourceTensor]) -> dict[str, set[_Rectangle]]:
    """What copies read of each matrix; nothing for one of which any copy reads something else than a rectangle."""
    found: dict[str, set[_Rectangle]] = {}
    other: set[str] = set()
    for layout in layouts:
        for copy in layout.copies:
            rectangle = _rectangle(copy, wanted[copy.source])
            if rectangle is None:
                other.add(copy.source)
            else:
                found.setdefault(copy.source, set()).add(rectangle)
    return {name: rectangles for name, rectangles in found.items() if name not in other}


def _ends(length: int, ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Where any of the ranges begins or ends, and both ends of the whole; ascending."""
    return tuple(sorted({0, length, *itertools.chain.from_iterable(ranges)}))


def _may_part(row: int, tensor: SourceTensor) -> bool:
    """Two slots of one rank share no FP8 block."""
    return tensor.dtype != FP8 or row % BLOCK == 0


def _rectangle(copy: Copy, tensor: SourceTensor) -> _Rectangle | None:
    if len(tensor.shape) != 2 or 0 in copy.shape:
        return None
    width = tensor.shape[1]
    row, start = divmod(copy.source_offset, width)
    if len(copy.shape) == 2 and copy.source_strides == (width, 1) and start + copy.shape[1] <= width:
        return _Rectangle(row, copy.shape[0], start, start + copy.shape[1])
    if len(copy.shape) == 1 and copy.source_strides == (1,) and start == 0 and copy.shape[0] % width == 0:
        return _Rectangle(row, copy.shape[0] // width, 0, width)
    return None


def _held_in_parts(held: Sequence[SourceLayout]) -> set[str]:
    """Tensors of which some rank holds a part of a row."""
    parted = set()
    for layout in held:
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        for holding in layout.holdings:
            row = math.prod(shapes[holding.name][1:])
            if row and (holding.start % row or holding.stop % row):
                parted.add(holding.name)
    return parted


def _fits_blocks(name: str, cuts: Mapping[str, tuple[int, ...]], wanted: Mapping[str, SourceTensor]) -> bool:
    """Whether slices of an FP8 matrix end where its blocks do, and its scales are cut where it is."""
    if wanted[name].dtype != FP8:
        return True
    inner, scales = cuts[name][1:-1], wanted.get(name + SCALE_SUFFIX)
    if scales is None or any(at % BLOCK for at in inner):
        return False
    return cuts.get(scales.name) == tuple(-(-at // BLOCK) for at in cuts[name])


def _matrix_of(scales: str) -> str:
    return scales.removesuffix(SCALE_SUFFIX)


def _columns(name: str, ends: Sequence[int], cut: Mapping[str, tuple[int, ...]]) -> tuple[Columns, ...]:
    """The scales of a derived matrix are named after it, as those of a whole one are."""
    matrix = _matrix_of(name) if name.endswith(SCALE_SUFFIX) else name
    suffix = SCALE_SUFFIX if name != matrix else ""
    slices = zip(itertools.pairwise(cut[matrix]), itertools.pairwise(ends), strict=True)
    return tuple(Columns(f"{matrix}[:, {a}:{b}]{suffix}", start, stop) for (a, b), (start, stop) in slices)


def _rewritten(layout: TargetLayout, columns: Mapping[str, tuple[Columns, ...]]) -> TargetLayout:
    whole = {tensor.name: tensor for tensor in layout.sources}
    copies = [
        part
        for copy in layout.copies
        for part in (_parts(copy, whole[copy.source], columns[copy.source]) if copy.source in columns else (copy,))
    ]
    read = {copy.source for copy in copies}
    sources = []
    for tensor in layout.sources:
        parts = [
            dataclasses.replace(tensor, name=part.name, shape=(tensor.shape[0], part.width))
            for part in columns.get(tensor.name, ())
        ]
        sources += [part for part in parts or [tensor] if part.name in read]
    return dataclasses.replace(layout, sources=tuple(sources), copies=tuple(copies))


def _parts(copy: Copy, tensor: SourceTensor, columns: Sequence[Columns]) -> list[Copy]:
    """One copy a slice that it reads; slices end wherever any copy does, so each lies inside or outside."""
    rectangle = _rectangle(copy, tensor)
    assert rectangle is not None  # only such tensors are cut
    down, right = copy.target_strides if len(copy.shape) == 2 else (tensor.shape[1], 1)
    return [
        Copy(
            part.name,
            rectangle.row * part.width,
            (part.width, 1),
            copy.target,
            copy.target_offset + (part.start - rectangle.start) * right,
            (down, right),
            (rectangle.rows, part.width),
        )
        for part in columns
        if _within(part, rectangle)
    ]


def _within(part: Columns, rectangle: _Rectangle) -> bool:
    return rectangle.start <= part.start and part.stop <= rectangle.stop

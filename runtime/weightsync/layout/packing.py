"""Column slices become tensors of their own, so that what an engine wants of a row-parallel matrix is one run and not one a row.

A tensor-parallel rank wants columns [c0, c1) of every row of a down or output projection: in the whole tensor that is a write of a
few hundred bytes a row. Where the engines' slices cut a matrix into columns, and trainer ranks hold whole rows, `pack` replaces the
matrix by one derived tensor a slice (`X[:, c0:c1]`, with its scales `X[:, c0:c1]_scale_inv` in FP8); conversions write each of them
packed. Rows at which engines part a matrix are noted, so that like parts of neighbours (gate and up of all experts) stand side by
side. What does not fit this form stays as it is: slower, not wrong.

An FP8 slice may end inside a block: it is quantized by the scales of the whole blocks, and carries its own grid of them, as fine as
the engines have refined theirs (`layout.refinement`). Pure; numpy and records only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set

from weightsync.layout.forms import BLOCK, FP8, SCALE_SUFFIX, Columns, scale_grid
from weightsync.layout.records import Copy, SourceLayout, SourceTensor, TargetLayout
from weightsync.layout.refinement import WHOLE, Block, Grids, Rectangle


@dataclasses.dataclass(frozen=True)
class Packed:
    """The engines' layouts in terms of derived tensors."""

    layouts: Mapping[str, TargetLayout]
    """By the digest of the layout as the engine published it."""
    columns: Mapping[str, tuple[Columns, ...]]
    """Derived tensors of each matrix that is cut, and of its scales, in the order of their columns."""
    rows: Mapping[str, tuple[int, ...]]
    """Rows of each matrix at which what some engine wants begins or ends, where slots may be parted; ascending."""


def pack(layouts: Mapping[str, TargetLayout], held: Sequence[SourceLayout]) -> Packed:
    """Cut every matrix that engines want in column slices. `held` is what all trainer ranks hold: each of them decides alike."""
    wanted = {tensor.name: tensor for layout in layouts.values() for tensor in layout.sources}
    read = _rectangles(layouts.values(), wanted)
    ends = {name: _ends(wanted[name].shape[1], ((r.start, r.stop) for r in found)) for name, found in read.items()}
    cuts = {name: found for name, found in ends.items() if len(found) > 2}
    parted = _held_in_parts(held)
    cut = {name: cuts[name] for name in cuts if name not in parted and _fits_blocks(name, cuts, wanted)}
    cut = {name: found for name, found in cut.items() if not _is_scale(name, wanted) or _matrix_of(name) in cut}
    grids = Grids()
    doubtful = {name for name in read if _is_fp8(name, wanted) and name not in cut and name not in parted}
    blocks = _refined(doubtful, layouts.values(), wanted, grids)
    columns = {name: _columns(name, found, WHOLE) for name, found in cut.items() if not _is_scale(name, wanted)}
    columns |= {name: _columns(name, ends[name], block) for name, block in blocks.items()}
    columns |= {name + SCALE_SUFFIX: _scales_of(parts) for name, parts in columns.items() if _is_fp8(name, wanted)}
    rows = {
        name: _ends(wanted[name].shape[0], ((r.row, r.row + r.rows) for r in found)) for name, found in read.items()
    }
    rows = {name: tuple(at for at in found[1:-1] if _may_part(at, wanted[name])) for name, found in rows.items()}
    made = _digest(columns)
    return Packed({digest: _rewritten(each, columns, grids, made) for digest, each in layouts.items()}, columns, rows)


def in_terms_of(columns: Mapping[str, tuple[Columns, ...]], layout: TargetLayout) -> TargetLayout | None:
    """Another engine's layout by the derived tensors that there are; None when it reads a matrix across their ends."""
    whole = {tensor.name: tensor for tensor in layout.sources}
    grids = Grids()
    reads = _Reads(layout, {name for name, parts in columns.items() if parts[0].block != WHOLE})
    if any(reads.blocks(name, whole, grids).get(columns[name][0].block) is None for name in reads.refined):
        return None
    for copy in layout.copies:
        if copy.source in columns and copy.source not in reads.scales:
            rectangle = _rectangle(copy, whole[copy.source])
            if rectangle is None:
                return None
            read = sum(part.width for part in columns[copy.source] if _within(part, rectangle))
            if read != rectangle.stop - rectangle.start:
                return None
    return _rewritten(layout, columns, grids, _digest(columns))


class _Reads:
    """What one layout reads of matrices whose scales it may have refined, and of those scales."""

    def __init__(self, layout: TargetLayout, matrices: Set[str]) -> None:
        self._copies: dict[str, list[Copy]] = {}
        for copy in layout.copies:
            if copy.source in matrices or (copy.source.endswith(SCALE_SUFFIX) and _matrix_of(copy.source) in matrices):
                self._copies.setdefault(copy.source, []).append(copy)
        self.refined = {name for name in matrices if {name, name + SCALE_SUFFIX} & self._copies.keys()}
        """Matrices that it reads anything of."""
        self.scales = {name + SCALE_SUFFIX for name in self.refined}

    def rectangle(self, name: str, tensors: Mapping[str, SourceTensor]) -> Rectangle | None:
        """What it reads of a matrix, where that is one rectangle."""
        found = self._copies.get(name, [])
        return _rectangle(found[0], tensors[name]) if len(found) == 1 else None

    def blocks(self, name: str, tensors: Mapping[str, SourceTensor], grids: Grids) -> dict[Block, int]:
        """See `Grids.of`; empty when it does not read one rectangle."""
        rectangle = self.rectangle(name, tensors)
        if rectangle is None:
            return {}
        return grids.of(rectangle, tensors[name].shape[1], self._copies.get(name + SCALE_SUFFIX, []))

    def scale_copies(
        self, name: str, tensors: Mapping[str, SourceTensor], columns: Sequence[Columns], grids: Grids
    ) -> list[Copy]:
        """Of the scales of each slice of a matrix that it reads, as many as it has refined them to."""
        rectangle, block = self.rectangle(name, tensors), columns[0].block
        assert rectangle is not None  # only such matrices are refined
        stride = self.blocks(name, tensors, grids)[block]
        into = self._copies[name + SCALE_SUFFIX]
        first = min(copy.target_offset for copy in into)
        down = -(-rectangle.rows // block[0])
        copies = []
        for part, scales in zip(columns, _scales_of(columns), strict=True):
            if _within(part, rectangle):
                at = first + (part.start - rectangle.start) // block[1]
                row = rectangle.row // block[0] * scales.width
                view = ((scales.width, 1), into[0].target, at, (stride, 1), (down, scales.width))
                copies.append(Copy(scales.name, row, *view))
        return copies


def _refined(
    names: Set[str], layouts: Iterable[TargetLayout], wanted: Mapping[str, SourceTensor], grids: Grids
) -> dict[str, Block]:
    """The block that one scale is for, of each of these matrices whose scales all engines that read it have refined alike."""
    names = {name for name in names if wanted.get(name + SCALE_SUFFIX) is not None}
    fitting: dict[str, set[Block]] = {}
    for layout in layouts:
        reads = _Reads(layout, names)
        for name in reads.refined:
            found = set(reads.blocks(name, wanted, grids))
            fitting[name] = found & fitting.get(name, found)
    chosen = {name: max(blocks) for name, blocks in fitting.items() if blocks}
    return {name: block for name, block in chosen.items() if block != WHOLE}


def _rectangles(layouts: Iterable[TargetLayout], wanted: Mapping[str, SourceTensor]) -> dict[str, set[Rectangle]]:
    """What copies read of each matrix; nothing for one of which any copy reads something else than a rectangle."""
    found: dict[str, set[Rectangle]] = {}
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


def _rectangle(copy: Copy, tensor: SourceTensor) -> Rectangle | None:
    if len(tensor.shape) != 2 or 0 in copy.shape:
        return None
    width = tensor.shape[1]
    row, start = divmod(copy.source_offset, width)
    if len(copy.shape) == 2 and copy.source_strides == (width, 1) and start + copy.shape[1] <= width:
        return Rectangle(row, copy.shape[0], start, start + copy.shape[1])
    if len(copy.shape) == 1 and copy.source_strides == (1,) and start == 0 and copy.shape[0] % width == 0:
        return Rectangle(row, copy.shape[0] // width, 0, width)
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


def _is_fp8(name: str, wanted: Mapping[str, SourceTensor]) -> bool:
    return wanted[name].dtype == FP8


def _is_scale(name: str, wanted: Mapping[str, SourceTensor]) -> bool:
    """Whether a tensor is the scales of an FP8 matrix."""
    matrix = wanted.get(_matrix_of(name)) if name.endswith(SCALE_SUFFIX) else None
    return matrix is not None and matrix.dtype == FP8


def _fits_blocks(name: str, cuts: Mapping[str, tuple[int, ...]], wanted: Mapping[str, SourceTensor]) -> bool:
    """Whether slices of an FP8 matrix end where its blocks do, and its scales are cut where it is."""
    if not _is_fp8(name, wanted):
        return True
    inner, scales = cuts[name][1:-1], wanted.get(name + SCALE_SUFFIX)
    if scales is None or any(at % BLOCK for at in inner):
        return False
    return cuts.get(scales.name) == tuple(-(-at // BLOCK) for at in cuts[name])


def _matrix_of(scales: str) -> str:
    return scales.removesuffix(SCALE_SUFFIX)


def _columns(name: str, ends: Sequence[int], block: Block) -> tuple[Columns, ...]:
    return tuple(Columns(f"{name}[:, {a}:{b}]", a, b, block) for a, b in itertools.pairwise(ends))


def _scales_of(columns: Sequence[Columns]) -> tuple[Columns, ...]:
    """The scales of derived matrices are named after them, as those of a whole one are."""
    return tuple(
        Columns(part.name + SCALE_SUFFIX, part.start // part.block[1], -(-part.stop // part.block[1]))
        for part in columns
    )


def _digest(columns: Mapping[str, tuple[Columns, ...]]) -> str:
    text = json.dumps([dataclasses.astuple(part) for name in sorted(columns) for part in columns[name]])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rewritten(
    layout: TargetLayout, columns: Mapping[str, tuple[Columns, ...]], grids: Grids, columns_digest: str
) -> TargetLayout:
    """`columns_digest`: of `columns`, which with the layout's own digest says what becomes of it."""
    if not any(tensor.name in columns for tensor in layout.sources):
        return layout
    whole = {tensor.name: tensor for tensor in layout.sources}
    reads = _Reads(layout, {name for name, parts in columns.items() if parts[0].block != WHOLE})
    copies: list[Copy] = []
    for copy in layout.copies:
        parts = columns.get(copy.source)
        if parts is None:
            copies.append(copy)
        elif copy.source not in reads.scales:
            copies += _parts(copy, whole[copy.source], parts)
            if copy.source in reads.refined:
                copies += reads.scale_copies(copy.source, whole, parts, grids)
    read = {copy.source for copy in copies}
    derived = [part for tensor in layout.sources for part in _derived(tensor, whole, columns)]
    return dataclasses.replace(
        layout,
        sources=tuple(tensor for tensor in derived if tensor.name in read),
        copies=tuple(copies),
        derived_from=f"{layout.digest()}+{columns_digest}",
    )


def _derived(
    tensor: SourceTensor, whole: Mapping[str, SourceTensor], columns: Mapping[str, tuple[Columns, ...]]
) -> list[SourceTensor]:
    """What a source becomes: slices, or itself."""
    parts = columns.get(tensor.name)
    if parts is None:
        return [tensor]
    rows = tensor.shape[0]
    matrix = columns.get(_matrix_of(tensor.name)) if _is_scale(tensor.name, whole) else None
    if matrix is not None:
        rows = scale_grid(whole[_matrix_of(tensor.name)].shape, matrix[0].block)[0]
    return [dataclasses.replace(tensor, name=part.name, shape=(rows, part.width)) for part in parts]


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


def _within(part: Columns, rectangle: Rectangle) -> bool:
    return rectangle.start <= part.start and part.stop <= rectangle.stop

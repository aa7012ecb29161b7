"""A Triton kernel that casts a whole group of tensors in one launch, bit-equal to `registry.convert_into`.

It works on bit patterns: rounding and subnormals are then the same wherever it runs. Imports torch and Triton.
"""

# Triton compiles these functions itself; what its types promise Python is not what they do.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightsync.conversion.registry import CASTS
from weightsync.errors import ConversionError

_VECTOR_BYTES, _VECTOR_ELEMENTS = 16, 8
_FLAT, _ROWS = (1, 8192), (16, 512)
"""(rows, columns) of a tile of contiguous elements, and of rows that lie apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """Elements that become bf16 or fp32, rounded to `through` on the way.

    source: any contiguous view, or [rows, columns] with rows apart; bf16 or fp32. out: of the same shape, contiguous; bf16 or fp32.
    """

    name: str
    source: Tensor
    out: Tensor
    through: torch.dtype


class CastGroup:
    """A prepared launch over casts of one pair of dtypes; `convert` may be called as often as their memory stays where it is.

    Faults are found afterwards in `faults`: [casts] int32 on the device, not 0 where an element that was written is an infinity or
    a NaN.
    """

    def __init__(self, casts: Sequence[Cast]) -> None:
        kinds = {(cast.source.dtype, cast.out.dtype, cast.through) for cast in casts}
        if len(kinds) != 1:
            raise ValueError(f"casts are of {sorted(map(str, kinds))}: a group has one kind")
        ((source, out, through),) = kinds
        if not {source, out, through} <= CASTS:
            raise ConversionError(
                f"{casts[0].name}: no conversion from {source} to {out}; there are casts between bf16 and fp32"
            )
        self._fp32 = {"SOURCE_FP32": source == torch.float32, "OUT_FP32": out == torch.float32}
        self._rounded = through not in (source, out)
        device = casts[0].out.device
        self.faults = torch.zeros(len(casts), dtype=torch.int32, device=device)
        self._casts = casts
        self._table = torch.tensor([_row(cast) for cast in casts], dtype=torch.int64).to(device)
        self._launches = [
            (tiles.to(device), shape, aligned)
            for shape in (_FLAT, _ROWS)
            for aligned in (True, False)
            if len(tiles := _tiles(casts, shape, aligned))
        ]

    def convert(self) -> None:
        """Launch on the current stream."""
        self.faults.zero_()
        for tiles, (rows, columns), aligned in self._launches:
            _cast_tiles[(len(tiles),)](
                self._table,
                tiles,
                self.faults,
                ROWS=rows,
                COLUMNS=columns,
                ALIGNED=aligned,
                ROUNDED=self._rounded,
                **self._fp32,
                num_warps=8,
            )


def _extent(cast: Cast) -> tuple[int, int, int]:
    """(rows, columns, row stride) of a cast; contiguous elements are one row."""
    if cast.source.is_contiguous():
        return 1, cast.source.numel(), cast.source.numel()
    if cast.source.dim() != 2 or cast.source.stride(1) != 1:
        raise ValueError(f"{cast.name} has shape {list(cast.source.shape)}, strides {cast.source.stride()}: want rows")
    return len(cast.source), cast.source.shape[1], cast.source.stride(0)


def _row(cast: Cast) -> list[int]:
    return [cast.source.data_ptr(), cast.out.data_ptr(), *_extent(cast)]


def _aligned(cast: Cast) -> bool:
    """Every row begins and ends where vectors do, on both sides."""
    _, columns, stride = _extent(cast)
    starts = (cast.source.data_ptr(), cast.out.data_ptr(), stride * cast.source.element_size())
    return columns % _VECTOR_ELEMENTS == 0 and all(at % _VECTOR_BYTES == 0 for at in starts)


def _tiles(casts: Sequence[Cast], shape: tuple[int, int], aligned: bool) -> Tensor:
    """[T, 3] int32: cast, block of rows, block of columns, for those whose tiles have this shape."""
    parts = [torch.empty(0, 3, dtype=torch.int64)]
    for i, cast in enumerate(casts):
        rows, columns, _ = _extent(cast)
        if (shape == _FLAT) == (rows == 1) and _aligned(cast) == aligned:
            across = torch.arange(triton.cdiv(columns, shape[1]))
            grid = torch.cartesian_prod(torch.arange(triton.cdiv(rows, shape[0])), across).reshape(-1, 2)
            parts.append(torch.nn.functional.pad(grid, (1, 0), value=i))
    return torch.cat(parts).to(torch.int32)


@triton.jit
def _cast_tiles(
    table,
    tiles,
    faults,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDED: tl.constexpr,
    SOURCE_FP32: tl.constexpr,
    OUT_FP32: tl.constexpr,
):
    tile = tl.program_id(0)
    job = tl.load(tiles + tile * 3)
    row = tl.load(tiles + tile * 3 + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.load(tiles + tile * 3 + 2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(table + job * 5)
    out = tl.load(table + job * 5 + 1)
    rows = tl.load(table + job * 5 + 2)
    columns = tl.load(table + job * 5 + 3)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    stride = tl.load(table + job * 5 + 4)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if SOURCE_FP32:
        read = source.to(tl.pointer_type(tl.uint32)) + row[:, None] * stride + column[None, :]
    else:
        read = source.to(tl.pointer_type(tl.uint16)) + row[:, None] * stride + column[None, :]
    if OUT_FP32:
        written = out.to(tl.pointer_type(tl.uint32)) + row[:, None] * columns + column[None, :]
    else:
        written = out.to(tl.pointer_type(tl.uint16)) + row[:, None] * columns + column[None, :]
    if ALIGNED:
        read = tl.multiple_of(read, (1, 16))
        written = tl.multiple_of(written, (1, 16))
    bits = tl.load(read, mask=mask, other=0).to(tl.uint32)
    if not SOURCE_FP32:
        bits = bits << 16
    infinite = (bits & 0x7F800000) == 0x7F800000
    if SOURCE_FP32 and (ROUNDED or not OUT_FP32):  # to bf16, to nearest even; what overflows becomes an infinity
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        infinite = infinite | ((bits & 0x7F800000) == 0x7F800000)
    if OUT_FP32:
        tl.store(written, bits, mask=mask)
    else:
        tl.store(written, (bits >> 16).to(tl.uint16), mask=mask)
    if tl.max(tl.max(infinite.to(tl.int32), axis=1), axis=0) != 0:
        tl.store(faults + job, 1)

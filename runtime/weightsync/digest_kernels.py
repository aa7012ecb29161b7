"""The digest of `weightsync.verify` on the device, at the speed of reading, for all ranges of a push in one launch.

Imports torch and Triton; the same numbers as `verify`, which defines them.
"""

# Triton compiles these functions itself; what its types promise Python is not what they do.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from weightsync import verify

_VECTOR_BYTES = 16
_SHAPES = {1: (32, 16, 4), 2: (32, 1, 4), 4: (8, 16, 8)}
"""Element size -> (rows of a tile, tiles that a program takes one after the other, warps); the fastest found on an H100."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Elements [start, start + len(flat)) of target `name`; `flat` is 1-D, contiguous, on the device."""

    name: str
    start: int
    flat: Tensor


class DigestGroup:
    """A prepared launch over ranges of one element size; `digest` may be called as often as their memory is rewritten.

    Ranges that begin or end within 16 bytes are masked element by element; those are the rare ones, in a launch of their own.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        sizes = {item.flat.element_size() for item in ranges}
        if len(sizes) != 1 or not sizes <= _SHAPES.keys():
            raise ValueError(f"elements have {sorted(sizes)} bytes: a group has one size out of {list(_SHAPES)}")
        (self._size,) = sizes
        device = ranges[0].flat.device
        self._ranges = ranges
        self.bytes_read = sum(item.flat.nbytes for item in ranges)
        self._factors = _factors(self._size).to(device)
        self._table = torch.tensor([_row(item) for item in ranges], dtype=torch.int64).to(device)
        even = torch.tensor([_even(item) for item in ranges])
        rows, looks, _ = _SHAPES[self._size]
        programs = _programs(ranges, rows * looks)
        self._launches = [
            (chosen.to(device), whole)
            for whole in (True, False)
            if len(chosen := programs[even[programs[:, 0].long()] == whole])
        ]
        self.sums = torch.zeros(len(ranges), dtype=torch.int64, device=device)
        """[ranges] digests as signed integers, after `digest`."""

    def digest(self) -> Tensor:
        """Launch on the current stream; returns `sums`."""
        self.sums.zero_()
        rows, looks, num_warps = _SHAPES[self._size]
        with torch.cuda.device_of(self.sums):  # threads begin on the first device, whatever their process uses
            for programs, whole in self._launches:
                _digest_rows[(len(programs),)](
                    self._table,
                    programs,
                    self._factors,
                    self.sums,
                    SIZE=self._size,
                    ROWS=rows,
                    LOOKS=looks,
                    EVEN=whole,
                    num_warps=num_warps,
                )
        return self.sums


def _factors(size: int) -> Tensor:
    """int32: the 256 factors; for bytes behind them, 64 words for each byte of a factor, four neighbours' bytes in a word."""
    factors = verify.column_factors().astype("<u4")
    if size > 1:
        return torch.from_numpy(factors.view("<i4").copy())
    by_byte = np.ascontiguousarray(factors.view(np.uint8).reshape(-1, 4).T).reshape(-1).view("<i4")
    return torch.from_numpy(np.concatenate([factors.view("<i4"), by_byte]))


def _row(item: Range) -> list[int]:
    hashed = int(verify.name_hash(item.name))
    return [item.flat.data_ptr(), item.start, len(item.flat), hashed - (1 << 64) * (hashed >> 63)]


def _even(item: Range) -> bool:
    size = item.flat.element_size()
    return all(at % _VECTOR_BYTES == 0 for at in (item.flat.data_ptr(), item.start * size, item.flat.nbytes))


def _programs(ranges: Sequence[Range], rows: int) -> Tensor:
    """[P, 2] int32: range, its first row by `rows`."""
    counts = [
        -(-(item.start % verify.ROW_ELEMENTS + len(item.flat)) // (rows * verify.ROW_ELEMENTS)) for item in ranges
    ]
    owner = torch.repeat_interleave(torch.arange(len(ranges)), torch.tensor(counts))
    number = torch.cat([torch.arange(count) for count in counts])
    return torch.stack([owner, number], dim=1).to(torch.int32)


@triton.jit
def _splitmix(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _dot4(a, b):
    """Sum of the products of four bytes each, as u32: one instruction."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _sum16(value, factors, j: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, 16] u32: 16 elements of one byte by bytes j and j + 1 of their factors; at most 16 * 255 * 65535, 28 bits."""
    word = tl.arange(0, 64)
    lower = tl.broadcast_to(tl.load(factors + 256 + j * 64 + word)[None, :], (ROWS, 64))
    upper = tl.broadcast_to(tl.load(factors + 256 + (j + 1) * 64 + word)[None, :], (ROWS, 64))
    dots = _dot4(value, lower) + (_dot4(value, upper) << 8)
    return tl.sum(tl.reshape(dots, (ROWS, 16, 4)), axis=2)


@triton.jit
def _digest_rows(
    table,
    programs,
    factors,
    sums,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    LOOKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Words of 4 bytes, so that loads are vectors; each holds 4 // SIZE elements, whose factors stay in registers."""
    program = tl.program_id(0)
    index = tl.load(programs + program * 2)
    number = tl.load(programs + program * 2 + 1)
    address = tl.load(table + index * 4)
    start = tl.load(table + index * 4 + 1)
    length = tl.load(table + index * 4 + 2)
    hashed = tl.load(table + index * 4 + 3).to(tl.uint64, bitcast=True)
    PER_WORD: tl.constexpr = 4 // SIZE
    WORDS: tl.constexpr = 256 // PER_WORD
    # Words whose products are added up before they are weighted, and how many such sums a row has.
    TOGETHER: tl.constexpr = 4 if SIZE == 1 and EVEN else 1
    SUMS: tl.constexpr = WORDS // TOGETHER
    word = tl.arange(0, WORDS)
    offset = tl.arange(0, ROWS)[:, None] * WORDS + word[None, :]
    first_word = tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, SUMS)[None, :] * TOGETHER
    first_row = start // 256
    skew = start % 256
    total = tl.zeros((ROWS, SUMS), dtype=tl.uint64)
    ones = tl.zeros((SUMS,), dtype=tl.uint64)  # what the `+ 1` of each element comes to, by sum
    for k in tl.static_range(PER_WORD * TOGETHER):
        added = tl.load(factors + tl.arange(0, SUMS) * PER_WORD * TOGETHER + k)
        ones += added.to(tl.uint32, bitcast=True).to(tl.uint64)
    for look in range(LOOKS):
        row = (number * LOOKS + look).to(tl.int64) * ROWS
        weight = _splitmix((first_row + row + tl.arange(0, ROWS)).to(tl.uint64) + hashed) | 1
        element = row * 256 - skew  # of the range, at the tile's first place; negative where the range begins within it
        low = tl.maximum(-element, 0).to(tl.int32)
        high = tl.minimum(length - element, ROWS * 256).to(tl.int32)
        if EVEN:
            low = tl.multiple_of(low // PER_WORD, 4)
            high = tl.multiple_of(high // PER_WORD, 4)
            here = (offset >= low) & (offset < high)
            tile = (address + element * SIZE).to(tl.pointer_type(tl.uint32))
            value = tl.load(tl.multiple_of(tile + offset, (1, 16)), mask=here, other=0)
            partial = tl.broadcast_to(ones[None, :], (ROWS, SUMS))
            if SIZE == 1:
                partial += _sum16(value, factors, 0, ROWS).to(tl.uint64)
                partial += _sum16(value, factors, 2, ROWS).to(tl.uint64) << 16
            elif SIZE == 2:
                even = tl.load(factors + word * 2).to(tl.uint32, bitcast=True)[None, :]
                odd = tl.load(factors + word * 2 + 1).to(tl.uint32, bitcast=True)[None, :]
                partial += (value & 0xFFFF).to(tl.uint64) * even.to(tl.uint64)
                partial += (value >> 16).to(tl.uint64) * odd.to(tl.uint64)
            else:
                factor = tl.load(factors + word).to(tl.uint32, bitcast=True)[None, :]
                partial += value.to(tl.uint64) * factor.to(tl.uint64)
            partial = tl.where((first_word >= low) & (first_word < high), partial, 0)
        else:
            partial = tl.zeros((ROWS, WORDS), dtype=tl.uint64)
            for k in tl.static_range(PER_WORD):
                factor = tl.load(factors + word * PER_WORD + k).to(tl.uint32, bitcast=True)[None, :]
                here = (offset * PER_WORD + k >= low) & (offset * PER_WORD + k < high)
                if SIZE == 1:
                    tile = (address + element).to(tl.pointer_type(tl.uint8))
                elif SIZE == 2:
                    tile = (address + element * 2).to(tl.pointer_type(tl.uint16))
                else:
                    tile = (address + element * 4).to(tl.pointer_type(tl.uint32))
                piece = tl.load(tile + offset * PER_WORD + k, mask=here, other=0)
                partial += (piece.to(tl.uint64) + here.to(tl.uint64)) * factor.to(tl.uint64)
        total += partial * weight[:, None]
    tl.atomic_add(sums + index, tl.sum(tl.sum(total, axis=1), axis=0).to(tl.int64, bitcast=True))

"""Triton kernels that convert a whole group of tensors in one launch, bit-equal to the reference in `fp8`.

A group is a table of jobs (one a tensor, or a column slice of one) and a list of tiles, both on the device, made once a plan and
used each push. A tile is one block row by `wide` blocks, so a small tensor costs a tile and not a launch. Imports torch and Triton.
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

from weightsync.conversion.fp8 import BLOCK, blocks_of
from weightsync.errors import ConversionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Rows of one tensor, or a column slice of them, to be converted.

    source: [r, k] bf16 or fp32 on the device, any row stride, elements of a row contiguous.
    out: [r, k] float8_e4m3fn, any row stride.
    scales: [blocks of rows, blocks of columns] fp32.
    row_start: index of the first row in its tensor; only its place in the block matters.
    amax: like `scales` but int32, bf16 bits found on other ranks in blocks that straddle them; None if none does.
    """

    source: Tensor
    out: Tensor
    scales: Tensor
    row_start: int = 0
    amax: Tensor | None = None


class Fp8Group:
    """A prepared launch; `convert` may be called any number of times while the jobs' memory stays where it is.

    All sources have one dtype. Faults are found afterwards in `faults`: [jobs] int32 on the device, not 0 where a job met an
    infinity or a NaN.
    """

    def __init__(self, jobs: Sequence[Job], *, ue8m0: bool = False, num_warps: int = 8) -> None:
        device, dtypes = jobs[0].source.device, {job.source.dtype for job in jobs}
        if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float32}:
            raise ConversionError(
                f"sources have dtypes {sorted(map(str, dtypes))}: a group has one, bfloat16 or float32"
            )
        self.faults = torch.zeros(len(jobs), dtype=torch.int32, device=device)
        self.bytes_moved = sum(job.source.nbytes + job.out.numel() + job.scales.nbytes for job in jobs)
        self._jobs = jobs
        self._table = torch.tensor([_row(job) for job in jobs], dtype=torch.int64).to(device)
        self._tiles = _tiles(jobs, 1).to(device)
        self._ue8m0, self._fp32, self._num_warps = ue8m0, dtypes == {torch.float32}, num_warps
        self._words = all(map(_aligned, jobs))

    def convert(self) -> None:
        """Launch on the current stream."""
        self.faults.zero_()
        grid = (len(self._tiles),)
        if self._words:
            _fp8_words[grid](
                self._table,
                self._tiles,
                self.faults,
                UE8M0=self._ue8m0,
                SOURCE_FP32=self._fp32,
                num_warps=self._num_warps,
            )
        else:
            _fp8_tiles[grid](
                self._table, self._tiles, self.faults, WIDE=1, UE8M0=self._ue8m0, SOURCE_FP32=self._fp32, num_warps=16
            )


def _row(job: Job) -> list[int]:
    for tensor in (job.source, job.out, job.scales):
        if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(f"a job's tensor has shape {list(tensor.shape)}, strides {tensor.stride()}: want rows")
    return [
        job.source.data_ptr(),
        job.out.data_ptr(),
        job.scales.data_ptr(),
        0 if job.amax is None else job.amax.data_ptr(),
        job.source.stride(0),
        job.out.stride(0),
        job.scales.stride(0),
        job.source.shape[0] | (job.row_start % BLOCK) << 32,
        job.source.shape[1],
    ]


def _tiles(jobs: Sequence[Job], wide: int) -> Tensor:
    """[T, 3] int32: job, block row, first block column."""
    parts = []
    for i, job in enumerate(jobs):
        rows, columns = blocks_of(job.source.shape[0], job.row_start), blocks_of(job.source.shape[1])
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(0, columns, wide)).reshape(-1, 2)
        parts.append(torch.nn.functional.pad(grid, (1, 0), value=i))
    return torch.cat(parts).to(torch.int32)


def _aligned(job: Job) -> bool:
    """Rows may be read and written as vectors: what every model's matrices allow."""
    ends = (job.source.data_ptr(), job.out.data_ptr())
    lengths = (job.source.stride(0), job.out.stride(0), job.source.shape[1])
    return all(at % 16 == 0 for at in ends) and all(length % 16 == 0 for length in lengths)


_QUOTIENTS = tl.constexpr("""{
    .reg .f32 x0, x1, x2, x3, q0, q1, q2, q3, e0, e1, e2, e3;
    .reg .b32 w0, w1, w2, w3;
    .reg .b16 low, high;
    shl.b32 w0, $1, 16;
    and.b32 w1, $1, 0xFFFF0000;
    shl.b32 w2, $2, 16;
    and.b32 w3, $2, 0xFFFF0000;
    mov.b32 x0, w0;
    mov.b32 x1, w1;
    mov.b32 x2, w2;
    mov.b32 x3, w3;
    mul.rn.f32 q0, x0, $5;
    mul.rn.f32 q1, x1, $5;
    mul.rn.f32 q2, x2, $6;
    mul.rn.f32 q3, x3, $6;
    neg.f32 x0, x0;
    neg.f32 x1, x1;
    neg.f32 x2, x2;
    neg.f32 x3, x3;
    fma.rn.f32 e0, q0, $3, x0;
    fma.rn.f32 e1, q1, $3, x1;
    fma.rn.f32 e2, q2, $4, x2;
    fma.rn.f32 e3, q3, $4, x3;
    neg.f32 e0, e0;
    neg.f32 e1, e1;
    neg.f32 e2, e2;
    neg.f32 e3, e3;
    fma.rn.f32 q0, e0, $5, q0;
    fma.rn.f32 q1, e1, $5, q1;
    fma.rn.f32 q2, e2, $6, q2;
    fma.rn.f32 q3, e3, $6, q3;
    cvt.rn.satfinite.e4m3x2.f32 low, q1, q0;
    cvt.rn.satfinite.e4m3x2.f32 high, q3, q2;
    mov.b32 $0, {low, high};
}""")
"""Two words of two bf16 each to four e4m3: quotient by the reciprocal, one step of correction (Markstein's, exact when the
reciprocal is rounded correctly), conversion that saturates. Four instructions an element where a division takes ten. The
remainder is taken with this sign so that -0 stays -0."""


@triton.jit
def _greater(a, b):
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _fp8_words(
    jobs,
    tiles,
    faults,
    UE8M0: tl.constexpr,
    SOURCE_FP32: tl.constexpr,
):
    """Sources whose rows are vectors: two bf16 elements a word, one block a program."""
    tile = tl.program_id(0)
    job = tl.load(tiles + tile * 3)
    block_row = tl.load(tiles + tile * 3 + 1)
    block = tl.load(tiles + tile * 3 + 2)
    row_of_job = jobs + job * 9
    source = tl.load(row_of_job)
    out = tl.load(row_of_job + 1).to(tl.pointer_type(tl.int16))
    scales = tl.load(row_of_job + 2).to(tl.pointer_type(tl.float32))
    others = tl.load(row_of_job + 3)
    source_stride = tl.load(row_of_job + 4)
    out_stride = tl.load(row_of_job + 5) // 2
    scale_stride = tl.load(row_of_job + 6)
    packed = tl.load(row_of_job + 7)
    words = tl.multiple_of(tl.load(row_of_job + 8) // 2, 8)
    rows = packed & 0xFFFFFFFF
    row = block_row * 128 - (packed >> 32) + tl.arange(0, 128)
    word = block * 64 + tl.arange(0, 64)
    rows_here = (row >= 0) & (row < rows)
    mask = rows_here[:, None] & (word < words)[None, :]
    if SOURCE_FP32:
        column = block * 128 + tl.arange(0, 128)
        exact = source.to(tl.pointer_type(tl.float32)) + row[:, None] * source_stride + column[None, :]
        inside = rows_here[:, None] & (column < words * 2)[None, :]
        rounded = tl.load(tl.multiple_of(exact, (1, 16)), mask=inside, other=0.0).to(tl.bfloat16)
        low, high = tl.split(tl.reshape(rounded.to(tl.int16, bitcast=True), (128, 64, 2)))
        value = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        pointers = source.to(tl.pointer_type(tl.int32)) + row[:, None] * (source_stride // 2) + word[None, :]
        value = tl.load(tl.multiple_of(pointers, (1, 16)), mask=mask, other=0)

    # As integers magnitudes compare the same, and a NaN is the greatest: a maximum of floats would drop it.
    pairs = tl.reduce(tl.reduce(value & 0x7FFF7FFF, 0, _greater), 0, _greater)
    amax = tl.maximum(pairs & 0xFFFF, pairs >> 16)
    if others != 0:
        amax = tl.maximum(amax, tl.load(others.to(tl.pointer_type(tl.int32)) + block_row * scale_stride + block))
    if amax >= 0x7F80:
        tl.store(faults + job, 1)
    scale = tl.maximum(tl.div_rn((amax << 16).to(tl.float32, bitcast=True), 448.0), 1e-12)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scales + block_row * scale_stride + block, scale)
    divisor = tl.broadcast_to(scale, (128, 64))
    reciprocal = tl.broadcast_to(tl.div_rn(1.0, scale), (128, 64))
    converted = tl.inline_asm_elementwise(
        _QUOTIENTS, "=r,r,r,r,r,r,r", [value, divisor, reciprocal], dtype=tl.int16, is_pure=True, pack=2
    )
    targets = tl.multiple_of(out + row[:, None] * out_stride + word[None, :], (1, 16))
    tl.store(targets, converted, mask=mask)


@triton.jit
def _fp8_tiles(
    jobs,
    tiles,
    faults,
    WIDE: tl.constexpr,
    UE8M0: tl.constexpr,
    SOURCE_FP32: tl.constexpr,
):
    tile = tl.program_id(0)
    job = tl.load(tiles + tile * 3)
    block_row = tl.load(tiles + tile * 3 + 1)
    block_column = tl.load(tiles + tile * 3 + 2)
    row_of_job = jobs + job * 9
    source_address = tl.load(row_of_job)
    out = tl.load(row_of_job + 1).to(tl.pointer_type(tl.float8e4nv))
    scales = tl.load(row_of_job + 2).to(tl.pointer_type(tl.float32))
    others = tl.load(row_of_job + 3)
    source_stride = tl.load(row_of_job + 4)
    out_stride = tl.load(row_of_job + 5)
    scale_stride = tl.load(row_of_job + 6)
    packed = tl.load(row_of_job + 7)
    columns = tl.load(row_of_job + 8)
    rows = packed & 0xFFFFFFFF
    phase = packed >> 32

    row = block_row * 128 - phase + tl.arange(0, 128)
    column = block_column * 128 + tl.arange(0, 128 * WIDE)
    mask = ((row >= 0) & (row < rows))[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * source_stride + column[None, :]
    if SOURCE_FP32:
        value = tl.load(source_address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0).to(tl.bfloat16)
    else:
        value = tl.load(source_address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0)

    # As integers magnitudes compare the same, and a NaN is the greatest: a maximum of floats would drop it.
    bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    amax = tl.max(tl.max(tl.reshape(bits, (128, WIDE, 128)), axis=2), axis=0)
    block = block_column + tl.arange(0, WIDE)
    inside = block * 128 < columns
    if others != 0:
        given = others.to(tl.pointer_type(tl.int32)) + block_row * scale_stride + block
        amax = tl.maximum(amax, tl.load(given, mask=inside, other=0))
    if tl.max(amax, axis=0) >= 0x7F80:
        tl.store(faults + job, 1)
    scale = tl.maximum(tl.div_rn((amax << 16).to(tl.float32, bitcast=True), tl.full((WIDE,), 448.0, tl.float32)), 1e-12)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scales + block_row * scale_stride + block, scale, mask=inside)

    grid = tl.reshape(value.to(tl.float32), (128, WIDE, 128))
    divisor = tl.broadcast_to(scale[None, :, None], (128, WIDE, 128))
    quotient = tl.minimum(tl.maximum(tl.div_rn(grid, divisor), -448.0), 448.0)
    converted = tl.reshape(quotient.to(tl.float8e4nv), (128, 128 * WIDE))
    tl.store(out + row[:, None] * out_stride + column[None, :], converted, mask=mask)

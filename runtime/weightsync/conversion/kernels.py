"""Triton kernels that convert a whole group of tensors in one launch, bit-equal to the reference in `fp8`.

A group is a table of jobs (one a tensor, or a column slice of one) and a list of tiles, both on the device, made once a plan and
used each push. A tile is one block, so a small tensor costs a tile and not a launch. Imports torch and Triton.
"""

# Triton compiles these functions itself; what its types promise Python is not what they do.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weightsync.conversion.fp8 import BLOCK, blocks_of
from weightsync.conversion.jobs import Job
from weightsync.errors import ConversionError

_FIELDS = tl.constexpr(13)
"""Of a job's row of the table."""


class Fp8Group:
    """A prepared launch; `convert` may be called any number of times while the jobs' memory stays where it is.

    All sources have one dtype. Faults are found afterwards in `faults`: [jobs] int32 on the device, not 0 where a job met an
    infinity or a NaN.
    """

    def __init__(self, jobs: Sequence[Job], *, ue8m0: bool = False) -> None:
        device, dtypes = jobs[0].source.device, {job.source.dtype for job in jobs}
        if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float32}:
            raise ConversionError(
                f"sources have dtypes {sorted(map(str, dtypes))}: a group has one, bfloat16 or float32"
            )
        self.faults = torch.zeros(len(jobs), dtype=torch.int32, device=device)
        self.bytes_moved = sum(job.out.numel() * (job.source.itemsize + 1) + job.scales.nbytes for job in jobs)
        self._jobs = jobs
        self._table = torch.tensor([_row(job) for job in jobs], dtype=torch.int64).to(device)
        self._tiles = _tiles(jobs).to(device)
        self._kernel, self._num_warps = (_fp8_words, 8) if all(map(_aligned, jobs)) else (_fp8_tiles, 16)
        finest = min(min(job.block) for job in jobs)
        self._flags = {
            "UE8M0": ue8m0,
            "SOURCE_FP32": dtypes == {torch.float32},
            "SPREAD": BLOCK // finest if any(job.cut for job in jobs) else 0,
        }

    def convert(self) -> None:
        """Launch on the current stream."""
        self.faults.zero_()
        self._kernel[(len(self._tiles),)](
            self._table, self._tiles, self.faults, **self._flags, num_warps=self._num_warps
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
        _pair(job.source.shape[0], job.row_start % BLOCK),
        job.source.shape[1],
        0 if job.amax is None else job.amax.stride(0),
        _pair(job.written.start, job.written.stop),
        _pair(*job.block),
        _pair(*job.scales.shape),
    ]


def _pair(low: int, high: int) -> int:
    return low | high << 32


def _tiles(jobs: Sequence[Job]) -> Tensor:
    """[T, 3] int32: job, block row, block column."""
    parts = []
    for i, job in enumerate(jobs):
        rows, columns = blocks_of(job.source.shape[0], job.row_start), blocks_of(job.source.shape[1])
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
        parts.append(torch.nn.functional.pad(grid, (1, 0), value=i))
    return torch.cat(parts).to(torch.int32)


def _aligned(job: Job) -> bool:
    """Rows may be read and written as vectors: what every model's matrices allow."""
    ends = (job.source.data_ptr(), job.out.data_ptr())
    lengths = (job.source.stride(0), job.out.stride(0), job.source.shape[1], job.written.start, len(job.written))
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
def _store_scale(scale, scales, scale_stride, row_of_job, block_row, block, SPREAD: tl.constexpr):
    """The scale of a block: once, or (SPREAD > 0) to each place that an engine's finer grid has for it."""
    if SPREAD == 0:
        tl.store(scales + block_row * scale_stride + block, scale)
    else:
        phase = tl.load(row_of_job + 7) >> 32
        first = tl.load(row_of_job + 10) & 0xFFFFFFFF
        size = tl.load(row_of_job + 11)
        shape = tl.load(row_of_job + 12)
        finer = tl.arange(0, SPREAD)
        row_size = size & 0xFFFFFFFF
        column_size = size >> 32
        down = block_row * (128 // row_size) - phase // row_size + finer
        across = block * (128 // column_size) - first // column_size + finer
        down_here = (finer < 128 // row_size) & (down >= 0) & (down < (shape & 0xFFFFFFFF))
        across_here = (finer < 128 // column_size) & (across >= 0) & (across < (shape >> 32))
        places = scales + down[:, None] * scale_stride + across[None, :]
        tl.store(places, tl.broadcast_to(scale, (SPREAD, SPREAD)), mask=down_here[:, None] & across_here[None, :])


@triton.jit
def _fp8_words(
    jobs,
    tiles,
    faults,
    UE8M0: tl.constexpr,
    SOURCE_FP32: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Sources whose rows are vectors: two bf16 elements a word, one block a program."""
    tile = tl.program_id(0)
    job = tl.load(tiles + tile * 3)
    block_row = tl.load(tiles + tile * 3 + 1)
    block = tl.load(tiles + tile * 3 + 2)
    row_of_job = jobs + job * _FIELDS
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
        others_stride = tl.load(row_of_job + 9)
        amax = tl.maximum(amax, tl.load(others.to(tl.pointer_type(tl.int32)) + block_row * others_stride + block))
    if amax >= 0x7F80:
        tl.store(faults + job, 1)
    scale = tl.maximum(tl.div_rn((amax << 16).to(tl.float32, bitcast=True), 448.0), 1e-12)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    _store_scale(scale, scales, scale_stride, row_of_job, block_row, block, SPREAD)
    divisor = tl.broadcast_to(scale, (128, 64))
    reciprocal = tl.broadcast_to(tl.div_rn(1.0, scale), (128, 64))
    converted = tl.inline_asm_elementwise(
        _QUOTIENTS, "=r,r,r,r,r,r,r", [value, divisor, reciprocal], dtype=tl.int16, is_pure=True, pack=2
    )
    if SPREAD > 0:
        written = tl.load(row_of_job + 10)
        first = tl.multiple_of((written & 0xFFFFFFFF) // 2, 8)
        last = tl.multiple_of((written >> 32) // 2, 8)
        mask = mask & ((word >= first) & (word < last))[None, :]
        out -= first
    targets = tl.multiple_of(out + row[:, None] * out_stride + word[None, :], (1, 16))
    tl.store(targets, converted, mask=mask)


@triton.jit
def _fp8_tiles(
    jobs,
    tiles,
    faults,
    UE8M0: tl.constexpr,
    SOURCE_FP32: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Sources of any alignment, one block a program."""
    tile = tl.program_id(0)
    job = tl.load(tiles + tile * 3)
    block_row = tl.load(tiles + tile * 3 + 1)
    block = tl.load(tiles + tile * 3 + 2)
    row_of_job = jobs + job * _FIELDS
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
    column = block * 128 + tl.arange(0, 128)
    mask = ((row >= 0) & (row < rows))[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * source_stride + column[None, :]
    if SOURCE_FP32:
        value = tl.load(source_address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0).to(tl.bfloat16)
    else:
        value = tl.load(source_address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0)

    # As integers magnitudes compare the same, and a NaN is the greatest: a maximum of floats would drop it.
    bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    amax = tl.max(tl.max(bits, axis=1), axis=0)
    if others != 0:
        others_stride = tl.load(row_of_job + 9)
        amax = tl.maximum(amax, tl.load(others.to(tl.pointer_type(tl.int32)) + block_row * others_stride + block))
    if amax >= 0x7F80:
        tl.store(faults + job, 1)
    scale = tl.maximum(tl.div_rn((amax << 16).to(tl.float32, bitcast=True), 448.0), 1e-12)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    _store_scale(scale, scales, scale_stride, row_of_job, block_row, block, SPREAD)

    divisor = tl.broadcast_to(scale, (128, 128))
    quotient = tl.minimum(tl.maximum(tl.div_rn(value.to(tl.float32), divisor), -448.0), 448.0)
    if SPREAD > 0:
        written = tl.load(row_of_job + 10)
        first = written & 0xFFFFFFFF
        mask = mask & ((column >= first) & (column < written >> 32))[None, :]
        out -= first
    tl.store(out + row[:, None] * out_stride + column[None, :], quotient.to(tl.float8e4nv), mask=mask)

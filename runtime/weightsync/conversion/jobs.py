"""The FP8 conversion of one tensor's rows: a record for the kernels, and carried out by torch on a host. Imports torch only."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from weightsync.conversion import fp8
from weightsync.conversion.fp8 import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Rows of one tensor, or a column slice of them, to be converted.

    source: [r, k] bf16 or fp32, any row stride, elements of a row contiguous: all columns of the blocks that are touched.
    out: [r, written columns] float8_e4m3fn, any row stride.
    scales: fp32 rows, one scale for each `block` that rows and written columns touch.
    row_start: index of the first row in its tensor; only its place in the block matters.
    columns: which of the source's are written; they begin in its first block, with a `block`. None for all.
    block: rows and columns that one scale is for; they divide BLOCK.
    amax: [blocks of rows, blocks of columns] int32, bf16 bits found on other ranks in blocks that straddle them; None if none does.
    """

    source: Tensor
    out: Tensor
    scales: Tensor
    row_start: int = 0
    columns: range | None = None
    block: tuple[int, int] = (BLOCK, BLOCK)
    amax: Tensor | None = None

    @property
    def written(self) -> range:
        return range(self.source.shape[1]) if self.columns is None else self.columns

    @property
    def cut(self) -> bool:
        """Whether it writes other than whole blocks with a scale each."""
        return self.block != (BLOCK, BLOCK) or self.written != range(self.source.shape[1])

    def convert(self, *, ue8m0: bool) -> Tensor:
        """Write `out` and `scales`; returns the greatest magnitudes as `fp8.block_amax` does, with those of other ranks."""
        amax = fp8.block_amax(self.source, self.row_start)
        if self.amax is not None:
            amax = torch.maximum(amax, self.amax)
        scales = fp8.scales_of(amax, ue8m0=ue8m0)
        quantized = fp8.quantize(self.source, scales, self.row_start)
        self.out.copy_(quantized[:, self.written.start : self.written.stop])
        rows = range(self.row_start, self.row_start + len(self.source))
        self.scales.copy_(fp8.spread(scales, rows=rows, columns=self.written, block=self.block))
        return amax

"""FP8 column slices that begin or end inside a block of 128 by 128, made of the whole blocks that they touch.

In torch, for a host and for a GPU: the kernels of `kernels` write whole blocks only. Imports torch only.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from weightsync.conversion import fp8
from weightsync.conversion.fp8 import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Columns of some rows of a tensor, and the memory for what they become.

    source: [r, k] bf16 or fp32, all columns of the blocks that the slice touches.
    out: [r, columns] float8_e4m3fn.
    scales: fp32, contiguous, one for each `block` that the slice touches.
    rows, columns: in the whole tensor.
    amax: [blocks of rows, blocks of columns] int32, bf16 bits found on other ranks in blocks that straddle them; None if none does.
    """

    source: Tensor
    out: Tensor
    scales: Tensor
    rows: range
    columns: range
    block: tuple[int, int]
    amax: Tensor | None = None

    def convert(self, *, ue8m0: bool) -> Tensor:
        """Write `out` and `scales`; returns the greatest magnitudes as `fp8.block_amax` does, with those of other ranks."""
        amax = fp8.block_amax(self.source, self.rows.start)
        if self.amax is not None:
            amax = torch.maximum(amax, self.amax)
        scales = fp8.scales_of(amax, ue8m0=ue8m0)
        first = self.columns.start % BLOCK
        quantized = fp8.quantize(self.source, scales, self.rows.start)
        self.out.copy_(quantized[:, first : first + len(self.columns)])
        spread = fp8.spread(scales, rows=self.rows, columns=self.columns, block=self.block)
        self.scales.copy_(spread.reshape(self.scales.shape))
        return amax


class SliceGroup:
    """Slices of one group, on one device. faults: [slices] int32, not 0 where the last run met an infinity or a NaN."""

    def __init__(self, slices: list[Slice], *, ue8m0: bool) -> None:
        self._slices, self._ue8m0 = slices, ue8m0
        self.faults = torch.zeros(len(slices), dtype=torch.int32, device=slices[0].source.device)

    def convert(self) -> None:
        """On the current stream; waits for nothing."""
        for i, each in enumerate(self._slices):
            self.faults[i] = fp8.not_finite(each.convert(ue8m0=self._ue8m0))

"""FP8 in blocks of 128 by 128: the reference in torch that every kernel must equal bit for bit, on any device.

Definition (design section 6; the format is that of DeepSeek-V3's checkpoints, `weight_scale_inv`): an element is first rounded to
bf16, the checkpoint's dtype. amax is the greatest magnitude of its block, scale = max(amax / 448, 1e-12) in fp32, quotient =
element / scale in fp32, both by IEEE division, clamped to +-448 and rounded to nearest even as e4m3fn. The E8M0 form takes the
next power of two at or above that scale, stored as fp32. Blocks lie on the grid of the whole tensor; those at its edges are
smaller.
Imports torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0
"""Greatest finite e4m3fn."""
SCALE_FLOOR = 1e-12
"""A block of zeros gets this scale, and zeros."""
_INFINITY_BITS = 0x7F80


def blocks_of(length: int, start: int = 0) -> int:
    """How many blocks the elements [start, start + length) of one dim touch."""
    return -(-(start + length) // BLOCK) - start // BLOCK if length else 0


def block_amax(rows: Tensor, row_start: int = 0) -> Tensor:
    """Greatest magnitude of each block that `rows` touch, as bf16 bits: [blocks of rows, blocks of columns] int32.

    rows: [r, k] bf16 or fp32, rows [row_start, row_start + r) of the tensor. A block that other ranks hold a part of has
    its amax by the maximum over them. Bits order like magnitudes, an infinity above every number and a NaN above it: neither
    is lost.
    """
    bits = _pad(_bf16(rows).view(torch.int16).to(torch.int32) & 0x7FFF, row_start)
    grid = bits.view(bits.shape[0] // BLOCK, BLOCK, bits.shape[1] // BLOCK, BLOCK)
    return grid.amax(dim=(1, 3))


def finite(amax: Tensor) -> bool:
    """Whether no block has an infinity or a NaN in it."""
    return not bool((amax >= _INFINITY_BITS).any())


def scales_of(amax: Tensor, *, ue8m0: bool = False) -> Tensor:
    """fp32 scales of blocks from their amax (bf16 bits, int32, any shape), all finite."""
    magnitude = (amax << 16).view(torch.float32)
    # By a tensor: torch multiplies by the reciprocal when a CUDA tensor is divided by a number.
    scale = (magnitude / torch.full_like(magnitude, FP8_MAX)).clamp_min(SCALE_FLOOR)
    if not ue8m0:
        return scale
    bits = scale.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def quantize(rows: Tensor, scales: Tensor, row_start: int = 0) -> Tensor:
    """[r, k] float8_e4m3fn of `rows` ([r, k] bf16 or fp32, at row `row_start` of the tensor) under the scales of their blocks."""
    values = _pad(_bf16(rows).to(torch.float32), row_start)
    grid = values.view(scales.shape[0], BLOCK, scales.shape[1], BLOCK)
    quotient = (grid / scales[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    first = row_start % BLOCK
    return quotient.view(values.shape)[first : first + rows.shape[0], : rows.shape[1]].to(torch.float8_e4m3fn)


def spread(scales: Tensor, *, rows: range, columns: range, block: tuple[int, int]) -> Tensor:
    """One scale for each `block` (rows, columns; they divide BLOCK) of a part of a tensor, where an engine keeps so many.

    scales: [r, c] of the blocks that rows and columns touch, which count in the whole tensor; columns begin with a `block`.
    """
    down, across = (
        torch.arange(within.start // size, -(-within.stop // size), device=scales.device) * size // BLOCK
        - within.start // BLOCK
        for within, size in zip((rows, columns), block, strict=True)
    )
    return scales[down][:, across]


def dequantize(quantized: Tensor, scales: Tensor, row_start: int = 0) -> Tensor:
    """[r, k] fp32: what an engine computes with."""
    values = _pad(quantized.to(torch.float32), row_start)
    grid = values.view(scales.shape[0], BLOCK, scales.shape[1], BLOCK) * scales[:, None, :, None]
    first = row_start % BLOCK
    return grid.view(values.shape)[first : first + quantized.shape[0], : quantized.shape[1]]


def _bf16(rows: Tensor) -> Tensor:
    return rows.to(torch.bfloat16)


def _pad(rows: Tensor, row_start: int) -> Tensor:
    """Zeros around [r, k] up to whole blocks of the tensor's grid."""
    above, right = row_start % BLOCK, -rows.shape[1] % BLOCK
    below = -(above + rows.shape[0]) % BLOCK
    return torch.nn.functional.pad(rows, (0, right, above, below)) if above or right or below else rows.contiguous()

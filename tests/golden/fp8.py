"""Golden bytes of FP8 128x128: made once by this module, with numpy and Python's integers alone, and checked in.

`python -m tests.golden.fp8` writes fp8.npz anew; a change of it is a change of the format. Source of the format: DeepSeek-V3's
checkpoints (`weight_scale_inv`), OCP's OFP8 for e4m3fn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("fp8.npz")
ROWS, COLUMNS = 150, 140
"""Not whole blocks, so that edges are in it."""


def values() -> np.ndarray:
    """[150, 140] bf16 bits: any mantissa, exponents by block, one block of zeros of both signs, one of subnormals."""
    at = np.arange(ROWS * COLUMNS, dtype=np.uint64)
    mixed = (at + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)
    bits = (mixed & np.uint64(0x807F)).astype(np.uint16).reshape(ROWS, COLUMNS)
    spread = ((mixed >> np.uint64(8)) % np.uint64(24)).astype(np.uint16).reshape(ROWS, COLUMNS)
    bits[:128, :128] |= (np.uint16(120) + spread[:128, :128]) << 7
    bits[:128, 128:] &= 0x8000
    bits[128:, :128] |= (np.uint16(1) + spread[128:, :128]) << 7
    return bits  # the last block keeps exponent 0: subnormals


def as_float(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def expected(bits: np.ndarray, *, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3fn bytes [r, k], fp32 scales by block), worked out block by block."""
    grid = (-(-bits.shape[0] // 128), -(-bits.shape[1] // 128))
    out, scales = np.zeros(bits.shape, dtype=np.uint8), np.zeros(grid, dtype=np.float32)
    for i, j in np.ndindex(grid):
        here = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        block = as_float(bits[here])
        scale = max(np.float32(np.abs(block).max() / np.float32(448)), np.float32(1e-12))
        if ue8m0:
            mantissa, exponent = np.frexp(scale)
            scale = np.float32(np.ldexp(1.0, int(exponent) - (mantissa == 0.5)))
        scales[i, j] = scale
        quotient = np.clip(block / scale, np.float32(-448), np.float32(448))
        out[here] = [[e4m3(value) for value in row] for row in quotient.tolist()]
    return out, scales


def e4m3(value: float) -> int:
    """The byte nearest to a value of at most 448 in magnitude, ties to the even mantissa."""
    sign = 0x80 if np.signbit(value) else 0
    magnitude = abs(value)
    exponent = max(int(np.frexp(magnitude)[1]) - 1, -6) if magnitude else -6
    steps = magnitude / 2.0 ** (exponent - 3)  # exact: a power of two; below 16
    whole = int(steps)
    rest = steps - whole
    whole += rest > 0.5 or (rest == 0.5 and whole % 2 == 1)
    if whole == 16:
        whole, exponent = 8, exponent + 1
    return sign | (whole if whole < 8 else ((exponent + 7) << 3) | (whole - 8))


if __name__ == "__main__":
    bits = values()
    plain, plain_scales = expected(bits, ue8m0=False)
    power, power_scales = expected(bits, ue8m0=True)
    np.savez_compressed(FILE, bits=bits, plain=plain, plain_scales=plain_scales, ue8m0=power, ue8m0_scales=power_scales)

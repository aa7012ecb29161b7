"""FP8 in blocks of 128 by 128: golden bytes, edges, straddled blocks, and no infinity gets through."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import fp8 as golden
from weightsync.conversion import fp8

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
FORMS = [pytest.param(False, id="plain"), pytest.param(True, id="ue8m0")]


def convert(rows: torch.Tensor, ue8m0: bool, row_start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scales = fp8.scales_of(fp8.block_amax(rows, row_start), ue8m0=ue8m0)
    return fp8.quantize(rows, scales, row_start), scales


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.failure_mode(4)
@pytest.mark.parametrize("ue8m0", FORMS)
def test_the_golden_bytes(ue8m0: bool) -> None:
    with np.load(golden.FILE) as file:
        out, scales = convert(bf16(file["bits"]), ue8m0)
        name = "ue8m0" if ue8m0 else "plain"
        np.testing.assert_array_equal(as_bytes(out), file[name])
        np.testing.assert_array_equal(scales.numpy().view(np.uint32), file[f"{name}_scales"].view(np.uint32))


def test_the_golden_file_is_what_its_module_makes() -> None:
    bits = golden.values()
    for name, ue8m0 in (("plain", False), ("ue8m0", True)):
        out, scales = golden.expected(bits, ue8m0=ue8m0)
        with np.load(golden.FILE) as file:
            np.testing.assert_array_equal(out, file[name])
            np.testing.assert_array_equal(scales, file[f"{name}_scales"])


finite_bits = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)


@SETTINGS
@given(st.data(), st.integers(1, 140), st.integers(1, 140), st.booleans())
def test_any_finite_values_convert_as_worked_out_by_hand(data: st.DataObject, r: int, k: int, ue8m0: bool) -> None:
    few = data.draw(st.lists(finite_bits, min_size=1, max_size=40))
    bits = np.resize(np.array(few, dtype=np.uint16), (r, k))
    out, scales = convert(bf16(bits), ue8m0)
    want, want_scales = golden.expected(bits, ue8m0=ue8m0)
    np.testing.assert_array_equal(as_bytes(out), want)
    np.testing.assert_array_equal(scales.numpy(), want_scales)


@SETTINGS
@given(st.integers(1, 300), st.integers(1, 200), st.lists(st.integers(0, 300), max_size=4), st.booleans())
def test_rows_of_several_ranks_convert_as_the_whole_tensor(rows: int, k: int, cuts: list[int], ue8m0: bool) -> None:
    """Each rank has some rows; blocks that straddle ranks agree by the greatest amax of all."""
    generator = torch.Generator().manual_seed(rows * 1000 + k)
    whole = torch.randn(rows, k, generator=generator).to(torch.bfloat16)
    want, want_scales = convert(whole, ue8m0)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    parts = [(whole[a:b], a) for a, b in itertools.pairwise(edges) if a < b]
    amax = torch.zeros(want_scales.shape, dtype=torch.int32)
    for part, start in parts:
        mine = fp8.block_amax(part, start)
        here = amax[start // 128 : start // 128 + len(mine)]
        torch.maximum(here, mine, out=here)
    for part, start in parts:
        agreed = fp8.scales_of(amax[start // 128 :][: fp8.blocks_of(len(part), start)], ue8m0=ue8m0)
        out = fp8.quantize(part, agreed, start)
        np.testing.assert_array_equal(as_bytes(out), as_bytes(want[start : start + len(part)]))


def test_fp32_is_rounded_to_the_checkpoints_dtype_first() -> None:
    exact = torch.randn(200, 200, generator=torch.Generator().manual_seed(3))
    for a, b in zip(convert(exact, False), convert(exact.to(torch.bfloat16), False), strict=True):
        np.testing.assert_array_equal(as_bytes(a), as_bytes(b))


def test_what_comes_back_is_within_half_a_step() -> None:
    rows = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    out, scales = convert(rows, False)
    error = (fp8.dequantize(out, scales) - rows.float()).abs()
    assert bool((error <= rows.float().abs() / 16 + scales.max() * 2.0**-10).all())


def test_scales_are_powers_of_two_at_or_above_the_plain_ones() -> None:
    amax = torch.arange(0, 0x7F80, 7, dtype=torch.int32)
    plain, power = fp8.scales_of(amax), fp8.scales_of(amax, ue8m0=True)
    mantissa, _ = torch.frexp(power)
    assert bool((mantissa == 0.5).all()) and bool((power >= plain).all()) and bool((power < 2 * plain).all())


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_infinity_or_nan_shows_in_its_blocks_amax(bad: float, dtype: torch.dtype) -> None:
    rows = torch.zeros(200, 300, dtype=dtype)
    assert fp8.finite(fp8.block_amax(rows))
    rows[130, 260] = bad
    amax = fp8.block_amax(rows)
    assert not fp8.finite(amax)
    assert (amax >= 0x7F80).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(("length", "start", "want"), [(0, 0, 0), (1, 127, 1), (2, 127, 2), (128, 128, 1), (129, 1, 2)])
def test_blocks_that_a_range_touches(length: int, start: int, want: int) -> None:
    assert fp8.blocks_of(length, start) == want

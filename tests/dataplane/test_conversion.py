"""bf16 is copied bit by bit, fp32 rounded as torch rounds it, and nothing that is not finite leaves the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from weightsync.conversion import convert_into
from weightsync.errors import ConversionError

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)


def poisoned(n: int) -> torch.Tensor:
    return torch.full((n,), float("nan"), dtype=torch.bfloat16)


def nearest_even(bits: np.ndarray) -> np.ndarray:
    """Upper halves of fp32 patterns, rounded to nearest, ties to even, by integer arithmetic."""
    wide = bits.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def test_every_finite_bf16_pattern_is_copied_bit_by_bit() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    flat = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    out = poisoned(len(flat))
    convert_into(out, flat, name="w")
    assert torch.equal(out.view(torch.int16), flat.view(torch.int16))


@SETTINGS
@given(arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, 0xFFFFFFFF)))
def test_fp32_is_rounded_to_nearest_even_as_torch_casts(bits: np.ndarray) -> None:
    bits = np.where((bits & 0x7F800000) >= 0x7F000000, bits & 0x80FFFFFF, bits).astype(np.uint32)
    flat = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    out = poisoned(len(flat))
    convert_into(out, flat, name="w")
    np.testing.assert_array_equal(out.view(torch.int16).numpy().view(np.uint16), nearest_even(bits))
    assert torch.equal(out.view(torch.int16), flat.to(torch.bfloat16).view(torch.int16))


def test_ties_go_to_the_even_neighbour() -> None:
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x00008000], dtype=torch.int32)
    out = poisoned(4)
    convert_into(out, bits.view(torch.float32), name="w")
    assert out.view(torch.int16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x0000]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_infinity_or_nan_is_refused_with_name_and_place(dtype: torch.dtype, bad: float) -> None:
    flat = torch.zeros(1000, dtype=dtype)
    flat[737] = bad
    flat[900] = bad
    with pytest.raises(
        ConversionError, match=rf"layers.3.q_proj: 2 of 1000 elements are not finite, first element 737 \({bad}"
    ):
        convert_into(poisoned(1000), flat, name="layers.3.q_proj")


def test_a_finite_fp32_beyond_bf16_is_refused_too() -> None:
    with pytest.raises(ConversionError, match=r"w: 1 of 2 .*became inf"):
        convert_into(poisoned(2), torch.tensor([0.0, 3.4e38]), name="w")


@pytest.mark.failure_mode(9)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_nobody_casts_is_refused_with_those_that_are(dtype: torch.dtype) -> None:
    with pytest.raises(
        ConversionError, match=r"w: no conversion from .* to bfloat16; there are casts between bfloat16, float32"
    ):
        convert_into(poisoned(2), torch.zeros(2, dtype=dtype), name="w")
    with pytest.raises(ConversionError, match="no conversion from float32 to float"):
        convert_into(torch.zeros(2, dtype=dtype), torch.zeros(2), name="w")


def test_a_size_that_differs_is_refused() -> None:
    for out in (poisoned(3), poisoned(4).reshape(2, 2)):
        with pytest.raises(ConversionError, match=r"w: cannot convert \[4\] elements into \["):
            convert_into(out, torch.zeros(4), name="w")


def test_nothing_is_converted_to_nothing() -> None:
    convert_into(poisoned(0), torch.zeros(0), name="w")


def test_fp32_targets_get_what_the_checkpoint_would_have_held() -> None:
    """A router that the engine keeps in fp32: rounded to bf16 on the way, unless the checkpoint itself has fp32."""
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    out = torch.full((1000,), float("nan"))
    convert_into(out, flat, name="router")
    assert torch.equal(out, flat.to(torch.bfloat16).float())
    convert_into(out, flat, name="bias", through=torch.float32)
    assert torch.equal(out, flat)
    convert_into(out, flat.to(torch.bfloat16), name="router")
    assert torch.equal(out, flat.to(torch.bfloat16).float())

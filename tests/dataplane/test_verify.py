"""A digest adds up over any partition and notices any change."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync.errors import ConversionError
from weightsync.layout.records import Target
from weightsync.plan import WRITE
from weightsync.verify import ROW_ELEMENTS, column_factors, digest_range, digest_tensor, digest_writes, to_hex

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
TWO_TO_64 = 1 << 64


def random_bf16(n: int, seed: int = 0) -> torch.Tensor:
    bits = np.random.default_rng(seed).integers(0, 1 << 16, n, dtype=np.uint16)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


LONG = random_bf16(700 * ROW_ELEMENTS + 17)
"""More rows than are taken at once."""
places = st.integers(0, len(LONG) - 1)


@SETTINGS
@given(st.lists(places, max_size=8))
def test_partial_digests_of_any_partition_add_up(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(LONG)]
    parts = [digest_range("w", a, LONG[a:b]) for a, b in itertools.pairwise(edges)]
    assert sum(parts) % TWO_TO_64 == digest_tensor("w", LONG)


@SETTINGS
@given(places, st.integers(1, 0xFFFF))
def test_one_changed_element_changes_the_digest(place: int, flip: int) -> None:
    changed = LONG.clone()
    changed.view(torch.int16)[place] ^= flip - 0x10000 if flip > 0x7FFF else flip
    assert digest_tensor("w", changed) != digest_tensor("w", LONG)


@SETTINGS
@given(places, places)
def test_two_elements_swapped_change_the_digest(a: int, b: int) -> None:
    swapped = LONG.clone()
    bits = swapped.view(torch.int16)
    bits[a], bits[b] = bits[b].clone(), bits[a].clone()
    same = bool((LONG.view(torch.int16) == bits).all())
    assert (digest_tensor("w", swapped) == digest_tensor("w", LONG)) == same


@SETTINGS
@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_same_bytes_elsewhere_have_another_digest(a: int, b: int) -> None:
    piece = LONG[:100]
    assert (digest_range("w", a, piece) == digest_range("w", b, piece)) == (a == b)


@SETTINGS
@given(st.text(max_size=20), st.text(max_size=20))
def test_the_same_bytes_under_another_name_have_another_digest(a: str, b: str) -> None:
    assert (digest_range(a, 0, LONG[:100]) == digest_range(b, 0, LONG[:100])) == (a == b)


def test_factors_are_odd_and_no_two_of_a_row_alike() -> None:
    factors = column_factors()
    assert len(set(factors.tolist())) == len(factors) == ROW_ELEMENTS
    assert bool((factors % 2 == 1).all()) and int(factors.max()) < 1 << 32


def test_zeros_count_so_that_a_missing_range_shows() -> None:
    zeros = torch.zeros(1000, dtype=torch.bfloat16)
    assert digest_range("w", 0, zeros[:999]) != digest_range("w", 0, zeros)
    assert digest_range("w", 0, zeros[:0]) == 0


def test_the_definition_is_fixed() -> None:
    """Trainer and engine may run different builds: these numbers, worked out with Python's integers, must not drift."""

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % TWO_TO_64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % TWO_TO_64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % TWO_TO_64
        return x ^ (x >> 31)

    hashed = int.from_bytes(hashlib.blake2b(b"model.norm.weight", digest_size=8).digest(), "little")
    start = 3 * ROW_ELEMENTS - 2
    piece = LONG[:5]
    total = 0
    for i, bits in enumerate(piece.view(torch.int16).tolist(), start):
        column = splitmix((i % ROW_ELEMENTS) ^ 0x5EED0F9E3779B9) % (1 << 32) | 1
        row = splitmix((hashed + i // ROW_ELEMENTS) % TWO_TO_64) | 1
        total += (bits % 65536 + 1) * column * row
    assert digest_range("model.norm.weight", start, piece) == total % TWO_TO_64
    assert to_hex(digest_range("model.norm.weight", 0, torch.arange(8).to(torch.bfloat16))) == "3fa4e37eff3c34a8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float16])
def test_other_widths_are_digested_by_their_bits(dtype: torch.dtype) -> None:
    tensor = torch.arange(-500, 500).to(dtype)
    other = tensor.clone()
    other[700] += 1
    assert digest_tensor("w", tensor) == digest_tensor("w", tensor.reshape(10, 100))
    assert digest_tensor("w", tensor) != digest_tensor("w", other)


def test_what_cannot_be_digested_is_refused_with_its_shape() -> None:
    with pytest.raises(ConversionError, match=r"torch.float64 tensor of shape \[3\]"):
        digest_range("w", 0, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ConversionError, match=r"shape \[2, 2\]"):
        digest_range("w", 0, torch.zeros(2, 2, dtype=torch.bfloat16))


@SETTINGS
@given(st.data())
def test_digests_of_writes_add_up_to_the_targets(data: st.DataObject) -> None:
    """Runs of one element and runs beyond a chunk, out of an arena in another order than the targets."""
    lengths = data.draw(st.lists(st.sampled_from([1, 3, 700, 8191, 8192, 70_000]), min_size=1, max_size=12))
    targets = [data.draw(st.integers(0, 2)) for _ in lengths]
    order = data.draw(st.permutations(range(len(lengths))))
    arena = random_bf16(sum(lengths), seed=1)
    writes, want = np.zeros(len(lengths), dtype=WRITE), {}
    used, filled = 0, [0, 0, 0]
    for i in order:
        index, length = targets[i], lengths[i]
        writes[i] = (used, index, filled[index], length)
        piece = digest_range(f"t{index}", filled[index], arena[used : used + length])
        want[index] = (want.get(index, 0) + piece) % TWO_TO_64
        used, filled[index] = used + length, filled[index] + length
    assert digest_writes(arena, writes, [Target(f"t{i}", (filled[i],), "bfloat16") for i in range(3)]) == want


def test_an_arena_of_several_dtypes_is_seen_in_each() -> None:
    """Bytes 0..63 are FP8, 64..127 fp32; offsets count elements of the target's own dtype."""
    arena = torch.randint(0, 256, (131,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    targets = [Target("q", (64,), "float8_e4m3fn"), Target("scale", (16,), "float32")]
    writes = np.array([(0, 0, 0, 64), (16, 1, 0, 16)], dtype=WRITE)
    want = {0: digest_range("q", 0, arena[:64]), 1: digest_range("scale", 0, arena[64:128].view(torch.float32))}
    assert digest_writes(arena, writes, targets) == want


@pytest.mark.failure_mode(31)
def test_digesting_lets_a_heartbeat_thread_run() -> None:
    """A thread that wants to wake every millisecond does so while another digests 32 million elements."""
    tensor = torch.zeros(1 << 25, dtype=torch.bfloat16)
    digest_range("w", 0, tensor[:1])
    worker = threading.Thread(target=digest_tensor, args=("w", tensor))
    wakes, longest = 0, 0.0
    worker.start()
    last = time.monotonic()
    while worker.is_alive():
        worker.join(timeout=0.001)
        wakes, longest, last = wakes + 1, max(longest, time.monotonic() - last), time.monotonic()
    assert wakes >= 3
    assert longest < 1.0

"""The device's digest is the host's, for any element size, start and length."""

from __future__ import annotations

import pytest
import torch

from weightsync import verify

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from weightsync.digest_kernels import DigestGroup, Range

MASK = (1 << 64) - 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_ranges_of_any_start_and_length_equal_the_hosts_digest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    size = dtype.itemsize
    memory = torch.randint(0, 256, (3_000_000 * size,), generator=generator, dtype=torch.uint8).view(dtype)
    device = memory.cuda()
    cuts = [(0, 0, 1), (5, 3, 300), (255, 1000, 257), (256, 4096, 1 << 20), (1 << 33, 7, 2_000_000), (77, 11, 70_000)]
    ranges = [Range(name=f"w{i}", start=start, flat=device[low : low + n]) for i, (start, low, n) in enumerate(cuts)]
    group = DigestGroup(ranges)
    for _ in range(2):  # again over the sums of the first
        sums = [int(value) & MASK for value in group.digest().tolist()]
        want = [verify.digest_range(f"w{i}", start, memory[low : low + n]) for i, (start, low, n) in enumerate(cuts)]
        assert sums == want


def test_one_changed_bit_changes_it() -> None:
    device = torch.zeros(100_000, dtype=torch.uint8, device="cuda")
    group = DigestGroup([Range(name="w", start=0, flat=device)])
    before = int(group.digest())
    device[99_999] = 1
    assert int(group.digest()) != before

"""Arenas lie in memory that a NIC can register, also in a trainer whose allocator makes expandable segments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PROBE = """
import torch
from weightsync.device_memory import allocate, registrable

def is_expandable(tensor):
    at = tensor.data_ptr()
    segments = torch.cuda.memory_snapshot(include_traces=False) if tensor.is_cuda else []
    return any(s["is_expandable"] and s["address"] <= at < s["address"] + s["total_size"] for s in segments)

device = torch.device("cuda")
cached = torch.empty(1 << 28, dtype=torch.uint8, device=device)
assert is_expandable(cached) is EXPANDABLE
assert registrable([cached, torch.empty(8)]) is not EXPANDABLE
del cached  # a free part of a segment, which the allocator would give out next
arena = allocate(1 << 27, device)
assert not is_expandable(arena)
assert registrable([arena])
assert is_expandable(torch.empty(1 << 28, dtype=torch.uint8, device=device)) is EXPANDABLE
assert not is_expandable(torch.empty(8))

from weightsync.transport import Agent
sender, receiver = Agent("sender"), Agent("receiver")
target = torch.zeros(1 << 27, dtype=torch.uint8, device=device) if not EXPANDABLE else allocate(1 << 27, device).zero_()
sender.register([arena])
receiver.register([target])
print("registered")
"""


@pytest.mark.failure_mode(33)
@pytest.mark.parametrize("expandable", [False, True])
def test_an_arena_is_never_in_an_expandable_segment(expandable: bool) -> None:
    """That `torch.empty` in its place would give expandable memory is what the first and the third assertion say of it."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    probe = PROBE.replace("EXPANDABLE", str(expandable))
    answer = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.strip().endswith("registered"), answer.stderr[-2000:]

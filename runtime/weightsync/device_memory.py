"""Memory that a NIC can register: whole allocations of the driver, never mapped piece by piece. Imports torch only.

With `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`, which trainers set against fragmentation, torch maps physical pages
into one reserved range as it needs them; registration of such memory with an mlx5 NIC fails, and CUDA IPC cannot export it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocate(length_bytes: int, device: torch.device) -> Tensor:
    """[length_bytes] uint8, uninitialised, registrable whatever the allocator is set to. Raises torch.OutOfMemoryError."""
    if device.type != "cuda":
        return torch.empty(length_bytes, dtype=torch.uint8, device=device)
    with _whole_segments():
        return torch.empty(length_bytes, dtype=torch.uint8, device=device)


def registrable(tensors: Iterable[Tensor]) -> bool:
    """Whether a NIC can register the memory of all these tensors, which somebody else has allocated."""
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.is_cuda]
    if not addresses:
        return True
    mapped_piecewise = [
        range(segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot(include_traces=False)
        if segment["is_expandable"]
    ]
    return not any(address in segment for address in addresses for segment in mapped_piecewise)


@contextmanager
def _whole_segments() -> Iterator[None]:
    """The allocator neither makes expandable segments nor gives out a free part of one (c10's CUDACachingAllocator.cpp)."""
    settings: dict[str, Any] = torch.cuda.memory._snapshot().get("allocator_settings", {})
    if not settings.get("expandable_segments", False):
        yield
        return
    conf = _conf(settings)
    torch._C._accelerator_setAllocatorSettings(_with_expandable(conf, "False"))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(conf)


def _conf(settings: Mapping[str, Any]) -> str:
    """What the allocator is set to: as it says itself, else as the process was started."""
    said = [source[name] for source in (settings, os.environ) for name in _VARIABLES if source.get(name)]
    return said[0] if said else "expandable_segments:True"


def _with_expandable(conf: str, value: str) -> str:
    """The whole configuration with that one field changed: torch puts back to its default whatever is not named."""
    changed, found = re.subn(r"(\bexpandable_segments\s*:\s*)\w+", rf"\g<1>{value}", conf)
    return changed if found else f"{conf},expandable_segments:{value}"

"""The staging arena: its size and budget, what it begins with, and that nobody reaches one that was retired."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch

from weightsync.errors import ConfigError
from weightsync.staging import ALIGNMENT_BYTES, StagingArena, copy_all


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def write_as_another_process_would(address: int, data: bytes) -> int:
    """`process_vm_writev` into this process, which is how UCX writes between processes of a host; 0 or the error's number."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(data)
    local, remote = _Range(ctypes.addressof(held), len(data)), _Range(address, len(data))
    done = libc.process_vm_writev(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return 0 if done == len(data) else ctypes.get_errno()


def live_tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.arange(1000, dtype=torch.bfloat16).view(50, 20),
        "scale": torch.rand(7, dtype=torch.float32),
        "q": torch.randint(0, 255, (33, 3), dtype=torch.uint8).view(torch.float8_e4m3fn),
    }


def test_it_begins_as_a_copy_of_live_memory_in_one_aligned_buffer() -> None:
    live = live_tensors()
    arena = StagingArena(live, place="device", budget_bytes=None)
    assert arena.length_bytes == len(arena.buffer) == 2048 + 256 + 256
    for name, tensor in arena.tensors.items():
        assert (tensor.shape, tensor.dtype) == (live[name].shape, live[name].dtype)
        assert torch.equal(tensor.view(torch.uint8), live[name].view(torch.uint8))
        assert (tensor.data_ptr() - arena.buffer.data_ptr()) % ALIGNMENT_BYTES == 0
    arena.tensors["w"].zero_()
    assert live["w"][1, 1] == 21
    copy_all(arena.tensors, live)
    assert not live["w"].any()


def test_a_budget_that_is_too_small_is_told_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"staging takes 2560 bytes .* its budget is 2559"):
        StagingArena(live_tensors(), place="device", budget_bytes=2559)
    assert StagingArena(live_tensors(), place="device", budget_bytes=2560).length_bytes == 2560


@pytest.mark.failure_mode(52)
def test_its_pages_are_taken_at_once() -> None:
    """The CPU build sizes its KV cache by what the process has in memory: a lazy mapping would not be counted."""
    resident = Path("/proc/self/statm")
    live = {"w": torch.ones(32 << 20, dtype=torch.uint8)}
    before = int(resident.read_text().split()[1])
    arena = StagingArena(live, place="device", budget_bytes=None)
    taken = (int(resident.read_text().split()[1]) - before) * os.sysconf("SC_PAGESIZE")
    assert taken >= 0.9 * arena.length_bytes


@pytest.mark.failure_mode(47)
def test_nobody_reaches_an_arena_that_was_retired() -> None:
    """1. a process of this host writes into staging, as NIXL lets it; 2. once retired, the pages are given back; 3. the same write
    fails, whatever the writer still has; 4. the new arena lies elsewhere, and so does all that is mapped later.

    Without the seal, step 3 succeeds, or writes into whatever was mapped there since.
    """
    live = {"w": torch.ones(32 << 20, dtype=torch.uint8)}
    arena = StagingArena(live, place="device", budget_bytes=None)
    address = arena.buffer.data_ptr()
    assert write_as_another_process_would(address, b"late") == 0
    assert bytes(arena.buffer[:4].tolist()) == b"late"
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    new = arena.retire(live)
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - resident
    assert grown * os.sysconf("SC_PAGESIZE") < 0.5 * arena.length_bytes
    assert write_as_another_process_would(address, b"late") == errno.EFAULT
    assert new.buffer.data_ptr() != address
    for _ in range(8):
        assert StagingArena(live, place="device", budget_bytes=None).buffer.data_ptr() != address
    assert torch.equal(new.tensors["w"], live["w"])
    assert arena.tensors == {}
    assert int(Path("/proc/self/statm").read_text().split()[1]) - resident <= 9.5 * (32 << 20) / os.sysconf(
        "SC_PAGESIZE"
    )

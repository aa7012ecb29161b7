"""The second buffer of a staged push: bytes land here while the engine serves, and a commit copies them into live memory.

One arena an engine rank, made when the model is loaded and before vLLM sizes its KV cache. It begins as a copy of live memory:
so the elements that no writer touches are right, and every page is there when free memory is measured. Imports torch only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from weightsync import device_memory
from weightsync.errors import ConfigError

ALIGNMENT_BYTES = 256
"""Each tensor begins at a multiple of it, as in memory of the device's own allocator."""
_PROT_NONE = 0
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class StagingArena:
    """Room for a copy of every live tensor, in one buffer.

    live: contiguous tensors by name, all on one device; copied, never kept.
    place: `device` for the memory that `live` is in, `pinnedHost` for host memory (pinned where there is a GPU).
    Raises ConfigError with the numbers when the copy takes more than `budget_bytes` (None: no bound), or memory is short.
    """

    def __init__(
        self, live: Mapping[str, Tensor], *, place: Literal["device", "pinnedHost"], budget_bytes: int | None
    ) -> None:
        self._place: Literal["device", "pinnedHost"] = place
        self._budget_bytes = budget_bytes
        offsets, end = {}, 0
        for name, tensor in live.items():
            offsets[name] = end
            end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if budget_bytes is not None and end > budget_bytes:
            raise ConfigError(
                f"staging takes {end} bytes ({end / 2**30:.2f} GiB), its budget is {budget_bytes} ({budget_bytes / 2**30:.2f} "
                "GiB): raise transfer.stagingBudgetGiB, or the tensor parallel size, or commit inPlace"
            )
        on_gpu = any(tensor.is_cuda for tensor in live.values())
        self._pinned = on_gpu and place == "pinnedHost"
        device = next(iter(live.values())).device if on_gpu and not self._pinned else None
        self.length_bytes = end
        self.buffer = _map_host(end, self._pinned) if device is None else _allocate(end, device)
        """[length_bytes] uint8, to be registered as a whole."""
        self.tensors = {name: _shaped_like(t, self.buffer[offsets[name] :]) for name, t in live.items()}
        """A view for each live tensor, of its shape and dtype."""
        copy_all(live, self.tensors)

    @property
    def retirable(self) -> bool:
        """Whether `retire` shuts out whoever may still write: pages of the host can be taken away, a GPU's memory cannot."""
        return self.buffer.device.type == "cpu"

    def retire(self, live: Mapping[str, Tensor]) -> StagingArena:
        """Give the pages back and seal their addresses for the life of the process; returns an arena elsewhere.

        A writer that lags then meets no memory at all, neither this arena's nor what would be allocated in its place. The buffer
        must be deregistered, and `tensors` of this arena must not be touched again.
        """
        assert self.retirable
        address = self.buffer.data_ptr()
        self._unpin()
        _check(_libc.mprotect(address, self.length_bytes, _PROT_NONE), "seal", self.length_bytes)
        _check(_libc.madvise(address, self.length_bytes, mmap.MADV_DONTNEED), "give back", self.length_bytes)
        self.tensors = {}
        return StagingArena(live, place=self._place, budget_bytes=self._budget_bytes)

    def _unpin(self) -> None:
        if self._pinned:
            _cudart().cudaHostUnregister(self.buffer.data_ptr())


@torch.no_grad()
def copy_all(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy every source into the target of its name, and wait until the device has done so."""
    names = [name for name in targets if name in sources]
    torch._foreach_copy_([targets[n] for n in names], [sources[n] for n in names])  # pyright: ignore[reportPrivateImportUsage]
    for device in {tensor.device for n in names for tensor in (targets[n], sources[n]) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _allocate(length_bytes: int, device: torch.device) -> Tensor:
    try:
        return device_memory.allocate(length_bytes, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{length_bytes} bytes of staging do not fit on {device}: use staging pinnedHost, or commit inPlace"
        ) from error


def _map_host(length_bytes: int, pinned: bool) -> Tensor:
    """Anonymous pages of their own, so that they can be sealed one day."""
    address = _libc.mmap(
        None, length_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    if address == _MAP_FAILED:
        _check(-1, "map", length_bytes)
    if pinned and (status := int(_cudart().cudaHostRegister(address, length_bytes, 0))):
        raise ConfigError(f"CUDA cannot pin {length_bytes} bytes of staging (status {status}): check `ulimit -l`")
    return torch.frombuffer((ctypes.c_uint8 * length_bytes).from_address(address), dtype=torch.uint8)


def _cudart() -> Any:
    return torch.cuda.cudart()


def _check(status: int, what: str, length_bytes: int) -> None:
    if status:
        raise ConfigError(f"cannot {what} {length_bytes} bytes of staging: {os.strerror(ctypes.get_errno())}")


def _shaped_like(tensor: Tensor, memory: Tensor) -> Tensor:
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

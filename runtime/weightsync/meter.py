"""Digests of memory that is rewritten by every push: prepared once, measured where the memory is, on the host or on a GPU.

The numbers are those of `weightsync.verify`. Imports torch; Triton only where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from weightsync import verify

if TYPE_CHECKING:
    from weightsync.digest_kernels import Range
    from weightsync.layout.records import Target


class TensorMeter:
    """Whole contiguous tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._host = {name: tensor for name, tensor in tensors.items() if not tensor.is_cuda}
        on_device = [(name, name, 0, tensor.reshape(-1)) for name, tensor in tensors.items() if tensor.is_cuda]
        self._device = _DeviceSums(on_device) if on_device else None

    def measure(self, names: Container[str] | None = None) -> dict[str, int]:
        """Digest of each tensor, or of those named, as its memory is now; waits for all that the device has been given before.

        A writer's word that it is done does not say that this device's kernels see the bytes: hence the whole device.
        """
        digests = {
            name: verify.digest_tensor(name, tensor)
            for name, tensor in self._host.items()
            if names is None or name in names
        }
        if self._device is not None:
            torch.cuda.synchronize(self._device.device)  # not the calling thread's own, which is the first one
            self._device.launch()
            measured = cast(dict[str, int], _read([self._device]))
            digests |= {name: digest for name, digest in measured.items() if names is None or name in names}
        return digests


class WritesMeter:
    """What a rank's writes (dtype `plan.WRITE`) bring from each memory (flat uint8, all on one device), by target index."""

    def __init__(self, parts: Sequence[tuple[Tensor, np.ndarray]], targets: Sequence[Target]) -> None:
        self._parts, self._targets = parts, targets
        self._sums: dict[int, int] = {}
        pieces = [piece for memory, writes in parts if memory.is_cuda for piece in _pieces(memory, writes, targets)]
        self._device = _DeviceSums(pieces) if pieces else None

    def launch(self) -> None:
        """Measure the memory as it is now; on a GPU on the current stream, and `read` waits for the result."""
        if self._device is not None:
            self._device.launch()
            return
        self._sums = {}
        for memory, writes in self._parts:
            for index, digest in verify.digest_writes(memory, writes, self._targets).items():
                self._sums[index] = (self._sums.get(index, 0) + digest) & verify.MASK

    @classmethod
    def read(cls, meters: Sequence[WritesMeter]) -> dict[int, int]:
        """Partial digests of all meters together as of their last launch. Targets that get nothing are absent."""
        totals = cast(dict[int, int], _read([meter._device for meter in meters if meter._device is not None]))
        for meter in meters:
            for index, digest in meter._sums.items():
                totals[index] = (totals.get(index, 0) + digest) & verify.MASK
        return totals


class _DeviceSums:
    """Digests of (key, name, start, flat) pieces on a GPU, added up by key."""

    def __init__(self, pieces: Sequence[tuple[Hashable, str, int, Tensor]]) -> None:
        from weightsync.digest_kernels import DigestGroup, Range

        self.device = pieces[0][3].device
        by_size: dict[int, list[tuple[Hashable, Range]]] = {}
        for key, name, start, flat in pieces:
            by_size.setdefault(flat.element_size(), []).append((key, Range(name=name, start=start, flat=flat)))
        self.groups = [
            ([key for key, _ in items], DigestGroup([range_ for _, range_ in items])) for items in by_size.values()
        ]

    def launch(self) -> None:
        for _, group in self.groups:
            group.digest()


def _read(measured: Sequence[_DeviceSums]) -> dict[Hashable, int]:
    """The last launches' sums by key, brought to the host at once."""
    groups = [group for sums in measured for group in sums.groups]
    if not groups:
        return {}
    totals: dict[Hashable, int] = {}
    keys = [key for keys, _ in groups for key in keys]
    for key, digest in zip(keys, torch.cat([group.sums for _, group in groups]).tolist(), strict=True):
        totals[key] = (totals.get(key, 0) + digest) & verify.MASK
    return totals


def _pieces(arena: Tensor, writes: np.ndarray, targets: Sequence[Target]) -> list[tuple[Hashable, str, int, Tensor]]:
    views = verify.views_of(arena, writes, targets)
    return [
        (index, targets[index].name, offset, views[targets[index].dtype][slot : slot + length])
        for slot, index, offset, length in writes.tolist()
    ]

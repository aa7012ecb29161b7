"""Digests of whole tensors where they lie: in host memory by numpy, on a GPU by one launch for each element size.

Imports torch; Triton on GPU machines only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from weightsync import verify


def measure(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """Digest of each named tensor, as `verify.digest_tensor` defines it.

    Waits for the device first: a writer's word that it is done does not say that this device sees the bytes.
    """
    chosen = {name: tensors[name] for name in names}
    on_gpu = {name: tensor for name, tensor in chosen.items() if tensor.is_cuda}
    digests = {name: verify.digest_tensor(name, tensor) for name, tensor in chosen.items() if not tensor.is_cuda}
    return digests | _measure_on_gpu(on_gpu) if on_gpu else digests


def _measure_on_gpu(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    from weightsync.digest_kernels import DigestGroup, Range

    torch.cuda.synchronize()
    by_size: dict[int, list[Range]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_size[tensor.element_size()].append(Range(name=name, start=0, flat=tensor.reshape(-1)))
    digests = {}
    for ranges in by_size.values():
        sums = DigestGroup(ranges).digest().tolist()
        digests |= {item.name: total & verify.MASK for item, total in zip(ranges, sums, strict=True)}
    return digests

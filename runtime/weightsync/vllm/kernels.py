"""Which kernels compute with weights as the checkpoint's loader left them: an allow-list, by quantization method and backend.

A byte size says nothing (failure mode 3): a kernel may shuffle rows in place. What is not listed is replayed by module, and what is
listed must prove it at start (`weightsync.vllm.offer`). Told by names, so that a backend's class is not imported to ask. vLLM 0.32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import nn


class Kernel(NamedTuple):
    """What computes with a module's weights."""

    method: str
    """Class of its quantization method; `none` where it has none."""
    backend: str


DIRECT: dict[Kernel, str] = {
    Kernel("none", "none"): "norms and the like: nothing processes them",
    Kernel("UnquantizedLinearMethod", "torch"): "GPU; the CPU build as this plug-in starts it",
    Kernel("UnquantizedEmbeddingMethod", "torch"): "GPU; the CPU build as this plug-in starts it",
    Kernel("UnquantizedFusedMoEMethod", "TRITON"): "GPU",
    Kernel("UnquantizedFusedMoEMethod", "CPU, packed at each call"): "the CPU build as this plug-in starts it",
    Kernel("Fp8LinearMethod", "TritonFp8BlockScaledMMKernel"): "GPU, 128x128 blocks",
    Kernel("Fp8LinearMethod", "CutlassFp8BlockScaledMMKernel"): "GPU, 128x128 blocks",
    Kernel("Fp8MoEMethod", "TRITON"): "GPU, 128x128 blocks",
    Kernel("Fp8MoEMethod", "VLLM_CUTLASS"): "GPU, 128x128 blocks",
}
"""Where a direct write is a load, and what is known of it. The table in docs/inspect.md is held against it by a test."""

SWAPPED = {"oneDNN": ("cpu_linear",), "zentorch": ("cpu_linear",)}
"""By backend, attributes that hold weights where no tensor reaches them: a replay puts the new object in the old one's place. Only
ever for CPU kernels, which no CUDA graph has captured."""

_HELD = {"handler": "oneDNN", "packed_weight": "SGL"}
"""Kernels of the CPU build by what `cpu_linear` closes over, among other things."""


def kernel_of(module: nn.Module) -> Kernel:
    """Method and backend of one module, whose weights may be loaded or not."""
    method: Any = getattr(module, "quant_method", None)
    if method is None:
        return Kernel("none", "none")
    return Kernel(type(method).__name__, _backend(module, method))


def swapped(module: nn.Module) -> tuple[str, ...]:
    """Attributes of a module that a replay replaces instead of copying into."""
    return SWAPPED.get(kernel_of(module).backend, ())


def _backend(module: nn.Module, method: Any) -> str:
    for attribute in ("fp8_backend", "unquantized_backend"):
        backend = getattr(method, attribute, None)
        if backend is not None:
            return "CPU, packed at each call" if _packs_at_calls(method) else backend.name
    for attribute in ("fp8_linear", "kernel"):
        if hasattr(method, attribute):
            return type(getattr(method, attribute)).__name__
    linear = getattr(module, "cpu_linear", None)
    if linear is not None:
        return _cpu_backend(linear)
    return "FlashInfer" if isinstance(getattr(method, "_gemm_impl", None), functools.partial) else "torch"


def _packs_at_calls(method: Any) -> bool:
    """Whether the plug-in keeps this CPU kernel from packing experts when they are loaded (`plugin._keep_load_layout`)."""
    process = getattr(getattr(method, "experts_cls", None), "process_weights_after_loading", None)
    return getattr(process, "__name__", "") == "_pad_moe_intermediate"


def _cpu_backend(linear: Any) -> str:
    """Of what `dispatch_cpu_unquantized_gemm` chose, told by what its closure holds on to."""
    held = getattr(getattr(linear, "__code__", None), "co_freevars", ())
    if not held:
        return "torch"
    return next((name for variable, name in _HELD.items() if variable in held), "zentorch")

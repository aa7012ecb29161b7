"""One fleet to push to on GPUs, and what its trainers, its engines and the bench itself measure with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.shapes import Engine
from weightsync.conversion import fp8

RUNS = 7
TIMEOUT_S = 120.0
UCX_TLS = "cuda_ipc,cuda_copy,sm,tcp,self"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One fleet to push to."""

    what: str
    engines: tuple[Engine, ...]
    trainers: int = 1
    """Ranks that share the model's rows, as FSDP does."""
    engine_device: int = 0
    zero_copy: bool = False
    """Whether what nothing converts is read where the model keeps it."""
    staged: bool = False
    """Whether the engine also commits from staging memory, which takes that much memory more."""


DISTINCT = 4
"""Layers with weights of their own; the others share them."""


def naive_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As one writes it with torch: the reference, tensor by tensor."""
    scales = fp8.scales_of(fp8.block_amax(rows))
    return fp8.quantize(rows, scales), scales


def wall(run: Callable[[], object]) -> float:
    """Median wall time, the device idle before and after."""
    times = []
    for _ in range(RUNS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[RUNS // 2]


def ask(pipe: Any, *words: str) -> Any:
    pipe.send(words)
    return hear(pipe)


def hear(pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"an engine said nothing for {TIMEOUT_S:.0f} s")
    return pipe.recv()


def row_of(what: str, payload: int, seconds: float, limit: float) -> Row:
    rate = payload / seconds / 1e9
    return {"what": what, "seconds": seconds, "gbps": rate} | ({"share_of_copy": rate / limit} if limit else {})

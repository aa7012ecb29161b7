"""How fast this device converts, through the arena that a trainer rank has: bf16 as it is, and FP8 blocks. No transport."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weightsync.benchmark.engine import SOURCE, TARGET
from weightsync.benchmark.streams import take_turns
from weightsync.layout.forms import FP8, SCALE_SUFFIX, scale_grid
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.layout.shards import LocalPiece, LocalSources
from weightsync.slots import SlotArena
from weightsync.waiting import Deadline

COLUMNS = 2048
COPY = "plain copy"
Rates = dict[str, tuple[float, int]]
"""By what is done: median seconds, and the bytes that it reads and writes."""


def measure_conversion(*, source_bytes: int, device: str, turns: int, deadline: Deadline) -> Rates:
    """Convert a bf16 matrix of about that size, and copy it, in turns."""
    source = torch.randn(max(1, source_bytes // (2 * COLUMNS)), COLUMNS, dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {COPY: lambda: copied.copy_(source)}
    moved = {COPY: 2 * source.nbytes}
    for what, dtype in (("bf16 as it is", "bfloat16"), ("bf16 to FP8 128x128", FP8)):
        arena = _arena(source, dtype)
        runs[what] = arena.fill
        moved[what] = source.nbytes + arena.buffer.nbytes
    waited = {name: _and_wait(run) for name, run in runs.items()} if source.is_cuda else runs
    seconds = take_turns(waited, turns=turns, deadline=deadline)
    return {name: (taken, moved[name]) for name, taken in seconds.items()}


def _and_wait(run: Callable[[], object]) -> Callable[[], object]:
    def both() -> None:
        run()
        torch.cuda.synchronize()

    return both


def _arena(source: torch.Tensor, dtype: str) -> SlotArena:
    """An arena that carries the matrix in that dtype."""
    shape = (source.shape[0], source.shape[1])
    wanted = [SourceTensor(SOURCE, shape, dtype)]
    if dtype == FP8:
        wanted.append(SourceTensor(SOURCE + SCALE_SUFFIX, scale_grid(shape), "float32"))
    names = [tensor.name.replace(SOURCE, TARGET, 1) for tensor in wanted]
    layout = TargetLayout(
        targets=tuple(Target(name, tensor.shape, tensor.dtype) for name, tensor in zip(names, wanted, strict=True)),
        sources=tuple(wanted),
        copies=tuple(
            Copy(tensor.name, 0, (1,), name, 0, (1,), (tensor.numel,))
            for name, tensor in zip(names, wanted, strict=True)
        ),
    )
    local = LocalSources(
        (SourceTensor(SOURCE, shape, "bfloat16"),), (LocalPiece(SOURCE, 0, source.numel(), 0, source, 0),)
    )
    arena = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto")
    arena.lay_out({layout.digest(): layout})
    return arena

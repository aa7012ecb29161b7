"""Engines that want FP8, ranks that hold rows, and their arenas filled and delivered: for tests on the host and on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from weightsync.layout.forms import GROUP_BYTES, SCALE_SUFFIX, scale_grid
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.layout.shards import LocalPiece, LocalSources
from weightsync.plan import make_plan
from weightsync.slots import SlotArena

TORCH = {"float8_e4m3fn": torch.float8_e4m3fn, "float32": torch.float32, "bfloat16": torch.bfloat16}


def engine(tensors: Sequence[SourceTensor]) -> TargetLayout:
    """An engine that wants each tensor as it is."""
    targets = tuple(Target(f"p.{t.name}", t.shape, t.dtype) for t in tensors)
    copies = tuple(Copy(t.name, 0, (1,), f"p.{t.name}", 0, (1,), (t.numel,)) for t in tensors)
    return TargetLayout(targets=targets, sources=tuple(tensors), copies=copies)


def fp8_engine(shapes: dict[str, tuple[int, int]], plain: dict[str, str]) -> TargetLayout:
    """FP8 matrices with their scales, and other tensors of 300 elements in some dtype."""
    tensors = [SourceTensor(name, shape, "float8_e4m3fn") for name, shape in shapes.items()]
    tensors += [SourceTensor(name + SCALE_SUFFIX, scale_grid(shape), "float32") for name, shape in shapes.items()]
    return engine([*tensors, *(SourceTensor(name, (300,), dtype) for name, dtype in plain.items())])


def shard(weights: dict[str, torch.Tensor], ranks: int) -> list[LocalSources]:
    """Rows as torch.chunk gives them, which leaves some ranks with less, or nothing."""
    tensors = tuple(SourceTensor(name, tuple(value.shape), "bfloat16") for name, value in weights.items())
    result = []
    for rank in range(ranks):
        pieces, used = [], 0
        for name, value in weights.items():
            width = value[0].numel()
            chunk = -(-len(value) // ranks)
            start, stop = min(rank * chunk, len(value)), min((rank + 1) * chunk, len(value))
            if start < stop:
                local = value[start:stop].contiguous()
                pieces.append(LocalPiece(name, start * width, stop * width, used, local, 0))
                used += local.numel()
        result.append(LocalSources(tensors, tuple(pieces)))
    return result


class Meeting:
    """The ranks' exchange, in threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=30)
        self._given: list[torch.Tensor] = []

    def agree(self, amax: torch.Tensor) -> torch.Tensor:
        self._given.append(amax)
        self._barrier.wait()
        greatest = torch.stack(self._given).amax(dim=0)
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()
        return greatest


def fill_all(
    locals_: Sequence[LocalSources],
    layout: TargetLayout | Mapping[str, TargetLayout],
    format_: str = "auto",
    *,
    group_bytes: int = GROUP_BYTES,
) -> list[SlotArena]:
    """Every rank's arena for one engine layout, or for several by digest, filled at once."""
    engines = {layout.digest(): layout} if isinstance(layout, TargetLayout) else layout
    held = [local.layout(rank) for rank, local in enumerate(locals_)]
    meeting = Meeting(len(held))
    arenas = [
        SlotArena(rank=rank, local=local, layouts=held, format_=format_, group_bytes=group_bytes)
        for rank, local in enumerate(locals_)
    ]
    faults: list[Exception] = []

    def work(arena: SlotArena) -> None:
        try:
            arena.fill(meeting.agree)
        except Exception as error:
            faults.append(error)

    for arena in arenas:
        assert arena.lay_out(engines)
    threads = [threading.Thread(target=work, args=(arena,)) for arena in arenas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return arenas


def deliver(arenas: Sequence[SlotArena], layout: TargetLayout) -> dict[str, torch.Tensor]:
    """What the writes of all ranks leave in an engine, by target."""
    plan = make_plan(arenas[0].layouts, layout)
    memory = {t.name: torch.zeros(t.numel, dtype=torch.float32).to(TORCH[t.dtype]) for t in plan.targets}
    for rank, arena in enumerate(arenas):
        for slot, index, offset, length in plan.writes(rank).tolist():
            target = plan.targets[index]
            size = TORCH[target.dtype].itemsize
            source = arena.buffer.cpu()[slot * size : (slot + length) * size]
            memory[target.name].view(torch.uint8)[offset * size : (offset + length) * size] = source
    return memory


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))

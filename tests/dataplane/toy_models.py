"""Small loaders of the kinds that engines have, run on real tensors for the truth and on meta tensors for the trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from weightsync.layout.records import Holding, Shape, SourceLayout, SourceTensor, TargetLayout
from weightsync.layout.trace import trace_loader
from weightsync.plan import Plan

POISON = 0x5A5A
"""Bits of a target before anything is written."""

Weights = Iterable[tuple[str, Tensor]]


def flat_bits(tensor: Tensor) -> np.ndarray:
    """[n] uint16 view of a bf16 tensor."""
    return tensor.view(torch.int16).reshape(-1).numpy().view(np.uint16)


def poisoned(*shape: int) -> Tensor:
    """A parameter that nobody has written."""
    return torch.full(shape, POISON, dtype=torch.int16).view(torch.bfloat16)


@dataclasses.dataclass
class Toy:
    """Parameters, and what to do with each source: a list of (source, parameter's view, source's view)."""

    params: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    sources: dict[str, Shape] = dataclasses.field(default_factory=dict)
    steps: dict[str, list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]] = dataclasses.field(
        default_factory=dict
    )
    pads: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def source(self, name: str, *shape: int) -> str:
        self.sources[name] = shape
        self.steps[name] = []
        return name

    def param(self, name: str, *shape: int) -> str:
        self.params[name] = poisoned(*shape)
        return name

    def copy(
        self, source: str, param: str, into: Callable[[Tensor], Tensor], take: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        self.steps[source].append((param, into, take))

    def load(self, weights: Weights) -> None:
        """The engine's load_weights."""
        for name, tensor in weights:
            for param, into, take in self.steps[name]:
                into(self.params[param].data).copy_(take(tensor))
        for param, first_row in self.pads:
            self.params[param].data[first_row:].fill_(0)

    def fresh(self) -> Self:
        """The same model with poisoned parameters."""
        return dataclasses.replace(self, params={name: poisoned(*p.shape) for name, p in self.params.items()})

    def source_tensors(self) -> tuple[SourceTensor, ...]:
        return tuple(SourceTensor(name, shape, "bfloat16") for name, shape in self.sources.items())

    def layout(self) -> TargetLayout:
        return trace_loader(self.load, self.params, self.source_tensors())

    def weights(self) -> dict[str, Tensor]:
        """Real tensors; bits count through, so that an element in a wrong place shows (below 65,536 elements)."""
        result, first = {}, 0
        for name, shape in self.sources.items():
            bits = (np.arange(math.prod(shape)) + first).astype(np.uint16).view(np.int16)
            result[name] = torch.from_numpy(bits).reshape(shape).view(torch.bfloat16)
            first += math.prod(shape)
        return result


def chunked(tensors: Sequence[SourceTensor], n_ranks: int) -> list[SourceLayout]:
    """FSDP2's shards: torch.chunk along dim 0 of every tensor."""
    layouts = []
    for rank in range(n_ranks):
        holdings, used = [], 0
        for tensor in tensors:
            rows, row_numel = tensor.shape[0], math.prod(tensor.shape[1:])
            chunk = -(-rows // n_ranks)
            start, stop = min(rank * chunk, rows) * row_numel, min((rank + 1) * chunk, rows) * row_numel
            if start < stop:
                holdings.append(Holding(tensor.name, start, stop, used))
                used += stop - start
        layouts.append(SourceLayout(rank, tuple(tensors), tuple(holdings)))
    return layouts


def replicated(tensors: Sequence[SourceTensor], n_ranks: int) -> list[SourceLayout]:
    """Every rank holds everything."""
    whole = chunked(tensors, 1)[0]
    return [SourceLayout(rank, whole.tensors, whole.holdings) for rank in range(n_ranks)]


def arena_of(layout: SourceLayout, weights: dict[str, Tensor]) -> Tensor:
    """A rank's slot arena, poisoned where it holds nothing."""
    arena = poisoned(max((h.local_offset + h.stop - h.start for h in layout.holdings), default=0))
    for h in layout.holdings:
        arena[h.local_offset : h.local_offset + h.stop - h.start] = weights[h.name].reshape(-1)[h.start : h.stop]
    return arena


def execute(plan: Plan, layouts: Sequence[SourceLayout], weights: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    """Perform every rank's writes on `params`, as bits."""
    flat = {name: flat_bits(param) for name, param in params.items()}
    for layout in layouts:
        arena = flat_bits(arena_of(layout, weights))
        for slot, index, offset, length in plan.writes(layout.rank).tolist():
            flat[plan.targets[index].name][offset : offset + length] = arena[slot : slot + length]


def source(name: str, *shape: int, dtype: str = "bfloat16") -> SourceTensor:
    return SourceTensor(name, shape, dtype)

"""What each rank of a trainer holds of a model, from a mesh's sizes alone: no tensor, no process group.

It says of a mesh that is not there what `shards` says of parameters that are. FSDP2 gives rank i of n the i-th `torch.chunk` along
dim 0: ceil(rows / n) rows, the last ranks fewer or none. Expert parallelism gives each of its ranks a chunk of the experts, which
FSDP then chunks again among the ranks that share it; other parameters are sharded over all ranks of a replica. Standard library
and records only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

from weightsync.errors import ConfigError
from weightsync.layout.families import Parts
from weightsync.layout.records import Holding, Shape, SourceLayout, SourceTensor

LARGEST_AXIS = 65_536
"""More ranks than that are a typing error."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the trainer's module, whole."""

    name: str
    shape: Shape
    parts: Parts
    """The checkpoint's tensors in it."""
    dtype: str = "bfloat16"
    """The checkpoint's."""

    @property
    def is_experts(self) -> bool:
        """Dim 0 counts experts, which expert parallelism shares out."""
        return len(self.shape) == 3 and ".experts." in self.name

    def tensors(self) -> tuple[SourceTensor, ...]:
        """The checkpoint's tensors in it."""
        return tuple(SourceTensor(name, shape, self.dtype) for name, shape, _ in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerMesh:
    """Axis sizes of a trainer. Rank = (replica * shards + shard) * experts + expert rank."""

    shards: int
    """FSDP ranks that share an expert's parameters out."""
    replicas: int = 1
    """HSDP: groups of ranks that hold the same."""
    experts: int = 1
    """Expert-parallel ranks; other parameters are sharded over shards * experts."""

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards * self.experts

    @classmethod
    def parse(cls, text: str) -> Self:
        """`fsdp=8`, `hsdp=2x32` (replicas x shards), with `,ep=4`: 4 times the ranks. Raises ConfigError saying how to write it."""
        axes = parse_axes(text, known={"fsdp", "hsdp", "ep"})
        if ("fsdp" in axes) == ("hsdp" in axes):
            raise ConfigError(
                f"trainer mesh {text!r}: give fsdp=SHARDS or hsdp=REPLICASxSHARDS, and ,ep=RANKS for experts"
            )
        replicas, shards = axes["hsdp"] if "hsdp" in axes else (1, *axes["fsdp"])
        return cls(shards=shards, replicas=replicas, experts=axes.get("ep", (1,))[0])

    def held(self, parameter: Parameter, rank: int) -> range:
        """Linear elements of the parameter that `rank` holds."""
        place, expert_rank = divmod(rank, self.experts)
        shard = place % self.shards
        rows = range(parameter.shape[0] if parameter.shape else 1)
        if parameter.is_experts:
            rows = chunk(chunk(rows, self.experts, expert_rank), self.shards, shard)
        else:
            rows = chunk(rows, self.shards * self.experts, shard * self.experts + expert_rank)
        row_numel = math.prod(parameter.shape[1:])
        return range(rows.start * row_numel, rows.stop * row_numel)

    def layout(self, parameters: Sequence[Parameter], rank: int) -> SourceLayout:
        """What `rank` publishes: its pieces one behind the other, and the tensors that they are of."""
        tensors: list[SourceTensor] = []
        holdings: list[Holding] = []
        used = 0
        for parameter in parameters:
            held = self.held(parameter, rank)
            for name, shape, first in parameter.parts:
                start, stop = max(held.start, first), min(held.stop, first + math.prod(shape))
                if start < stop:
                    tensors.append(SourceTensor(name, shape, parameter.dtype))
                    holdings.append(Holding(name, start - first, stop - first, used))
                    used += stop - start
        return SourceLayout(rank, tuple(tensors), tuple(holdings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMesh:
    """Axis sizes of one replica of an engine. Rank = data-parallel rank * tensor + tensor-parallel rank."""

    tensor: int
    data: int = 1
    expert_parallel: bool = False
    """Experts are shared out over all ranks, instead of each being cut over the tensor-parallel ones."""
    redundant_experts: int = 0
    """Copies of experts that vLLM's load balancer adds."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @classmethod
    def parse(cls, text: str) -> Self:
        """`tp=8`, with `,ep`, `,dp=4`, `,redundant=32`. Raises ConfigError saying how to write it."""
        axes = parse_axes(text, known={"tp", "dp", "ep", "redundant"}, flags={"ep"})
        if "tp" not in axes:
            raise ConfigError(f"engine mesh {text!r}: give tp=RANKS, and ,ep ,dp=RANKS ,redundant=EXPERTS where wanted")
        if "redundant" in axes and "ep" not in axes:
            raise ConfigError(f"engine mesh {text!r}: redundant experts need expert parallelism: add ,ep")
        return cls(
            tensor=axes["tp"][0],
            data=axes.get("dp", (1,))[0],
            expert_parallel="ep" in axes,
            redundant_experts=axes.get("redundant", (0,))[0],
        )


def chunk(rows: range, n_chunks: int, index: int) -> range:
    """What torch.chunk gives to `index` of n: ceil(rows / n) rows each, the last ones fewer or none."""
    each = -(-len(rows) // n_chunks)
    return range(min(rows.start + index * each, rows.stop), min(rows.start + (index + 1) * each, rows.stop))


def parse_axes(
    text: str, *, known: set[str], flags: frozenset[str] | set[str] = frozenset()
) -> Mapping[str, tuple[int, ...]]:
    """`a=8,b=2x32,c` -> {a: (8,), b: (2, 32), c: ()}. Raises ConfigError naming what is not understood."""
    axes: dict[str, tuple[int, ...]] = {}
    for entry in text.replace(" ", ",").split(","):
        if not entry:
            continue
        name, _, sizes = entry.partition("=")
        if name not in known or name in axes:
            raise ConfigError(
                f"mesh {text!r}: {name!r} is not an axis or is given twice; axes are {', '.join(sorted(known))}"
            )
        wanted = 0 if name in flags else 2 if name == "hsdp" else 1
        numbers = sizes.split("x") if sizes else []
        if len(numbers) != wanted or not all(
            n.isascii() and n.isdigit() and 0 < int(n) <= LARGEST_AXIS for n in numbers
        ):
            example = name if name in flags else f"{name}=2x32" if name == "hsdp" else f"{name}=8"
            raise ConfigError(f"mesh {text!r}: {entry!r} is not understood; write {example}")
        axes[name] = tuple(map(int, numbers))
    return axes

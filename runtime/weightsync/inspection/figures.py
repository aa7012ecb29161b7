"""What a push would move, counted on the plan itself. Pure: no torch, no I/O.

The plans are those that a trainer would make: every engine rank's layout against what all trainer ranks carry for all of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from weightsync import collector
from weightsync.layout.arenas import Carrier
from weightsync.layout.forms import Outline, wanted_of
from weightsync.layout.held import Held
from weightsync.layout.meshes import EngineMesh, Parameter, TrainerMesh
from weightsync.layout.packing import Packed, pack
from weightsync.layout.records import ITEM_BYTES, SourceTensor, TargetLayout
from weightsync.layout.strides import canonical
from weightsync.plan import make_plan

EXPANDED = 4_000_000
"""Runs of an engine rank that are expanded to count its writes; with more, the writes of a part of the trainer's ranks are.

A tensor-parallel engine cuts each row of an expert's down projection: DeepSeek-V3 at TP 8 has 106 million runs a rank.
"""
_SLICE = re.compile(r"\[:, \d+:\d+\]")
"""In the name of a tensor that is carried in column slices."""
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Spread:
    """A figure over ranks; zeros over none."""

    least: int
    mean: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int] | np.ndarray) -> Spread:
        if not len(values):
            return cls(0, 0, 0)
        return cls(int(min(values)), round(sum(map(int, values)) / len(values)), int(max(values)))


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Source tensors that are stored in one dtype and wanted in another; equal dtypes are passed through."""

    stored: str
    wanted: str
    tensors: int
    bytes: int
    """As wanted."""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A parameter that cannot be written directly; its whole module is replayed by the engine's own loader."""

    parameter: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """One push of one version into one replica of the engine."""

    covered_elements: int
    """Of the traced ranks' targets; each written exactly once, or padding."""
    padding_elements: int
    engine_ranks_traced: Sequence[int]
    engine_ranks: int
    trainer_bytes_sent: Spread
    """A trainer rank's egress into all engine ranks; an estimate where not all of them were traced."""
    trainer_arena_bytes: Spread
    """Memory for converted weights."""
    trainer_held_elements: Spread
    engine_bytes_received: Spread
    writes_a_peer: Spread
    """Writes of one trainer rank into one engine rank, over counted pairs that have any."""
    trainer_ranks_counted: Sequence[int]
    pairs: int
    """(counted trainer rank, traced engine rank) that have any."""
    writes_an_engine_rank: Spread
    """Of all trainer ranks together; scaled up where not all of them were counted."""
    mean_write_bytes: int
    conversions: Sequence[Conversion]
    fallbacks: Sequence[Fallback]
    replayed_bytes: int
    """Of modules that fall back, a traced rank at most."""

    def seconds(self, fabric_gbps: float) -> float:
        """Of the wire alone, at that many gigabits a second for each rank, whichever side is the slower."""
        return 8 * max(self.trainer_bytes_sent.most, self.engine_bytes_received.most) / (fabric_gbps * 1e9)


@collector.paused()
def count(
    *,
    parameters: Sequence[Parameter],
    sources: Sequence[SourceTensor],
    trainer: TrainerMesh,
    engine: EngineMesh,
    layouts: Mapping[int, TargetLayout],
    faults: Mapping[str, str],
) -> Figures:
    """Plan a push from every trainer rank into the engine ranks with these layouts, and count it.

    sources: what the checkpoint offers. faults: parameters that the layouts leave out. Raises PlanError when there
    is no plan.
    """
    direct = {rank: _without_modules(layout, faults) for rank, layout in layouts.items()}
    held = [trainer.layout(parameters, rank) for rank in range(trainer.ranks)]
    packed = pack({layout.digest(): layout for layout in direct.values()}, held)
    wanted = wanted_of(packed.layouts)
    if len(layouts) < engine.ranks:
        wanted = _with_others(wanted, sources, packed)
    carrier = Carrier(wanted, packed.columns, packed.rows)
    carried = [carrier.outline(each) for each in held]
    arenas = Held([each.layout for each in carried])
    most_runs = max(map(_runs, packed.layouts.values()))
    counted = sampled(trainer.ranks, max(1, trainer.ranks * EXPANDED // max(most_runs, EXPANDED)))
    writes = np.zeros((len(counted), len(direct)), dtype=np.int64)
    sent = np.zeros((trainer.ranks, len(direct)), dtype=np.int64)
    for column, layout in enumerate(direct.values()):
        plan = make_plan(arenas, packed.layouts[layout.digest()])
        sent[:, column] = [plan.bytes_per_rank[rank] for rank in range(trainer.ranks)]
        writes[:, column] = [len(plan.writes(rank)) for rank in counted]
    return Figures(
        covered_elements=sum(layout.numel for layout in direct.values()),
        padding_elements=sum(fill.numel for layout in direct.values() for fill in layout.fills),
        engine_ranks_traced=tuple(layouts),
        engine_ranks=engine.ranks,
        trainer_bytes_sent=_egress(sent, engine.ranks, [each.arena_bytes for each in carried]),
        trainer_arena_bytes=Spread.of([each.arena_bytes for each in carried]),
        trainer_held_elements=Spread.of(
            [sum(len(trainer.held(p, r)) for p in parameters) for r in range(trainer.ranks)]
        ),
        engine_bytes_received=Spread.of(sent.sum(0)),
        writes_a_peer=Spread.of(writes[writes > 0]),
        trainer_ranks_counted=tuple(counted),
        pairs=int((writes > 0).sum()),
        writes_an_engine_rank=Spread.of(writes.sum(0) * trainer.ranks // len(counted)),
        mean_write_bytes=int(sent[list(counted)].sum() // max(writes.sum(), 1)),
        conversions=_conversions(parameters, carried),
        fallbacks=[Fallback(name, reason) for name, reason in sorted(faults.items())],
        replayed_bytes=max(_bytes(layouts[rank]) - _bytes(direct[rank]) for rank in layouts),
    )


def sampled(ranks: int, wanted: int | None) -> Sequence[int]:
    """All ranks, or that many spread evenly from the first to the last."""
    if wanted is None or wanted >= ranks:
        return range(ranks)
    return sorted({round(i * (ranks - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def _with_others(
    wanted: Mapping[str, SourceTensor], sources: Iterable[SourceTensor], packed: Packed
) -> dict[str, SourceTensor]:
    """And what engine ranks that were not traced want: other columns of the same matrices, and the like of the same experts."""
    more = dict(wanted)
    alike = {_EXPERT_NUMBER.sub(".experts.N.", name): tensor for name, tensor in wanted.items()}
    slices = {_SLICE.sub("", name): tensor for name, tensor in wanted.items() if _SLICE.search(name)}
    for name, parts in packed.columns.items():
        for part in parts:
            like = slices[name]
            more.setdefault(part.name, SourceTensor(part.name, (like.shape[0], part.width), like.dtype))
    for source in sources:
        like = alike.get(_EXPERT_NUMBER.sub(".experts.N.", source.name))
        if like is not None and source.name not in packed.columns:
            more.setdefault(source.name, dataclasses.replace(source, dtype=like.dtype))
    return more


def _without_modules(layout: TargetLayout, faults: Mapping[str, str]) -> TargetLayout:
    """Less the modules that have a fault: vLLM's reload, which they fall back to, works by module."""
    modules = {name.rpartition(".")[0] for name in faults}

    def kept(target: str) -> bool:
        return target.rpartition(".")[0] not in modules

    copies = tuple(copy for copy in layout.copies if kept(copy.target))
    used = {copy.source for copy in copies}
    return dataclasses.replace(
        layout,
        targets=tuple(target for target in layout.targets if kept(target.name)),
        sources=tuple(source for source in layout.sources if source.name in used),
        copies=copies,
        fills=tuple(fill for fill in layout.fills if kept(fill.target)),
    )


def _egress(sent: np.ndarray, engine_ranks: int, arenas: Sequence[int]) -> Spread:
    """sent: [trainer ranks, traced engine ranks] bytes.

    Of engine ranks that were not traced, each trainer rank sends in proportion to what it carries.
    """
    if sent.shape[1] == engine_ranks:
        return Spread.of(sent.sum(1))
    total = float(sent.sum()) / sent.shape[1] * engine_ranks
    return Spread.of(np.array(arenas) * (total / sum(arenas)))


def _conversions(parameters: Sequence[Parameter], carried: Sequence[Outline]) -> list[Conversion]:
    stored = {tensor.name: tensor.dtype for parameter in parameters for tensor in parameter.tensors()}
    carried_as = {tensor.name: tensor for each in carried for tensor in each.layout.tensors}
    tensors: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    found: set[str] = set()
    for name, tensor in carried_as.items():
        whole = _SLICE.sub("", name)
        pair = (stored.get(whole, "block amax"), tensor.dtype)
        tensors[pair] += whole not in found
        found.add(whole)
        sizes[pair] += math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    return [Conversion(*pair, tensors[pair], sizes[pair]) for pair in sorted(tensors)]


def _runs(layout: TargetLayout) -> int:
    """Ranges that are neighbours in source and target; writes are these, cut where ranks meet and merged where they touch."""
    forms = (canonical(copy.shape, copy.source_strides, copy.target_strides) for copy in layout.copies)
    return sum(math.prod(n for n, *_ in outer) for outer, _ in forms)


def _bytes(layout: TargetLayout) -> int:
    return sum(target.numel * ITEM_BYTES[target.dtype] for target in layout.targets)

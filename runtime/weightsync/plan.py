"""From what trainer ranks hold and what an engine wants to who writes which elements where, proved to be complete.

Two ranks that are told the same things, in whatever order, make the same plan. Nothing here imports torch or performs
I/O. Regions that several ranks hold are shared out longest-first to the least loaded holder, by rank number, never by
list order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from weightsync.errors import CoverageError, PlanError
from weightsync.layout.coverage import listed, prove_coverage
from weightsync.layout.held import REGION_BYTES, Held, item_bytes
from weightsync.layout.records import SourceLayout, SourceTensor, TargetLayout
from weightsync.layout.table import Axis, CopyTable, copy_table

WRITE = np.dtype([("slot_offset", "<i8"), ("target_index", "<i4"), ("target_offset", "<i8"), ("length", "<i8")])
"""One write: `length` elements from the writer's slot arena into target `Plan.targets[target_index]`, all counted in elements of
that target's dtype."""


class Plan:
    """Who writes what into one target layout; engine ranks with an equal layout share it.

    It is symbolic: what a rank writes is worked out when that rank asks.
    """

    def __init__(self, held: Held, target: TargetLayout, table: CopyTable, chosen: np.ndarray, digest: str) -> None:
        self.targets = tuple(sorted(target.targets, key=lambda t: t.name))
        """What `target_index` counts in."""
        self.digest = digest
        """Hexadecimal; equal when target, ranks and what each of them holds and writes are equal."""
        self.fills = target.fills
        """Elements of the targets that no rank writes; they keep the loader's value."""
        self._held, self._table, self._chosen = held, table, chosen
        self._item_bytes = item_bytes(self.targets)[table.target]

    @cached_property
    def bytes_per_rank(self) -> dict[int, int]:
        """Payload bytes that each trainer rank writes into one engine rank of this layout; 0 when it writes nothing."""
        held = self._held
        owners = np.concatenate([np.flatnonzero(held.alone), self._chosen])
        wanted = _wanted(self._table, held, self._item_bytes)[held.region[owners]]
        sent = np.bincount(held.rank[owners], weights=wanted, minlength=len(held.ranks))
        return {rank: int(count) for rank, count in zip(held.ranks, sent, strict=True)}

    @property
    def total_bytes(self) -> int:
        """Payload bytes of one push into one engine rank of this layout."""
        return int((self._table.numel * self._item_bytes).sum())

    def writes(self, rank: int) -> np.ndarray:
        """[W] records of dtype WRITE that `rank` performs, sorted by target; neighbours on both sides are merged.

        Raises PlanError for a rank that the plan was not made with.
        """
        held = self._held
        if rank not in held.ranks:
            raise PlanError(f"rank {rank} is not among the plan's ranks {list(held.ranks)}")
        me = held.ranks.index(rank)
        mine = np.union1d(held.alone_of(me), self._chosen[held.rank[self._chosen] == me])
        region, slot = held.region[mine], held.slot[mine]
        start, stop = held.start[region], held.stop[region]
        copy, item, _ = self._table.reads(start, stop)
        pair, source, target, element, length = self._table.runs_within(copy, start[item], stop[item])
        return _merged(slot[item][pair] + source - start[item][pair], target, element, length)


def make_plan(
    sources: Held | Sequence[SourceLayout], target: TargetLayout, *, region_bytes: int = REGION_BYTES
) -> Plan:
    """Give every element that `target` wants to exactly one rank that holds it.

    Who plans for several targets makes `Held` of the source layouts once; `region_bytes` is its then. Raises CoverageError
    naming each target that would be left incomplete or written twice, and PlanError when ranks and engine disagree about a
    tensor's shape or dtype: a plan that leaves something out does not exist.
    """
    held = sources if isinstance(sources, Held) else Held(sources, region_bytes)
    held.require_same(target.sources)
    axis, targets = Axis(target.sources), Axis(target.targets)
    prove_coverage(target, targets)
    origin, foreign = _origins(axis, held)
    table = copy_table(target, axis, targets, origin)
    _check_held(target, table, held, foreign)
    chosen = _share_out(held, table, item_bytes(targets.tensors)[table.target])
    digest = hashlib.blake2b(json.dumps([target.digest(), held.digest]).encode(), digest_size=16)
    digest.update(chosen.astype("<i8").tobytes())
    return Plan(held, target, table, chosen, digest.hexdigest())


@dataclasses.dataclass(frozen=True)
class _Foreign:
    """Tensors that an engine wants and no rank states, laid behind the source axis."""

    tensors: list[SourceTensor]
    start: np.ndarray
    stop: np.ndarray


def _origins(axis: Axis[SourceTensor], held: Held) -> tuple[np.ndarray, _Foreign]:
    """Where each tensor that the engine wants begins on the source axis."""
    known = np.array([held.axis.index.get(tensor.name, -1) for tensor in axis.tensors], dtype=np.int64)
    numel = np.where(known < 0, np.diff(axis.bounds), 0)
    stop = held.axis.bounds[-1] + np.cumsum(numel)
    origin = np.where(known < 0, stop - numel, held.axis.bounds[known])
    foreign = np.flatnonzero(known < 0)
    return origin, _Foreign([axis.tensors[i] for i in foreign.tolist()], origin[foreign], stop[foreign])


def _wanted(table: CopyTable, held: Held, bytes_each: np.ndarray) -> np.ndarray:
    """[A] bytes that the engine reads of each region; `bytes_each` [C] is of one element of each copy."""
    copy, region, count = table.reads(held.start, held.stop)
    weights = count * bytes_each[copy]
    return np.bincount(region, weights=weights, minlength=len(held.start)).astype(np.int64)


def _share_out(held: Held, table: CopyTable, bytes_each: np.ndarray) -> np.ndarray:
    """Holders (ascending) that send the regions which several ranks hold: longest first, each to the least loaded.

    What ranks hold alone counts as load. Every rank decides it for all, so nothing is decided here by list order.
    """
    if not len(held.shared):
        return np.zeros(0, dtype=np.int64)
    wanted = _wanted(table, held, bytes_each)
    alone = held.alone
    load = np.bincount(held.rank[alone], weights=wanted[held.region[alone]], minlength=len(held.ranks))
    shared = held.shared[wanted[held.shared] > 0]
    shared = shared[np.lexsort((shared, -wanted[shared]))]
    first = held.first_holder[shared].tolist()
    loads, rank, chosen = load.astype(np.int64).tolist(), held.rank.tolist(), []
    for begin, count, size in zip(first, held.holders[shared].tolist(), wanted[shared].tolist(), strict=True):
        best = min(range(begin, begin + count), key=lambda i: (loads[rank[i]], rank[i]))
        loads[rank[best]] += size
        chosen.append(best)
    return np.sort(np.array(chosen, dtype=np.int64))


def _check_held(target: TargetLayout, table: CopyTable, held: Held, foreign: _Foreign) -> None:
    """Raise CoverageError naming each target that wants elements which no rank holds."""
    start = np.concatenate([held.start[held.lost], foreign.start])
    stop = np.concatenate([held.stop[held.lost], foreign.stop])
    copy, region, count = table.reads(start, stop)
    faults: dict[str, tuple[str, int, int]] = {}
    for name, i, lost in zip(
        (target.copies[c].target for c in copy.tolist()), region.tolist(), count.tolist(), strict=True
    ):
        first, total, others = faults.get(name, (_where(held, foreign, int(start[i]), int(stop[i])), 0, 0))
        faults[name] = (first, total + lost, others + 1)
    if not faults:
        return
    told = [
        f"{name}: {count} elements come from {first}"
        f"{f' and {others - 1} more ranges' if others > 1 else ''}, which no rank holds"
        for name, (first, count, others) in sorted(faults.items())
    ]
    raise CoverageError(
        f"{listed(told)} ({len(held.ranks)} trainer ranks): publish those tensors, or every rank that holds a part of them"
    )


def _where(held: Held, foreign: _Foreign, start: int, stop: int) -> str:
    """A range of the source axis in words."""
    end = int(held.axis.bounds[-1])
    if start < end:
        source, first = held.axis.locate(start)
    else:
        source, first = foreign.tensors[int(np.searchsorted(foreign.start, start, side="right")) - 1], 0
    return f"[{first}, {first + stop - start}) of {source.name}"


def _merged(slot: np.ndarray, target: np.ndarray, element: np.ndarray, length: np.ndarray) -> np.ndarray:
    order = np.lexsort((element, target))
    slot, target, element, length = (column[order] for column in (slot, target, element, length))
    joins = (
        (target[1:] == target[:-1])
        & (element[1:] == element[:-1] + length[:-1])
        & (slot[1:] == slot[:-1] + length[:-1])
    )
    head = np.flatnonzero(np.concatenate([[True], ~joins])) if len(slot) else np.zeros(0, dtype=np.int64)
    writes = np.empty(len(head), dtype=WRITE)
    writes["slot_offset"], writes["target_index"], writes["target_offset"] = slot[head], target[head], element[head]
    writes["length"] = np.add.reduceat(length, head) if len(head) else length
    return writes

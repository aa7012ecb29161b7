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

import numpy as np

from weightsync.errors import CoverageError, PlanError
from weightsync.layout.coverage import listed, prove_coverage
from weightsync.layout.records import ITEM_BYTES, SourceLayout, SourceTensor, Target, TargetLayout
from weightsync.layout.strides import spread
from weightsync.layout.table import Axis, CopyTable, copy_table

REGION_BYTES = 64 << 20
"""Longest source region that is given to one of several holders as a whole."""

WRITE = np.dtype([("slot_offset", "<i8"), ("target_index", "<i4"), ("target_offset", "<i8"), ("length", "<i8")])
"""One write: `length` elements from the writer's slot arena into target `Plan.targets[target_index]`, all counted in elements of
that target's dtype."""


@dataclasses.dataclass(frozen=True)
class _Regions:
    """Pieces of the source axis, no two of which overlap, each given to one rank that holds it whole."""

    start: np.ndarray
    stop: np.ndarray
    owner: np.ndarray
    """[A] index among the sorted ranks; -1 where nobody holds it."""
    slot: np.ndarray
    """[A] where the owner's arena has the region's first element."""


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Which copy reads how many elements of which region, [P] each; only pairs that read something."""

    copy: np.ndarray
    region: np.ndarray
    count: np.ndarray
    bytes: np.ndarray


class Plan:
    """Every trainer rank's writes into one target layout; engine ranks with an equal layout share it."""

    def __init__(
        self,
        target: TargetLayout,
        ranks: Sequence[int],
        table: CopyTable,
        regions: _Regions,
        reads: _Reads,
        digest: str,
    ) -> None:
        self.targets = tuple(sorted(target.targets, key=lambda t: t.name))
        """What `target_index` counts in."""
        self.digest = digest
        """Hexadecimal; equal when target, ranks and what each of them writes are equal."""
        self.fills = target.fills
        """Elements of the targets that no rank writes; they keep the loader's value."""
        self._ranks, self._table, self._regions, self._reads = tuple(ranks), table, regions, reads
        owner = regions.owner[reads.region]
        sent = np.bincount(owner, weights=reads.bytes, minlength=len(ranks)).astype(np.int64)
        self.bytes_per_rank = {rank: int(count) for rank, count in zip(ranks, sent, strict=True)}
        """Payload bytes that each trainer rank writes into one engine rank of this layout; 0 when it writes nothing."""

    @property
    def total_bytes(self) -> int:
        """Payload bytes of one push into one engine rank of this layout."""
        return sum(self.bytes_per_rank.values())

    def writes(self, rank: int) -> np.ndarray:
        """[W] records of dtype WRITE that `rank` performs, sorted by target; neighbours on both sides are merged.

        Raises PlanError for a rank that the plan was not made with.
        """
        if rank not in self._ranks:
            raise PlanError(f"rank {rank} is not among the plan's ranks {list(self._ranks)}")
        mine = np.flatnonzero(self._regions.owner[self._reads.region] == self._ranks.index(rank))
        region = self._reads.region[mine]
        start, stop = self._regions.start[region], self._regions.stop[region]
        item, source, target, element, length = self._table.runs_within(self._reads.copy[mine], start, stop)
        slot = self._regions.slot[region][item] + (source - start[item])
        return _merged(slot, target, element, length)


def make_plan(sources: Sequence[SourceLayout], target: TargetLayout, *, region_bytes: int = REGION_BYTES) -> Plan:
    """Give every element that `target` wants to exactly one rank that holds it.

    Raises CoverageError naming each target that would be left incomplete or written twice, and PlanError when ranks and
    engine disagree about a tensor's shape or dtype: a plan that leaves something out does not exist.
    """
    sources = sorted(sources, key=lambda layout: layout.rank)
    ranks = [layout.rank for layout in sources]
    if len(set(ranks)) != len(ranks):
        raise PlanError(f"trainer ranks {ranks} are not distinct: each rank publishes one layout")
    _check_agreement(sources, target)
    axis, targets = Axis(target.sources), Axis(target.targets)
    prove_coverage(target, targets)
    table = copy_table(target, axis, targets)
    regions, holders = _cut(sources, axis, region_bytes)
    reads = _reads(table, regions, _item_bytes(targets.tensors)[table.target])
    regions = _share_out(regions, holders, reads, len(ranks))
    _check_held(target, axis, regions, reads, len(ranks))
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([target.digest(), ranks]).encode())
    for column in (regions.start, regions.stop, regions.owner, regions.slot):
        digest.update(column.astype("<i8").tobytes())
    return Plan(target, ranks, table, regions, reads, digest.hexdigest())


def _item_bytes(tensors: Sequence[SourceTensor] | Sequence[Target]) -> np.ndarray:
    """[n] bytes of one element of each tensor."""
    unknown = sorted({tensor.dtype for tensor in tensors} - ITEM_BYTES.keys())
    if unknown:
        raise PlanError(f"tensors have dtypes {unknown}: known are {sorted(ITEM_BYTES)}")
    return np.array([ITEM_BYTES[tensor.dtype] for tensor in tensors], dtype=np.int64)


def _check_agreement(sources: Sequence[SourceLayout], target: TargetLayout) -> None:
    """Linear element indices mean the same on both sides only when whole shapes and dtypes are equal."""
    wanted = {tensor.name: tensor for tensor in target.sources}
    faults = []
    for layout in sources:
        stated = {tensor.name: tensor for tensor in layout.tensors}
        for name in sorted(wanted.keys() & stated.keys()):
            have, want = stated[name], wanted[name]
            if (have.shape, have.dtype) != (want.shape, want.dtype):
                faults.append(
                    f"{name}: rank {layout.rank} has {list(have.shape)} {have.dtype}, "
                    f"the engine wants {list(want.shape)} {want.dtype}"
                )
        for h in layout.holdings:
            if h.name not in stated or not 0 <= h.start <= h.stop <= stated[h.name].numel or h.local_offset < 0:
                faults.append(
                    f"{h.name}: rank {layout.rank} claims elements [{h.start}, {h.stop}), which the tensor lacks"
                )
    if faults:
        raise PlanError(f"{listed(faults)}: trainer and engines must load the same model configuration")


def _cut(sources: Sequence[SourceLayout], axis: Axis[SourceTensor], region_bytes: int) -> tuple[_Regions, np.ndarray]:
    """Cut the source axis wherever a holding or a tensor begins or ends, and every `region_bytes`.

    Returns regions that are still nobody's, and [H, 3] rows (region, rank index, slot): who could send it.
    """
    rows = [
        (axis.bounds[axis.index[h.name]] + h.start, axis.bounds[axis.index[h.name]] + h.stop, i, h.local_offset)
        for i, layout in enumerate(sources)
        for h in layout.holdings
        if h.name in axis.index and h.stop > h.start
    ]
    start, stop, rank, slot = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    edges = np.unique(np.concatenate([axis.bounds, start, stop]))
    tensor = np.searchsorted(axis.bounds, edges[:-1], side="right") - 1
    longest = np.maximum(region_bytes // _item_bytes(axis.tensors)[tensor], 1)
    piece_of, number = spread(-(-np.diff(edges) // longest))
    edges = np.unique(np.concatenate([edges[:-1][piece_of] + number * longest[piece_of], edges[-1:]]))
    first = np.searchsorted(edges, start)
    holding, number = spread(np.searchsorted(edges, stop) - first)
    region = first[holding] + number
    holders = np.column_stack([region, rank[holding], slot[holding] + edges[region] - start[holding]])
    nobody = np.full(len(edges) - 1, -1, dtype=np.int64)
    return _Regions(edges[:-1], edges[1:], nobody, np.zeros_like(nobody)), holders


def _reads(table: CopyTable, regions: _Regions, item_bytes: np.ndarray) -> _Reads:
    """`item_bytes`: [C], of each copy's elements."""
    first = np.searchsorted(regions.stop, table.source_start, side="right")
    last = np.searchsorted(regions.start, table.source_start + table.extent, side="left")
    copy, number = spread(np.maximum(last - first, 0))
    region = first[copy] + number
    count = table.read_below(copy, regions.stop[region]) - table.read_below(copy, regions.start[region])
    copy, region, count = copy[count > 0], region[count > 0], count[count > 0]
    return _Reads(copy, region, count, count * item_bytes[copy])


def _share_out(regions: _Regions, holders: np.ndarray, reads: _Reads, n_ranks: int) -> _Regions:
    """Give each region that is read to one holder: sole holders first, then longest-first to the least loaded."""
    wanted = np.bincount(reads.region, weights=reads.bytes, minlength=len(regions.start)).astype(np.int64)
    holders = holders[np.lexsort((holders[:, 2], holders[:, 1], holders[:, 0]))]
    distinct = np.ones(len(holders), dtype=bool)
    distinct[1:] = (holders[1:, :2] != holders[:-1, :2]).any(1)
    holders = holders[distinct & (wanted[holders[:, 0]] > 0)]
    choices = np.bincount(holders[:, 0], minlength=len(regions.start))
    chosen = choices[holders[:, 0]] == 1
    alone = np.bincount(holders[chosen, 1], weights=wanted[holders[chosen, 0]], minlength=n_ranks)
    load = alone.astype(np.int64).tolist()
    first = np.searchsorted(holders[:, 0], np.arange(len(choices)))
    shared = np.flatnonzero(choices > 1)
    for region in shared[np.lexsort((shared, -wanted[shared]))].tolist():
        candidates = range(int(first[region]), int(first[region] + choices[region]))
        best = min(candidates, key=lambda i: (load[holders[i, 1]], holders[i, 1]))
        load[holders[best, 1]] += int(wanted[region])
        chosen[best] = True
    owner, slot = regions.owner.copy(), regions.slot.copy()
    region, rank, offset = holders[chosen].T
    owner[region], slot[region] = rank, offset
    return dataclasses.replace(regions, owner=owner, slot=slot)


def _check_held(target: TargetLayout, axis: Axis[SourceTensor], regions: _Regions, reads: _Reads, n_ranks: int) -> None:
    lost = np.flatnonzero(regions.owner[reads.region] < 0)
    if not len(lost):
        return
    faults: dict[str, tuple[str, int, int]] = {}
    for i in lost.tolist():
        copy, region = target.copies[reads.copy[i]], reads.region[i]
        source, start = axis.locate(int(regions.start[region]))
        where = f"[{start}, {start + int(regions.stop[region] - regions.start[region])}) of {source.name}"
        first, count, others = faults.get(copy.target, (where, 0, 0))
        faults[copy.target] = (first, count + int(reads.count[i]), others + 1)
    told = [
        f"{name}: {count} elements come from {first}"
        f"{f' and {others - 1} more ranges' if others > 1 else ''}, which no rank holds"
        for name, (first, count, others) in sorted(faults.items())
    ]
    raise CoverageError(
        f"{listed(told)} ({n_ranks} trainer ranks): publish those tensors, or every rank that holds a part of them"
    )


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

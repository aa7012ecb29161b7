"""What all trainer ranks hold, in the form that plans are made from. numpy only.

A trainer plans for many engine layouts; this is the part that they share, made once for a set of source layouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from weightsync.errors import PlanError
from weightsync.layout.coverage import listed
from weightsync.layout.records import ITEM_BYTES, SourceLayout, SourceTensor, Target
from weightsync.layout.strides import spread
from weightsync.layout.table import Axis

REGION_BYTES = 64 << 20
"""Longest source region that is given to one of several holders as a whole."""


class Held:
    """The source axis, cut into regions of which each rank holds all or nothing, and who holds them.

    Regions are cut wherever a holding or a tensor begins or ends, and every `region_bytes`. Raises PlanError when ranks are not
    distinct, or disagree about a tensor's shape or dtype, or claim what it lacks.
    """

    def __init__(self, sources: Sequence[SourceLayout], region_bytes: int = REGION_BYTES) -> None:
        sources = sorted(sources, key=lambda layout: layout.rank)
        self.ranks = tuple(layout.rank for layout in sources)
        if len(set(self.ranks)) != len(self.ranks):
            raise PlanError(f"trainer ranks {list(self.ranks)} are not distinct: each rank publishes one layout")
        tensors, self._first_rank = _stated(sources)
        self.axis = Axis(tensors)
        start, stop, rank, slot = self._holdings(sources)
        edges = _edges(self.axis, start, stop, region_bytes)
        self.start, self.stop = edges[:-1], edges[1:]
        """[A] each, positions on the axis."""
        first = np.searchsorted(edges, start)
        holding, number = spread(np.searchsorted(edges, stop) - first)
        region = first[holding] + number
        self._keep_distinct(region, rank[holding], slot[holding] + self.start[region] - start[holding])
        self.holders = np.bincount(self.region, minlength=len(self.start))
        """[A] how many ranks hold each region."""
        self.alone = self.holders[self.region] == 1
        """[H] whether a holder is the only one of its region."""
        self.digest = self._digest(region_bytes)
        """Hexadecimal; tells apart whatever could lead to another plan for the same engine."""
        self._alone_of: dict[int, np.ndarray] = {}

    def alone_of(self, rank_index: int) -> np.ndarray:
        """Holders (indices into `region`, ascending) by which this rank alone holds regions."""
        if rank_index not in self._alone_of:
            self._alone_of[rank_index] = np.flatnonzero(self.alone & (self.rank == rank_index))
        return self._alone_of[rank_index]

    @cached_property
    def shared(self) -> np.ndarray:
        """Regions that several ranks hold."""
        return np.flatnonzero(self.holders > 1)

    @cached_property
    def lost(self) -> np.ndarray:
        """Regions that nobody holds."""
        return np.flatnonzero(self.holders == 0)

    @cached_property
    def first_holder(self) -> np.ndarray:
        """[A] index into `region` of each region's first holder."""
        return np.searchsorted(self.region, np.arange(len(self.start)))

    def require_same(self, wanted: Sequence[SourceTensor]) -> None:
        """Raise PlanError unless trainer and engine agree on each tensor that both know.

        Linear element indices mean the same on both sides only when whole shapes and dtypes are equal.
        """
        index, tensors = self.axis.index, self.axis.tensors
        faults = [
            f"{want.name}: rank {self._first_rank[want.name]} has {_form(tensors[index[want.name]])}, "
            f"the engine wants {_form(want)}"
            for want in wanted
            if want.name in index and tensors[index[want.name]] != want
        ]
        if faults:
            raise PlanError(f"{listed(sorted(faults))}: trainer and engines must load the same model configuration")

    def _holdings(self, sources: Sequence[SourceLayout]) -> tuple[np.ndarray, ...]:
        """(start, stop, rank index, slot) of every holding that has elements."""
        parts, faults = [], []
        stated: tuple[SourceTensor, ...] = ()
        index: dict[str, int] = {}
        for i, layout in enumerate(sources):
            if layout.tensors is not stated:
                stated, index = layout.tensors, {t.name: self.axis.index[t.name] for t in layout.tensors}
            holdings = layout.holdings
            count = len(holdings)
            columns = np.array([(index.get(h.name, -1), h.start, h.stop, h.local_offset) for h in holdings], np.int64)
            tensor, start, stop, slot = columns.reshape(count, 4).T
            numel = np.diff(self.axis.bounds)[tensor]
            bad = (tensor < 0) | (start < 0) | (start > stop) | (stop > numel) | (slot < 0)
            faults += [
                f"{h.name}: rank {layout.rank} claims elements [{h.start}, {h.stop}), which the tensor lacks"
                for h in (holdings[i] for i in np.flatnonzero(bad).tolist())
            ]
            base, kept = self.axis.bounds[tensor], start < stop
            columns = (base + start, base + stop, np.full(count, i), slot)
            parts.append(tuple(column[kept] for column in columns))
        if faults:
            raise PlanError(f"{listed(faults)}: trainer and engines must load the same model configuration")
        nothing = np.zeros(0, dtype=np.int64)
        return tuple(np.concatenate([nothing, *(part[column] for part in parts)]) for column in range(4))

    def _keep_distinct(self, region: np.ndarray, rank: np.ndarray, slot: np.ndarray) -> None:
        """Holders by (region, rank); where a rank holds a region twice, the one that comes first in its arena."""
        order = np.lexsort((slot, rank, region))
        region, rank, slot = region[order], rank[order], slot[order]
        distinct = np.ones(len(region), dtype=bool)
        distinct[1:] = (region[1:] != region[:-1]) | (rank[1:] != rank[:-1])
        self.region, self.rank, self.slot = region[distinct], rank[distinct], slot[distinct]
        """[H] each: a rank (index into `ranks`) holds a region, and where its arena has the first element."""

    def _digest(self, region_bytes: int) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        tensors = [(tensor.name, tensor.shape, tensor.dtype) for tensor in self.axis.tensors]
        hasher.update(json.dumps([self.ranks, region_bytes, tensors], separators=(",", ":")).encode())
        for column in (self.start, self.stop, self.region, self.rank, self.slot):
            hasher.update(np.ascontiguousarray(column, dtype="<i8").data)
        return hasher.hexdigest()


def item_bytes(tensors: Sequence[SourceTensor] | Sequence[Target]) -> np.ndarray:
    """[n] bytes of one element of each tensor. Raises PlanError for a dtype that a record may not name."""
    unknown = sorted({tensor.dtype for tensor in tensors} - ITEM_BYTES.keys())
    if unknown:
        raise PlanError(f"tensors have dtypes {unknown}: known are {sorted(ITEM_BYTES)}")
    return np.array([ITEM_BYTES[tensor.dtype] for tensor in tensors], dtype=np.int64)


def _stated(sources: Sequence[SourceLayout]) -> tuple[list[SourceTensor], dict[str, int]]:
    """Every tensor that a rank states, and the first rank that does, by name."""
    known: dict[str, SourceTensor] = {}
    first_rank: dict[str, int] = {}
    faults = []
    stated: tuple[SourceTensor, ...] = ()
    for layout in sources:
        if layout.tensors is stated:  # as most ranks', which `layout.arenas` gives one tuple
            continue
        stated = layout.tensors
        for tensor in stated:
            other = known.setdefault(tensor.name, tensor)
            if other is tensor:
                first_rank.setdefault(tensor.name, layout.rank)
            elif other != tensor:
                faults.append(
                    f"{tensor.name}: rank {layout.rank} has {_form(tensor)}, rank {first_rank[tensor.name]} "
                    f"has {_form(other)}"
                )
    if faults:
        raise PlanError(f"{listed(faults)}: all trainer ranks must load the same model configuration")
    return list(known.values()), first_rank


def _edges(axis: Axis[SourceTensor], start: np.ndarray, stop: np.ndarray, region_bytes: int) -> np.ndarray:
    """Sorted positions at which regions begin, and the end of the last."""
    edges = np.sort(np.concatenate([axis.bounds, start, stop]))
    edges = edges[np.diff(edges, prepend=-1) > 0]
    tensor = np.searchsorted(axis.bounds, edges[:-1], side="right") - 1
    longest = np.maximum(region_bytes // item_bytes(axis.tensors)[tensor], 1)
    piece_of, number = spread(-(-np.diff(edges) // longest))
    return np.concatenate([edges[:-1][piece_of] + number * longest[piece_of], edges[-1:]])


def _form(tensor: SourceTensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"

"""A plan as one would write it down first: element by element, in plain Python. `weightsync.plan` must agree with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from weightsync.layout.records import ITEM_BYTES, SourceLayout, TargetLayout

Element = tuple[str, int]
Write = tuple[int, int, int, int]
"""(slot offset, target index, target offset, length)"""


@dataclasses.dataclass(frozen=True)
class NaivePlan:
    """Of all ranks."""

    writes: dict[int, list[Write]]
    bytes_per_rank: dict[int, int]


def naive_plan(sources: Sequence[SourceLayout], target: TargetLayout, region_bytes: int) -> NaivePlan:
    """`sources` hold all that `target` wants; whoever asks checks that before."""
    wants = list(_wants(target))
    item = {tensor.name: ITEM_BYTES[tensor.dtype] for tensor in target.sources}
    read = Counter(source for source, _ in wants)
    owner = _owners(sources, target, read, region_bytes)
    numbers = {name: i for i, name in enumerate(sorted(tensor.name for tensor in target.targets))}
    singles: dict[int, list[Write]] = defaultdict(list)
    sent: Counter[int] = Counter()
    for source, (name, element) in wants:
        rank, slot = owner[source]
        singles[rank].append((slot, numbers[name], element, 1))
        sent[rank] += item[source[0]]
    ranks = sorted(layout.rank for layout in sources)
    return NaivePlan({rank: _merged(singles[rank]) for rank in ranks}, {rank: sent[rank] for rank in ranks})


def _wants(target: TargetLayout) -> Iterator[tuple[Element, Element]]:
    """(source element, target element) of everything that the loader copies."""
    for copy in target.copies:
        for index in itertools.product(*map(range, copy.shape)):
            source, into = (
                offset + sum(i * stride for i, stride in zip(index, strides, strict=True))
                for offset, strides in (
                    (copy.source_offset, copy.source_strides),
                    (copy.target_offset, copy.target_strides),
                )
            )
            yield (copy.source, source), (copy.target, into)


def _owners(
    sources: Sequence[SourceLayout], target: TargetLayout, read: Counter[Element], region_bytes: int
) -> dict[Element, tuple[int, int]]:
    """Who sends each source element, and from which element of its arena."""
    regions = []
    for tensor in sorted(target.sources, key=lambda tensor: tensor.name):
        item = ITEM_BYTES[tensor.dtype]
        for start, stop in _regions(sources, tensor.name, tensor.numel, max(region_bytes // item, 1)):
            wanted = item * sum(read[tensor.name, element] for element in range(start, stop))
            regions.append((wanted, len(regions), tensor.name, start, stop))
    load: Counter[int] = Counter()
    owner: dict[Element, tuple[int, int]] = {}
    for alone in (True, False):
        for wanted, _, name, start, stop in sorted(regions, key=lambda region: (-region[0], region[1])):
            holders = _holders(sources, name, start, stop)
            if (len(holders) == 1) != alone or not holders or not wanted:
                continue
            rank = min(holders, key=lambda rank: (load[rank], rank))
            load[rank] += wanted
            owner |= {(name, element): (rank, holders[rank] + element - start) for element in range(start, stop)}
    return owner


def _regions(sources: Sequence[SourceLayout], name: str, numel: int, longest: int) -> Iterator[tuple[int, int]]:
    mine = [h for layout in sources for h in layout.holdings if h.name == name and h.start < h.stop]
    for start, stop in itertools.pairwise(sorted({0, numel} | {h.start for h in mine} | {h.stop for h in mine})):
        for at in range(start, stop, longest):
            yield at, min(at + longest, stop)


def _holders(sources: Sequence[SourceLayout], name: str, start: int, stop: int) -> dict[int, int]:
    """Ranks that hold the region whole, and where their arena has its first element."""
    slots: dict[int, int] = {}
    for layout in sources:
        for h in layout.holdings:
            if h.name == name and h.start <= start and stop <= h.stop:
                slot = h.local_offset + start - h.start
                slots[layout.rank] = min(slot, slots.get(layout.rank, slot))
    return slots


def _merged(singles: list[Write]) -> list[Write]:
    merged: list[Write] = []
    for slot, target, element, length in sorted(singles, key=lambda write: write[1:3]):
        if merged:
            slot0, target0, element0, length0 = merged[-1]
            if (target0, element0 + length0, slot0 + length0) == (target, element, slot):
                merged[-1] = (slot0, target0, element0, length0 + length)
                continue
        merged.append((slot, target, element, length))
    return merged

"""A ring of arenas: where each group of a rank's slots lies when they may not all lie in memory at once. Pure.

A group takes the memory of earlier ones, and may be converted once every transfer that reads them is terminal. Groups keep their
order, so that a push converts, sends and waits for them from the first to the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from weightsync.errors import PlanError
from weightsync.layout.forms import GROUP_ALIGN_BYTES, GROUP_BYTES, SCALE, Carried, Group, Slot, aligned
from weightsync.layout.records import ITEM_BYTES

ARENAS = 4
"""A ring has room for so many groups of the usual size: one is converted, the others are on the wire."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """Where the groups of an arena lie in a buffer of `length_bytes`."""

    length_bytes: int
    starts: tuple[int, ...]
    """First byte of each group."""
    after: tuple[frozenset[int], ...]
    """For each group, those earlier ones whose memory it takes."""
    begins: tuple[int, ...] = ()
    """For each group, the byte of the arena that lies at its start: what is before it takes no memory. Empty: its first one."""

    def shifts(self, groups: Sequence[Group]) -> list[int]:
        """For each group, what is added to a byte's place in the arena to have its place in the buffer."""
        begins = self.begins or tuple(group.start_bytes for group in groups)
        return [start - begin for start, begin in zip(self.starts, begins, strict=True)]

    @property
    def whole(self) -> bool:
        """Whether every group still lies there when the last one is converted."""
        return not any(self.after)


def group_bytes(budget_bytes: int | None) -> int:
    """What is converted at once, unless one holding is larger, by a rank that may use so much memory for its arena."""
    return GROUP_BYTES if budget_bytes is None else min(GROUP_BYTES, max(budget_bytes // ARENAS, 1))


def make_ring(
    groups: Sequence[Group], arena_bytes: int, budget_bytes: int | None, *, begins: Sequence[int] = ()
) -> Ring:
    """Lay groups that take `arena_bytes` one behind the other into `budget_bytes`; None leaves them where they are.

    begins: the first byte of each group that takes memory, where some bytes take none. Raises PlanError when a group alone takes
    more than the budget.
    """
    if not begins and (budget_bytes is None or arena_bytes <= budget_bytes):
        return Ring(arena_bytes, tuple(group.start_bytes for group in groups), (frozenset(),) * len(groups))
    first = list(begins) or [group.start_bytes for group in groups]
    lengths = [aligned(g.stop_bytes - begin, GROUP_ALIGN_BYTES) for g, begin in zip(groups, first, strict=True)]
    if begins and (budget_bytes is None or sum(lengths) <= budget_bytes):
        budget_bytes = sum(lengths)
    assert budget_bytes is not None
    starts, after, cursor = [], [], 0
    lying: list[tuple[int, int, int]] = []
    for number, (group, length) in enumerate(zip(groups, lengths, strict=True)):
        if length > budget_bytes:
            raise PlanError(
                f"transfer.arenaBudget is {budget_bytes} bytes, and group {number} of {len(groups)}, slots {group.first} to "
                f"{group.stop}, takes {length} alone: allow at least that, better {2 * length}"
            )
        start = cursor if cursor + length <= budget_bytes else 0
        cursor = start + length
        taken = [each for each in lying if each[1] < cursor and start < each[2]]
        lying = [each for each in lying if each not in taken] + [(number, start, cursor)]
        starts.append(start)
        after.append(frozenset(each[0] for each in taken))
    return Ring(budget_bytes, tuple(starts), tuple(after), tuple(begins))


def placed(carried: Carried, ring: Ring) -> tuple[Slot, ...]:
    """The slots of an arena, moved to where their groups lie in the ring."""
    slots: list[Slot] = []
    for group, shift in zip(carried.groups, ring.shifts(carried.groups), strict=True):
        slots += [_moved(slot, shift) for slot in carried.slots[group.first : group.stop]]
    return tuple(slots)


def _moved(slot: Slot, by_bytes: int) -> Slot:
    scales = slot.scales
    if scales is not None:
        scales = dataclasses.replace(scales, local_offset=scales.local_offset + by_bytes // ITEM_BYTES[SCALE])
    return dataclasses.replace(slot, offset_bytes=slot.offset_bytes + by_bytes, scales=scales)

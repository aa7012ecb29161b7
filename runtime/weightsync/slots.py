"""The slot arena of a trainer rank: its weights converted to what the engines want, in one buffer that is registered once.

`lay_out` decides what the arena carries (pure, in `layout.arenas`), `fill` converts the model's present weights into it. FP8 blocks
that straddle ranks agree on their scale in one exchange. Imports torch, never NIXL.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from weightsync import collector, device_memory
from weightsync.conversion import convert_into, fp8, require_finite
from weightsync.conversion.jobs import Job
from weightsync.errors import ConversionError, PlanError
from weightsync.layout import live, ring
from weightsync.layout.arenas import Carrier
from weightsync.layout.forms import BLOCK, BlockRow, Carried, Columns, Group, Outline, Slot, wanted_of
from weightsync.layout.live import LiveSpan
from weightsync.layout.packing import Packed, in_terms_of, pack
from weightsync.layout.records import SourceLayout, SourceTensor, TargetLayout
from weightsync.layout.ring import Ring, make_ring, placed
from weightsync.layout.shards import LocalPiece, LocalSources
from weightsync.scale_exchange import Agree, alone

Part = tuple[Tensor, np.ndarray]
"""Flat uint8 memory, and the writes (dtype `plan.WRITE`) that come from it, counted from its first byte."""
View = Callable[[int, int, str], Tensor]
"""(offset in bytes, elements, dtype) -> those elements of the arena."""
logger = logging.getLogger(__name__)

UE8M0 = "fp8-128x128-ue8m0"


class SlotArena:
    """What this rank carries, and the memory that it is in.

    layouts: what every trainer rank holds, in the checkpoint's dtypes; this rank's is layouts[rank].
    format_: `transfer.format` of the contract. budget_bytes: what `buffer` may take; None for all that the rank carries.
    group_bytes: what is converted at once, unless one holding is larger. zero_copy: whether slots that nothing converts are read
    where the model keeps them: the model must not change then before nothing reads it any more.
    """

    def __init__(
        self,
        *,
        rank: int,
        local: LocalSources,
        layouts: Sequence[SourceLayout],
        format_: str,
        budget_bytes: int | None = None,
        group_bytes: int | None = None,
        zero_copy: bool = False,
    ) -> None:
        self._rank = rank
        self._zero_copy = zero_copy
        self._reads_live = zero_copy
        self._live: dict[int, Tensor] = {}
        """By number of the slot: its elements in the model's own memory."""
        self._spans: Sequence[LiveSpan] = ()
        self.live_memory: Sequence[Tensor] = ()
        """[bytes] uint8 each: what of the model's memory live slots lie in, to be registered."""
        self._pieces: dict[str, list[LocalPiece]] = {}
        for piece in local.pieces:
            self._pieces.setdefault(piece.name, []).append(piece)
        self._firsts = list({id(piece.parameter): piece for piece in local.pieces}.values())
        """A piece of each parameter: by them it is seen whether the model moved."""
        self._held = layouts
        self._format = format_
        self._budget_bytes = budget_bytes
        self._group_bytes = ring.group_bytes(budget_bytes) if group_bytes is None else group_bytes
        self._packed = Packed({}, {}, {})
        self._wanted: Mapping[str, SourceTensor] = {}
        self._conversions: _Conversions | None = None
        self._places: list[tuple[int, bool]] = []
        self._device = _device_of(local.pieces)
        self.ring = Ring(0, (), ())
        self.layouts: tuple[SourceLayout, ...] = ()
        """What every rank's arena carries, to plan with, as if each lay in memory whole."""
        self.buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        """[bytes] uint8; another tensor after `lay_out` returned True."""
        self.whole = True
        """Whether the buffers of all ranks hold all that they carry, once they are filled."""

    def carries(self, engines: Mapping[str, TargetLayout]) -> bool:
        """Whether everything that engines with these layouts (by digest) want is laid out already, in the right form."""
        known = dict(self._packed.layouts)
        for digest in engines.keys() - known.keys():
            layout = in_terms_of(self._packed.columns, engines[digest])
            if layout is None or any(self._wanted.get(tensor.name) != tensor for tensor in layout.sources):
                return False
            known[digest] = layout
        self._packed = dataclasses.replace(self._packed, layouts=known)
        return True

    def wants(self, digest: str) -> TargetLayout:
        """What the engines of a layout want, in terms of what the arenas carry: to plan with `layouts`."""
        return self._packed.layouts[digest]

    @collector.paused()
    def lay_out(self, engines: Mapping[str, TargetLayout]) -> bool:
        """Make the arena fit what these engines want; True when it changed, and holds nothing until it is filled.

        Raises PlanError and UnsupportedLayout as `layout.arenas.Carrier` does.
        """
        whole = wanted_of(engines)
        packed = pack(engines, self._held)
        wanted = wanted_of(packed.layouts)
        if wanted == self._wanted and not (self._live and self._places != self._present_places()):
            self._packed = packed
            return False
        _check_format(whole, self._format)
        carrier = Carrier(wanted, packed.columns, packed.rows, group_bytes=self._group_bytes)
        mine = carrier.carry(self._held[self._rank])
        all_ranks = [mine if rank == self._rank else carrier.outline(held) for rank, held in enumerate(self._held)]
        sources = self._live_sources(mine) if self._reads_live else {}
        begins = live.begins(mine.groups, [slot.offset_bytes for slot in mine.slots], sources.keys()) if sources else ()
        # With zero copy no rank keeps a version, and how others lay out their rings is their own affair.
        rings = {
            rank: make_ring(each.groups, each.arena_bytes, self._budget_bytes, begins=begins)
            for rank, each in enumerate(all_ranks)
            if rank == self._rank or not self._zero_copy
        }
        # One element even for a rank that carries nothing: NIXL registers no empty memory. What fails here changes nothing.
        buffer = device_memory.allocate(max(rings[self._rank].length_bytes, 1), self._device)
        self._wanted, self._packed, self.buffer = wanted, packed, buffer
        self.layouts = tuple(each.layout for each in all_ranks)
        self.ring = rings[self._rank]
        self.whole = not self._zero_copy and all(each.whole for each in rings.values())
        self._live, self._places = sources, self._present_places()
        self._spans = [live.span_of(s.offset_bytes, s.numel, s.dtype) for s in (mine.slots[i] for i in sorted(sources))]
        self.live_memory = _storages(sources.values())
        self._mine = dataclasses.replace(mine, slots=placed(mine, self.ring))
        self._straddled = _Straddled.of(all_ranks)
        self._conversions = None
        return True

    @property
    def groups(self) -> Sequence[Group]:
        """Parts of the arena that may be filled, and sent, one after the other; where they lie is `ring`'s."""
        return self._mine.groups

    def fill(self, agree: Agree = alone) -> None:
        """Convert the model's weights as they are now. All ranks call it together, with an `agree`, when FP8 blocks straddle them.

        Raises ConversionError naming a tensor with an infinity or a NaN; the arena must not be sent then.
        """
        assert self.ring.whole, "a ring is filled group by group, as memory becomes free"
        self.begin(agree)
        for number in range(len(self.groups)):
            self.fill_group(number)
        self.check()

    def begin(self, agree: Agree = alone) -> None:
        """Agree on blocks that straddle ranks, before the first group. All ranks call it together when there are any."""
        self._agreed = self._exchange(agree)
        if self._device.type == "cuda":
            self._prepare_device().begin(self._agreed)

    def fill_group(self, number: int) -> Callable[[], bool]:
        """Convert one group; on a GPU launches it on the current stream. Returns what says whether it is done.

        On a host raises ConversionError as `fill` does; on a GPU faults are told by `check`.
        """
        if self._conversions is not None:
            with torch.cuda.device_of(self.buffer):  # threads begin on the first device, whatever their process uses
                return self._conversions.run(number)
        group = self.groups[number]
        for index in range(group.first, group.stop):
            slot = self._mine.slots[index]
            if index in self._live:
                require_finite(self._live[index], name=slot.holding.name)
            else:
                self._convert(slot)
        return lambda: True

    def check(self) -> None:
        """After the last group: raise ConversionError for what a GPU met. Waits for the device."""
        if self._conversions is not None:
            self._conversions.check()

    def _prepare_device(self) -> _Conversions:
        """A launch for each group and kind, prepared again only when the model's memory has moved."""
        places = self._present_places()
        if self._conversions is None or self._places != places:
            sources = [self._source(slot) for slot in self._mine.slots]
            self._conversions = _Conversions(
                self._mine, sources, frozenset(self._live), self._view, self._straddled, self._format == UE8M0
            )
            self._places = places
        return self._conversions

    def _present_places(self) -> list[tuple[int, bool]]:
        return [piece.place() for piece in self._firsts]

    def forget(self) -> None:
        """Lay out anew with the next push, whatever it wants: what was laid out could not be registered."""
        self._wanted = {}

    def copy_all(self) -> None:
        """Read nothing in place any more: the transport does not take the model's memory."""
        self._reads_live = False
        self.forget()

    def parts(self, writes: np.ndarray, item_bytes: np.ndarray) -> tuple[Sequence[Part], ...]:
        """By group: this rank's writes of a plan made with `layouts`, by the memory that they come from.

        item_bytes: [targets] size of an element.
        """
        memories = [self._live[index].view(torch.uint8) for index in sorted(self._live)]
        by_group = live.shares(writes, item_bytes, self.groups, self.ring.shifts(self.groups), self._spans)
        return tuple(
            [(self.buffer if share.owner == live.ARENA else memories[share.owner], share.writes) for share in group]
            for group in by_group
        )

    def _live_sources(self, carried: Carried) -> dict[int, Tensor]:
        """By number of the slot: the elements that engines want bit by bit, where a NIC can read them."""
        found: dict[int, Tensor] = {}
        for index, slot in enumerate(carried.slots):
            if slot.scales is None and slot.columns is None and slot.dtype == slot.through:
                source = self._source(slot)
                if source.dtype == _dtype(slot.dtype) and source.device == self._device and self._is_in_place(slot):
                    found[index] = source
        if found and not device_memory.registrable(found.values()):
            logger.warning(
                "transfer.zeroCopy: parameters lie in expandable segments, which no NIC reads; they are copied"
            )
            return {}
        live_bytes = sum(source.nbytes for source in found.values())
        logger.info("transfer.zeroCopy: %d of %d bytes are read in place", live_bytes, carried.arena_bytes)
        return found

    def _is_in_place(self, slot: Slot) -> bool:
        """Whether `_source` is the model's memory itself, and no copy that was made contiguous."""
        return all(piece.place()[1] for piece in self._pieces[slot.holding.name])

    def _convert(self, slot: Slot) -> None:
        source = self._source(slot)
        if slot.scales is None:
            out = self._view(slot.offset_bytes, slot.numel, slot.dtype)
            convert_into(out.view(source.shape), source, name=slot.holding.name, through=_dtype(slot.through))
            return
        amax = _job_of(slot, source, self._view, self._others(slot)).convert(ue8m0=self._format == UE8M0)
        if not fp8.finite(amax):
            _refuse(source, slot)

    def _others(self, slot: Slot) -> Tensor | None:
        """[blocks of rows, blocks of columns] int32: what ranks agreed on for the block rows that a slot shares, 0 elsewhere."""
        first, count, across = _blocks(slot)
        agreed = {row: self._agreed.get((slot.name, first + row)) for row in {0, count - 1}}
        found = {row: amax for row, amax in agreed.items() if amax is not None}
        if not found:
            return None
        others = torch.zeros(count, across, dtype=torch.int32, device=self._device)
        for row, amax in found.items():
            others[row] = amax
        return others

    def _source(self, slot: Slot) -> Tensor:
        """What a slot is made from: [n], or [rows, columns] of a matrix in FP8 or in slices; FP8 is made of whole blocks."""
        start, stop = slot.holding.start, slot.holding.stop
        piece = next(piece for piece in self._pieces[slot.holding.name] if piece.start <= start and stop <= piece.stop)
        flat = piece.flat()[start - piece.start : stop - piece.start]
        if slot.columns is None:
            return flat if slot.scales is None else flat.view(-1, slot.shape[1])
        rows = flat.view(slot.rows, -1)
        if slot.scales is None:
            return rows[:, slot.columns.start : slot.columns.stop]
        return rows[:, slot.columns.blocks.start * BLOCK : slot.columns.blocks.stop * BLOCK]

    def _exchange(self, agree: Agree) -> dict[tuple[str, int], Tensor]:
        """Greatest amax over all ranks of each straddled block row, by carried tensor and block row."""
        straddled = self._straddled
        if not straddled.total:
            return {}
        assert agree is not alone, "ranks that share FP8 blocks agree on their scales"
        agree(torch.zeros(1, dtype=torch.int32))  # all have met: one that fails from here on is not waited for
        vector = torch.zeros(straddled.total, dtype=torch.int32)
        for slot in self._mine.slots:
            if slot.scales is None:
                continue
            rows = self._source(slot)
            for block_row, low, high in _block_rows(slot.row_start, len(rows)):
                place = straddled.places.get((slot.name, block_row))
                if place is not None:
                    part = fp8.block_amax(rows[low:high], slot.row_start + low)[0].cpu()
                    here = vector[place : place + len(part)]
                    torch.maximum(here, part, out=here)
        vector = agree(vector)
        return {
            key: vector[place : place + straddled.widths[key]].to(self._device)
            for key, place in straddled.places.items()
        }

    def _view(self, offset_bytes: int, numel: int, dtype: str) -> Tensor:
        wanted = _dtype(dtype)
        return self.buffer[offset_bytes : offset_bytes + numel * wanted.itemsize].view(wanted)


@dataclasses.dataclass(frozen=True)
class _Straddled:
    """Block rows of which some rank holds only a part, in the order in which their amax are exchanged."""

    places: Mapping[tuple[str, int], int]
    widths: Mapping[tuple[str, int], int]
    total: int

    @classmethod
    def of(cls, carried: Sequence[Outline]) -> _Straddled:
        rows = sorted(frozenset[BlockRow]().union(*(each.parted for each in carried)))
        ends = [0, *itertools.accumulate(row.blocks for row in rows)]
        places = {(row.name, row.number): place for row, place in zip(rows, ends, strict=False)}
        return cls(places, {(row.name, row.number): row.blocks for row in rows}, ends[-1])


class _Conversions:
    """The groups' conversions on a GPU, prepared for the places in memory that the model has now."""

    def __init__(
        self,
        carried: Carried,
        sources: Sequence[Tensor],
        live_slots: frozenset[int],
        view: View,
        straddled: _Straddled,
        ue8m0: bool,
    ) -> None:
        from weightsync.conversion.device import DeviceConversion  # Triton is on GPU machines only

        self._view, self._straddled = view, straddled
        self._given: list[tuple[tuple[str, int], Tensor]] = []
        numbers = [range(group.first, group.stop) for group in carried.groups]
        copied = [[i for i in group if i not in live_slots] for group in numbers]
        self._groups = [
            DeviceConversion(*self._jobs([carried.slots[i] for i in group], [sources[i] for i in group]), ue8m0=ue8m0)
            for group in copied
        ]
        self._read = [
            [(carried.slots[i].holding.name, sources[i]) for i in group if i in live_slots] for group in numbers
        ]
        """By group: tensors that are read in place, which are looked at only."""
        self._greatest: dict[int, Tensor] = {}

    def begin(self, agreed: Mapping[tuple[str, int], Tensor]) -> None:
        for key, amax in self._given:
            amax.copy_(agreed[key])

    def run(self, number: int) -> Callable[[], bool]:
        self._groups[number].run()
        if self._read[number]:
            tensors = [tensor for _, tensor in self._read[number]]
            self._greatest[number] = get_total_norm(tensors, norm_type=math.inf, foreach=True)
        done = torch.cuda.Event()
        done.record()
        return done.query

    def check(self) -> None:
        flags = [flag for group in self._groups for flag in group.flags]
        names = [name for group in self._groups for name in group.names]
        bad = {names[i] for i in torch.cat(flags).nonzero().flatten().tolist()} if flags else set[str]()
        for number, greatest in self._greatest.items():
            if not torch.isfinite(greatest):
                bad |= {name for name, tensor in self._read[number] if not torch.isfinite(tensor).all()}
        bad = sorted(bad)
        if bad:
            raise ConversionError(
                f"{len(bad)} tensors have an infinity or a NaN, such as {', '.join(bad[:5])}: the optimizer step "
                "diverged; nothing was pushed"
            )

    def _jobs(self, slots: Sequence[Slot], sources: Sequence[Tensor]) -> tuple[list[tuple[str, Job]], list[Any]]:
        """(tensor's name, job) of the FP8 slots, and the casts."""
        from weightsync.conversion.device import Cast

        blocks, casts = [], []
        for slot, source in zip(slots, sources, strict=True):
            if slot.scales is None:
                out, through = self._view(slot.offset_bytes, slot.numel, slot.dtype), _dtype(slot.through)
                casts.append(Cast(name=slot.holding.name, source=source, out=out.view(source.shape), through=through))
                continue
            job = _job_of(slot, source, self._view, self._give(slot, source.device))
            blocks.append((slot.holding.name, job))
        return blocks, casts

    def _give(self, slot: Slot, device: torch.device) -> Tensor | None:
        """Room for the other ranks' amax of a slot's first and last block rows, where they have any."""
        first, count, across = _blocks(slot)
        shared = [row for row in sorted({first, first + count - 1}) if (slot.name, row) in self._straddled.places]
        if not shared:
            return None
        amax = torch.zeros(count, across, dtype=torch.int32, device=device)
        self._given += [((slot.name, row), amax[row - first]) for row in shared]
        return amax


def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The whole memory that tensors are parts of, once, as flat uint8."""
    storages: dict[int, Tensor] = {}
    for tensor in sorted(tensors, key=lambda t: t.untyped_storage().nbytes()):  # of several at one address the largest
        storages[tensor.untyped_storage().data_ptr()] = tensor
    return [
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        for tensor in storages.values()
    ]


def _blocks(slot: Slot) -> tuple[int, int, int]:
    """First row of FP8 blocks that a slot touches, how many there are, and blocks in each."""
    columns = range(-(-slot.shape[1] // BLOCK)) if slot.columns is None else slot.columns.blocks
    return slot.row_start // BLOCK, fp8.blocks_of(slot.rows, slot.row_start), len(columns)


def _job_of(slot: Slot, source: Tensor, view: View, amax: Tensor | None) -> Job:
    """The conversion of an FP8 slot into its place, for a host and for a GPU."""
    assert slot.scales is not None
    scales = view(slot.scales.local_offset * 4, slot.scales.stop - slot.scales.start, "float32")
    columns = slot.columns or Columns(slot.name, 0, slot.shape[1])
    first = columns.start % BLOCK
    across = -(-columns.stop // columns.block[1]) - columns.start // columns.block[1]
    return Job(
        source=source,
        out=view(slot.offset_bytes, slot.numel, slot.dtype).view(slot.rows, -1),
        scales=scales.view(-1, across),
        row_start=slot.row_start,
        columns=range(first, first + columns.width),
        block=columns.block,
        amax=amax,
    )


def _check_format(wanted: Mapping[str, SourceTensor], format_: str) -> None:
    """Raise PlanError when the engines do not want what transfer.format says."""
    quantized = sorted(tensor.name for tensor in wanted.values() if tensor.dtype.startswith("float8"))
    if format_ == "bf16" and quantized:
        raise PlanError(
            f"transfer.format is bf16, but engines want {len(quantized)} tensors in FP8, first {quantized[0]}: set "
            "inference.quantization to none, or transfer.format to auto"
        )
    if format_.startswith("fp8") and not quantized:
        raise PlanError(
            f"transfer.format is {format_}, but engines want no tensor in FP8: do they serve an FP8 checkpoint of the model?"
        )


def _dtype(name: str) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, name))


def _device_of(pieces: Sequence[LocalPiece]) -> torch.device:
    """The pieces' own; the host's where they are on several, as parameters that FSDP2 offloads beside buffers on the GPU."""
    devices = {piece.parameter.device for piece in pieces}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _block_rows(row_start: int, rows: int) -> list[tuple[int, int, int]]:
    """First and last block row that rows [row_start, row_start + rows) touch: (block row, first and last + 1 of these rows)."""
    blocks = sorted({row_start // BLOCK, (row_start + rows - 1) // BLOCK})
    return [(block, max(block * BLOCK - row_start, 0), min((block + 1) * BLOCK - row_start, rows)) for block in blocks]


def _refuse(rows: Tensor, slot: Slot) -> None:
    """Name the first element that is not finite; where this rank's are, the other rank of a straddled block will name its own."""
    bad = torch.nonzero(~torch.isfinite(rows.to(torch.bfloat16)))
    where = "in a block that it shares with another rank" if not len(bad) else _place(bad[0], slot)
    raise ConversionError(
        f"{slot.holding.name}: {len(bad)} of this rank's {rows.numel()} elements are not finite, the first {where}: the optimizer "
        "step diverged; nothing was pushed"
    )


def _place(index: Tensor, slot: Slot) -> str:
    row, column = index.tolist()
    first_column = 0 if slot.columns is None else slot.columns.blocks.start * BLOCK
    return f"at [{row + slot.row_start}, {column + first_column}]"

"""The slot arena of a trainer rank: its weights converted to what the engines want, in one buffer that is registered once.

`lay_out` decides what the arena carries (pure, in `layout.forms`), `fill` converts the model's present weights into it. FP8 blocks
that straddle ranks agree on their scale in one exchange. Imports torch, never NIXL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from weightsync.conversion import convert_into, fp8
from weightsync.errors import ConversionError, PlanError
from weightsync.layout.forms import BLOCK, Carried, Slot, carry, wanted_of
from weightsync.layout.records import SourceLayout, SourceTensor, TargetLayout
from weightsync.layout.shards import LocalPiece, LocalSources

Agree = Callable[[Tensor], Tensor]
"""The element-wise maximum of an int32 vector over all trainer ranks; called by all of them for the same lengths."""


View = Callable[[int, int, str], Tensor]
"""(offset in bytes, elements, dtype) -> those elements of the arena."""
UE8M0 = "fp8-128x128-ue8m0"


class SlotArena:
    """What this rank carries, and the memory that it is in.

    layouts: what every trainer rank holds, in the checkpoint's dtypes; this rank's is layouts[rank].
    format_: `transfer.format` of the contract.
    """

    def __init__(
        self, *, rank: int, local: LocalSources, layouts: Sequence[SourceLayout], format_: str, agree: Agree
    ) -> None:
        self._rank = rank
        self._pieces = {(piece.name, piece.start): piece for piece in local.pieces}
        self._held = layouts
        self._format = format_
        self._agree = agree
        self._wanted: Mapping[str, SourceTensor] | None = None
        self._device_fill: _DeviceFill | None = None
        self._device = _device_of(local.pieces)
        self.layouts: tuple[SourceLayout, ...] = ()
        """What every rank's arena carries, to plan with."""
        self.buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        """[bytes] uint8; another tensor after `lay_out` returned True."""

    def carries(self, engines: Mapping[str, TargetLayout]) -> bool:
        """Whether everything that engines with these layouts (by digest) want is laid out already, in the right form."""
        known = self._wanted
        return known is not None and all(known.get(n) == tensor for n, tensor in wanted_of(engines).items())

    def lay_out(self, engines: Mapping[str, TargetLayout]) -> bool:
        """Make the arena fit what these engines want; True when it changed, and holds nothing until it is filled.

        Raises PlanError and UnsupportedLayout as `layout.forms.carry` does.
        """
        wanted = wanted_of(engines)
        if wanted == self._wanted:
            return False
        _check_format(wanted, self._format)
        carried = [carry(layout, wanted) for layout in self._held]
        self._wanted = wanted
        self.layouts = tuple(each.layout for each in carried)
        self._mine = carried[self._rank]
        self._straddled = _Straddled.of(carried)
        self._device_fill = None
        # One element even for a rank that carries nothing: NIXL registers no empty memory.
        self.buffer = torch.empty(max(self._mine.arena_bytes, 1), dtype=torch.uint8, device=self._device)
        return True

    def fill(self) -> None:
        """Convert the model's weights as they are now. All ranks call it together when FP8 blocks straddle them.

        Raises ConversionError naming a tensor with an infinity or a NaN; the arena must not be sent then.
        """
        amax = self._exchange()
        if self._device.type == "cuda":
            self._fill_device(amax)
            return
        for slot in self._mine.slots:
            piece = self._pieces[slot.holding.name, slot.holding.start]
            out = self._view(slot.offset_bytes, slot.numel, slot.dtype)
            if slot.scales is None:
                convert_into(out, piece.flat(), name=piece.name, through=_dtype(slot.through))
            else:
                self._quantize(slot, piece, out, amax)

    def _fill_device(self, agreed: Mapping[tuple[str, int], Tensor]) -> None:
        """All slots by a few launches, which are prepared again only when the model's memory has moved."""
        sources = [self._pieces[slot.holding.name, slot.holding.start].flat() for slot in self._mine.slots]
        places = [source.data_ptr() for source in sources]
        if self._device_fill is None or self._device_fill.places != places:
            self._device_fill = _DeviceFill(
                self._mine.slots, sources, self._view, self._straddled, self._format == UE8M0
            )
        self._device_fill.run(agreed)

    def _quantize(self, slot: Slot, piece: LocalPiece, out: Tensor, agreed: Mapping[tuple[str, int], Tensor]) -> None:
        rows, row_start = _rows(slot, piece)
        amax = fp8.block_amax(rows, row_start)
        first = row_start // BLOCK
        for block_row in {first, first + len(amax) - 1}:
            other = agreed.get((slot.holding.name, block_row))
            if other is not None:
                torch.maximum(amax[block_row - first], other, out=amax[block_row - first])
        if not fp8.finite(amax):
            _refuse(rows, row_start, piece)
        scales = fp8.scales_of(amax, ue8m0=self._format == UE8M0)
        out.copy_(fp8.quantize(rows, scales, row_start).reshape(-1))
        holding = slot.scales
        assert holding is not None  # asked by fill
        self._view(holding.local_offset * 4, holding.stop - holding.start, "float32").copy_(scales.reshape(-1))

    def _exchange(self) -> dict[tuple[str, int], Tensor]:
        """Greatest amax over all ranks of each straddled block row, by tensor and block row."""
        straddled = self._straddled
        if not straddled.total:
            return {}
        vector = torch.zeros(straddled.total, dtype=torch.int32)
        for slot in self._mine.slots:
            if slot.scales is None:
                continue
            rows, row_start = _rows(slot, self._pieces[slot.holding.name, slot.holding.start])
            for block_row, low, high in _block_rows(row_start, len(rows)):
                place = straddled.places.get((slot.holding.name, block_row))
                if place is not None:
                    part = fp8.block_amax(rows[low:high], row_start + low)[0].cpu()
                    here = vector[place : place + len(part)]
                    torch.maximum(here, part, out=here)
        vector = self._agree(vector)
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
    def of(cls, carried: Sequence[Carried]) -> _Straddled:
        widths: dict[tuple[str, int], int] = {}
        for each in carried:
            for slot in each.slots:
                if slot.scales is None:
                    continue
                rows, columns = slot.shape
                start, stop = slot.holding.start // columns, slot.holding.stop // columns
                for block_row in {start // BLOCK, (stop - 1) // BLOCK}:
                    if start > block_row * BLOCK or stop < min(rows, (block_row + 1) * BLOCK):
                        widths[slot.holding.name, block_row] = -(-columns // BLOCK)
        places, total = {}, 0
        for key in sorted(widths):
            places[key] = total
            total += widths[key]
        return cls(places, widths, total)


class _DeviceFill:
    """The slots' conversion on a GPU, prepared for the places in memory that the model has now."""

    def __init__(
        self, slots: Sequence[Slot], sources: Sequence[Tensor], view: View, straddled: _Straddled, ue8m0: bool
    ) -> None:
        from weightsync.conversion.device import Cast, DeviceConversion, Job  # Triton is on GPU machines only

        self.places = [source.data_ptr() for source in sources]
        self._given: list[tuple[tuple[str, int], Tensor]] = []
        blocks, casts = [], []
        for slot, source in zip(slots, sources, strict=True):
            out = view(slot.offset_bytes, slot.numel, slot.dtype)
            if slot.scales is None:
                casts.append(Cast(name=slot.holding.name, source=source, out=out, through=_dtype(slot.through)))
                continue
            columns, across = slot.shape[1], -(-slot.shape[1] // BLOCK)
            row_start = slot.holding.start // columns
            scales = view(slot.scales.local_offset * 4, slot.scales.stop - slot.scales.start, "float32").view(
                -1, across
            )
            job = Job(
                source=source.view(-1, columns),
                out=out.view(-1, columns),
                scales=scales,
                row_start=row_start,
                amax=self._give(slot.holding.name, row_start // BLOCK, scales, straddled),
            )
            blocks.append((slot.holding.name, job))
        self._conversion = DeviceConversion(blocks, casts, ue8m0=ue8m0)

    def run(self, agreed: Mapping[tuple[str, int], Tensor]) -> None:
        for key, amax in self._given:
            amax.copy_(agreed[key])
        self._conversion.run()

    def _give(self, name: str, first: int, scales: Tensor, straddled: _Straddled) -> Tensor | None:
        """Room for the other ranks' amax of this slot's first and last block rows, where they have any."""
        shared = [row for row in sorted({first, first + len(scales) - 1}) if (name, row) in straddled.places]
        if not shared:
            return None
        amax = torch.zeros_like(scales, dtype=torch.int32)
        self._given += [((name, row), amax[row - first]) for row in shared]
        return amax


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


def _rows(slot: Slot, piece: LocalPiece) -> tuple[Tensor, int]:
    """(the piece as [r, k], index of its first row in the whole tensor)."""
    columns = slot.shape[1]
    return piece.flat().view(-1, columns), slot.holding.start // columns


def _block_rows(row_start: int, rows: int) -> list[tuple[int, int, int]]:
    """First and last block row that rows [row_start, row_start + rows) touch: (block row, first and last + 1 of these rows)."""
    blocks = sorted({row_start // BLOCK, (row_start + rows - 1) // BLOCK})
    return [(block, max(block * BLOCK - row_start, 0), min((block + 1) * BLOCK - row_start, rows)) for block in blocks]


def _refuse(rows: Tensor, row_start: int, piece: LocalPiece) -> None:
    """Name the first element that is not finite; where this rank's are, the other rank of a straddled block will name its own."""
    bad = torch.nonzero(~torch.isfinite(rows.to(torch.bfloat16)))
    where = "in a block that it shares with another rank" if not len(bad) else _place(bad[0], row_start)
    raise ConversionError(
        f"{piece.name}: {len(bad)} of this rank's {rows.numel()} elements are not finite, the first {where}: the optimizer step "
        "diverged; nothing was pushed"
    )


def _place(index: Tensor, row_start: int) -> str:
    row, column = index.tolist()
    return f"at [{row + row_start}, {column}]"

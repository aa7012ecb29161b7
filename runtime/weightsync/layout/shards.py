"""What a trainer rank holds of each checkpoint tensor, from the DTensor placements of its parameters.

First-cut placements: plain tensors (held by every rank), Replicate, and one Shard(0), alone or beside Replicate
(FSDP2, HSDP). Imports torch and the records.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import Family
from weightsync.layout.records import Holding, SourceLayout, SourceTensor


@dataclasses.dataclass(frozen=True, eq=False)
class LocalPiece:
    """Elements [start, stop) of checkpoint tensor `name` that this rank holds, and the memory that they are in."""

    name: str
    start: int
    stop: int
    local_offset: int
    """First element's place in the rank's slot arena."""
    parameter: Tensor
    parameter_start: int
    """First element's place in the parameter's local shard."""

    def flat(self) -> Tensor:
        """[stop - start] view of the parameter as it is now, dtype and device of the parameter; detached."""
        local = _local(self.parameter)
        return local.reshape(-1)[self.parameter_start : self.parameter_start + self.stop - self.start]


@dataclasses.dataclass(frozen=True, eq=False)
class LocalSources:
    """One rank's part of the checkpoint: what to announce (`layout`) and what to convert (`pieces`)."""

    tensors: tuple[SourceTensor, ...]
    """Every checkpoint tensor of the model, also those that this rank holds nothing of."""
    pieces: tuple[LocalPiece, ...]
    """In the order of the slot arena, without gaps."""

    @property
    def arena_numel(self) -> int:
        """Elements that the rank's slot arena must have room for."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def layout(self, rank: int) -> SourceLayout:
        """The record that trainer rank `rank` publishes."""
        holdings = tuple(Holding(piece.name, piece.start, piece.stop, piece.local_offset) for piece in self.pieces)
        return SourceLayout(rank=rank, tensors=self.tensors, holdings=holdings)


def sources_of(
    named_parameters: Iterable[tuple[str, Tensor]], family: Family, *, dtype: str = "bfloat16"
) -> LocalSources:
    """Describe this rank's parameters in the checkpoint's names and shapes.

    `dtype` is the checkpoint's, which the pieces are converted to before they are sent. Call it while parameters are
    sharded (before the first forward). Raises UnsupportedLayout naming the tensor whose placement, strides or shard
    size are not understood, or the checkpoint name that two parameters claim.
    """
    tensors: dict[str, SourceTensor] = {}
    pieces: list[LocalPiece] = []
    used = 0
    for parameter_name, parameter in named_parameters:
        shape = tuple(parameter.shape)
        held = _held(parameter_name, parameter)
        for name, part_shape, part_start in family(parameter_name, shape):
            if name in tensors:
                raise UnsupportedLayout(
                    f"{parameter_name} and another parameter both hold {name}: if they are tied, omit one"
                )
            tensors[name] = SourceTensor(name, part_shape, dtype)
            start, stop = max(held.start, part_start), min(held.stop, part_start + math.prod(part_shape))
            if start < stop:
                pieces.append(
                    LocalPiece(name, start - part_start, stop - part_start, used, parameter, start - held.start)
                )
                used += stop - start
    return LocalSources(tuple(tensors.values()), tuple(pieces))


def _held(name: str, parameter: Tensor) -> range:
    """Linear elements of the whole parameter that this rank's local tensor has."""
    sharded_over = 1
    held = range(parameter.numel())
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate()
        for mesh_dim, placement in enumerate(parameter.placements):
            if type(placement) is Replicate:
                continue
            if type(placement) is not Shard or placement.dim != 0 or sharded_over > 1:
                raise UnsupportedLayout(
                    f"{name} has placements {list(parameter.placements)}: "
                    "one Shard(0), alone or beside Replicate, can be pushed"
                )
            sharded_over = parameter.device_mesh.size(mesh_dim)
            held = _chunk(parameter, sharded_over, None if coordinate is None else coordinate[mesh_dim])
        if coordinate is None:
            held = range(0)
    local = _local(parameter)
    if local.numel() != len(held) or not local.is_contiguous():
        raise UnsupportedLayout(
            f"{name}: this rank has {local.numel()} elements (strides {local.stride()}), want {len(held)} contiguous "
            f"ones of {list(parameter.shape)} for placements {list(getattr(parameter, 'placements', ['plain']))}"
        )
    return held


def _chunk(parameter: Tensor, n_chunks: int, coordinate: int | None) -> range:
    """What torch.chunk along dim 0 gives to a coordinate: ceil(rows / n) rows each, the last ones fewer or none."""
    if coordinate is None:
        return range(0)
    rows = parameter.shape[0]
    row_numel = math.prod(parameter.shape[1:])
    chunk_rows = -(-rows // n_chunks)
    start, stop = min(coordinate * chunk_rows, rows), min((coordinate + 1) * chunk_rows, rows)
    return range(start * row_numel, stop * row_numel)


def _local(parameter: Tensor) -> Tensor:
    with torch.no_grad():
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()

"""What a trainer rank holds of each checkpoint tensor, from the DTensor placements of its module.

Placements are not told apart by case: torch's own arithmetic splits the indices of each dim, so any mesh of Replicate, Shard and
FSDP2's `_StridedShard` (FSDP2, HSDP, expert, tensor and context parallelism, one inside another) gives element ranges. A part
that is not contiguous in the checkpoint's tensor is several pieces. Imports torch and the records.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import Family, Parts
from weightsync.layout.records import Holding, SourceLayout, SourceTensor

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What activation checkpointing and torch.compile put into a module's names."""


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

    def place(self) -> tuple[int, bool]:
        """(address, whether it is contiguous) of the parameter's local shard as it is now."""
        local = _local(self.parameter)
        return local.data_ptr(), local.is_contiguous()

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """Elements [start, start + length) of a whole tensor, which are neighbours in the local one too."""

    start: int
    local_start: int
    length: int


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters, tied ones once, and the buffers that a checkpoint holds, under their names without wrappers.

    FSDP2 modules whose parameters a forward left gathered are sharded again first: the gathered copies are freed later.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, parameter in model.named_parameters():
        yield _unwrapped(name), parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield _unwrapped(name), buffer


def sources_of(named: Iterable[tuple[str, Tensor]], family: Family, *, dtype: str | None = "bfloat16") -> LocalSources:
    """Describe this rank's part of `named_tensors` in the checkpoint's names, shapes and dtypes.

    `dtype` is the checkpoint's, but for what the family keeps in fp32; elements are rounded to it before they are sent, whatever
    the dtype of the trainer's masters. None: each tensor is stored as it is. Raises UnsupportedLayout naming the tensor whose
    placement, strides or shard size are not understood, or the checkpoint name that two tensors claim.
    """
    tensors: dict[str, SourceTensor] = {}
    pieces: list[LocalPiece] = []
    used = 0
    for module_name, tensor in named:
        parts = family.parts(module_name, tuple(tensor.shape))
        stored = str(tensor.dtype).removeprefix("torch.") if dtype is None else dtype
        for name, shape, _ in parts:
            if name in tensors:
                raise UnsupportedLayout(
                    f"{module_name} and another parameter both hold {name}: if they are tied, omit one"
                )
            tensors[name] = SourceTensor(name, shape, family.dtype(name, stored))
        for name, start, run in _split(_held(module_name, tensor) if parts else [], parts):
            pieces.append(LocalPiece(name, start, start + run.length, used, tensor, run.local_start))
            used += run.length
    return LocalSources(tuple(tensors.values()), tuple(pieces))


def _split(runs: Sequence[_Run], parts: Parts) -> Iterator[tuple[str, int, _Run]]:
    """Cut runs at the bounds of parts, both in ascending order: (part's name, first element within it, run)."""
    at = 0
    for name, shape, part_start in parts:
        part_stop = part_start + math.prod(shape)
        while at < len(runs) and runs[at].start < part_stop:
            run = runs[at]
            start, stop = max(run.start, part_start), min(run.start + run.length, part_stop)
            if start < stop:
                yield name, start - part_start, _Run(start, run.local_start + start - run.start, stop - start)
            if run.start + run.length > part_stop:
                break
            at += 1


def _held(name: str, tensor: Tensor) -> list[_Run]:
    """What of the whole tensor this rank's local one has, in its order."""
    indices = _indices(name, tensor)
    local, want = _local(tensor), [len(index) for index in indices]
    nothing = 0 in want
    if (local.numel() if nothing else list(local.shape) != want) or not local.is_contiguous():
        raise UnsupportedLayout(
            f"{name}: this rank has {list(local.shape)} (strides {local.stride()}), want {'nothing' if nothing else want} of "
            f"{list(tensor.shape)} for placements {list(getattr(tensor, 'placements', ['plain']))}: local tensors must be "
            "contiguous, and sharded as torch does it; where two axes shard one dim, the outer one evenly"
        )
    return [] if nothing else _runs(tuple(tensor.shape), indices)


def _indices(name: str, tensor: Tensor) -> list[Tensor]:
    """For each dim the indices, ascending, that this rank's local tensor has of it; outside the tensor's mesh an empty one."""
    indices = [torch.arange(n) for n in tensor.shape]
    if not isinstance(tensor, DTensor):
        return indices
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    for axis, placement in enumerate(tensor.placements):
        if type(placement) is Replicate:
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise UnsupportedLayout(
                f"{name} has placements {list(tensor.placements)}: Replicate, Shard and FSDP2's _StridedShard can be pushed; "
                "redistribute it before"
            )
        if coordinate is not None:
            along = indices[placement.dim].view([1] * placement.dim + [-1])
            chunks, _ = placement._split_tensor(along, mesh.size(axis), with_padding=False, contiguous=False)
            indices[placement.dim] = chunks[coordinate[axis]].reshape(-1)
    return [torch.arange(0)] if coordinate is None else indices


def _runs(shape: tuple[int, ...], indices: Sequence[Tensor]) -> list[_Run]:
    """Runs of neighbours among the elements that have `indices` along each dim of a row-major tensor, none of them empty."""
    dim, inner = len(shape), 1
    while dim and len(indices[dim - 1]) == shape[dim - 1]:
        dim -= 1
        inner *= shape[dim]
    start, length = torch.zeros(1, dtype=torch.int64), torch.full((1,), inner)
    if dim:
        dim -= 1
        first = torch.cat([torch.tensor([0]), torch.nonzero(indices[dim].diff() != 1).flatten() + 1])
        start = indices[dim][first] * inner
        length = torch.cat([first, torch.tensor([len(indices[dim])])]).diff() * inner
    for outer in reversed(range(dim)):
        start = (indices[outer][:, None] * math.prod(shape[outer + 1 :]) + start).flatten()
        length = length.repeat(len(indices[outer]))
    local_start = length.cumsum(0) - length
    return [_Run(*run) for run in zip(start.tolist(), local_start.tolist(), length.tolist(), strict=True)]


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

"""One process as any rank of a trainer, real FSDP2 and expert-parallel modules on it, and the checkpoint from all ranks' pieces."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from weightsync.layout.families import family_of
from weightsync.layout.shards import LocalSources, named_tensors, sources_of

Parallelize = Callable[[PreTrainedModel], None]
"""Shards a model in place, for the rank that this process is."""


@contextlib.contextmanager
def one_of(n_ranks: int, rank: int) -> Iterator[None]:
    """This process as one rank of many that are not there: placements and shards are real, collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(*shape: int, names: Sequence[str] | None = None) -> DeviceMesh:
    """A mesh whose axes are named after this rank too: torch interns equal meshes, with the first one's coordinate."""
    given = names or [f"axis{i}" for i in range(len(shape))]
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"{name}_of_{dist.get_rank()}" for name in given))


def fsdp(model: PreTrainedModel, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """FSDP2 as trainers apply it, over one axis or replicated over a first one: every layer, then the rest."""
    mesh = mesh or mesh_of(dist.get_world_size())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def experts_of(model: nn.Module) -> list[nn.Module]:
    """Modules of fused experts, whose parameters have the experts as dim 0."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts")]


def expert_parallel(model: nn.Module, mesh: DeviceMesh, *, dim: int = 0) -> None:
    """Shard fused experts over a mesh of one axis, as a trainer's expert parallelism does."""
    for module in experts_of(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            local = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
            setattr(module, name, nn.Parameter(local))


def ep(model: PreTrainedModel) -> None:
    """Experts over all ranks; whatever else there is, whole on each."""
    expert_parallel(model, mesh_of(dist.get_world_size()))


def ep_fsdp(model: PreTrainedModel, n_ep: int = 2, *, inner_dim: int = 0) -> None:
    """Experts over one axis and FSDP over the other inside it, along `inner_dim`; FSDP over both for the rest, as in torchtitan."""
    mesh = mesh_of(dist.get_world_size() // n_ep, n_ep, names=["dp", "ep"])
    expert_parallel(model, mesh[mesh.mesh_dim_names[1]])
    for module in experts_of(model):
        fully_shard(module, mesh=mesh[mesh.mesh_dim_names[0]], shard_placement_fn=lambda _: Shard(inner_dim))
    fsdp(model, mesh._flatten(f"all_of_{dist.get_rank()}"))


def cp_fsdp(model: PreTrainedModel) -> None:
    """Context parallelism of 2, whose axis is one more to shard parameters over: FSDP sees both flattened."""
    mesh = mesh_of(dist.get_world_size() // 2, 2, names=["dp", "cp"])
    fsdp(model, mesh._flatten(f"dp_cp_of_{dist.get_rank()}"))


def tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Megatron's way over a mesh of one axis: rows of q, k, v, gate and up, columns of o and down."""
    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and kind.endswith("_proj"):
            dim = 1 if kind in ("o_proj", "down_proj") else 0
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(dim)], src_data_rank=None))


def tp_fsdp(model: PreTrainedModel) -> None:
    """FSDP over the first axis, tensor parallelism of 2 inside it."""
    mesh = mesh_of(dist.get_world_size() // 2, 2, names=["dp", "tp"])
    tensor_parallel(model, mesh[mesh.mesh_dim_names[1]])
    fsdp(model, mesh[mesh.mesh_dim_names[0]])


def sources_of_model(model: nn.Module, **options: Any) -> LocalSources:
    """As the publisher asks for them."""
    return sources_of(named_tensors(model), family_of(model.config.to_dict()), **options)  # type: ignore[union-attr, operator]


def all_ranks(make: Callable[[], PreTrainedModel], n_ranks: int, parallelize: Parallelize) -> list[LocalSources]:
    """What each rank of a trainer holds of the same model."""
    ranks = []
    for rank in range(n_ranks):
        with one_of(n_ranks, rank):
            model = make()
            parallelize(model)
            ranks.append(sources_of_model(model))
    return ranks


def gather(ranks: Sequence[LocalSources]) -> dict[str, Tensor]:
    """The checkpoint, by name, from every rank's pieces, rounded to each tensor's dtype; ranks that share elements agree."""
    assert len({local.tensors for local in ranks}) == 1
    holders(ranks)
    whole: dict[str, Tensor] = {}
    for tensor in ranks[0].tensors:
        dtype = getattr(torch, tensor.dtype)
        pieces = [piece for local in ranks for piece in local.pieces if piece.name == tensor.name]
        found = torch.zeros(tensor.numel, dtype=dtype)
        for piece in pieces:
            found[piece.start : piece.stop] = piece.flat()
        assert all(torch.equal(found[p.start : p.stop], p.flat().to(dtype)) for p in pieces), tensor.name
        whole[tensor.name] = found.reshape(tensor.shape)
    return whole


def holders(ranks: Sequence[LocalSources]) -> dict[str, int]:
    """How many ranks hold each element of a tensor, by name: at least one, and for all of its elements the same number."""
    counts: dict[str, int] = {}
    for tensor in ranks[0].tensors:
        hits = torch.zeros(tensor.numel, dtype=torch.int)
        for piece in (piece for local in ranks for piece in local.pieces if piece.name == tensor.name):
            hits[piece.start : piece.stop] += 1
        assert hits.min() == hits.max() > 0, (tensor.name, hits.unique())
        counts[tensor.name] = int(hits[0])
    return counts


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert sorted(found) == sorted(want)
    for name, tensor in want.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def counted(*shape: int) -> Tensor:
    """fp32 elements that count, so that one in a wrong place shows."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)

"""Whatever the mesh, the placements and the shape: what all ranks say they hold, with their bytes, rebuilds the tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from tests.dataplane.rank_makers import counted, mesh_of, one_of
from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import DENSE, QWEN_MOE
from weightsync.layout.shards import LocalSources, sources_of

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Mesh = tuple[int, ...]


def assert_rebuilt(ranks: Sequence[LocalSources], want: dict[str, torch.Tensor], n_holders: int) -> None:
    """Each element of each tensor comes from `n_holders` ranks, whose bytes are the element's own."""
    assert {(t.name, t.shape) for t in ranks[0].tensors} == {(name, tuple(t.shape)) for name, t in want.items()}
    for name, whole in want.items():
        hits = torch.zeros(whole.numel(), dtype=torch.int)
        for piece in (piece for local in ranks for piece in local.pieces if piece.name == name):
            assert torch.equal(piece.flat(), whole.reshape(-1)[piece.start : piece.stop]), piece
            hits[piece.start : piece.stop] += 1
        assert (hits == n_holders).all(), hits.tolist()
    for local in ranks:  # no two pieces of one rank can be one
        for a, b in itertools.pairwise(local.pieces):
            assert (a.name, a.stop, a.parameter_start + a.stop - a.start) != (b.name, b.start, b.parameter_start)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Mesh, tuple[int, ...], list[Placement]]:
    """A mesh of at most three axes and 12 ranks, a tensor of at most three dims, and one placement an axis."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple).filter(lambda m: math.prod(m) <= 12))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    dims = st.integers(0, len(shape) - 1)
    strided = st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 3))
    placement = st.one_of(st.just(Replicate()), dims.map(Shard), dims.map(Shard), strided)
    return mesh, shape, [draw(placement) for _ in mesh]


@pytest.mark.failure_mode(6)
@SETTINGS
@given(distributions())
def test_what_torch_distributes_is_rebuilt(drawn: tuple[Mesh, tuple[int, ...], list[Placement]]) -> None:
    """torch splits a tensor that counts, so that each rank's local elements say where they are from."""
    mesh, shape, placements = drawn
    whole, ranks = counted(*shape), []
    for rank in range(math.prod(mesh)):
        with one_of(math.prod(mesh), rank):
            tensor = distribute_tensor(whole, mesh_of(*mesh), placements, src_data_rank=None)
            ranks.append(sources_of([("w", tensor)], DENSE))
    n_copies = math.prod(n for n, placement in zip(mesh, placements, strict=True) if isinstance(placement, Replicate))
    assert_rebuilt(ranks, {"w": whole}, n_copies)


@pytest.mark.failure_mode(6)
@SETTINGS
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0, 1, 2]))
def test_fused_experts_over_expert_and_data_parallel_ranks_are_rebuilt(
    n_ep: int, n_dp: int, experts: int, rows: int, inner_dim: int
) -> None:
    """What FSDP2 itself makes of experts that expert parallelism sharded first, in the checkpoint's tensors, one an expert.

    FSDP2 inside uneven expert shards may contradict its own placements: then a rank refuses, none sends a wrong row.
    """
    shape = (experts, 2 * rows * n_dp, 2 * n_dp)
    whole, name = counted(*shape), "m.mlp.experts.gate_up_proj"
    ranks: list[LocalSources] = []
    for rank in range(n_ep * n_dp):
        with one_of(n_ep * n_dp, rank):
            mesh = mesh_of(n_dp, n_ep)
            module = nn.Module()
            dp, ep = (mesh[axis] for axis in mesh.mesh_dim_names or ())
            module.w = nn.Parameter(distribute_tensor(whole, ep, [Shard(0)], src_data_rank=None))
            fully_shard(module, mesh=dp, shard_placement_fn=lambda _: Shard(inner_dim))
            try:
                ranks.append(sources_of([(name, module.w)], QWEN_MOE))
            except UnsupportedLayout:
                assert inner_dim == 0 and experts % n_ep
                return
    gate, up = whole.chunk(2, dim=1)
    want = {f"m.mlp.experts.{e}.gate_proj.weight": gate[e] for e in range(experts)}
    want |= {f"m.mlp.experts.{e}.up_proj.weight": up[e] for e in range(experts)}
    assert_rebuilt(ranks, want, 1)

"""What the arithmetic of a mesh says that a rank holds is what torch gives to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from weightsync.errors import ConfigError
from weightsync.layout.families import QWEN_MOE
from weightsync.layout.meshes import EngineMesh, Parameter, TrainerMesh, chunk
from weightsync.layout.shards import sources_of

SIZES: dict[str, Any] = dict(
    vocab_size=49,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    moe_intermediate_size=8,
    num_experts=5,
    num_experts_per_tok=2,
)


@contextlib.contextmanager
def rank_of(mesh: TrainerMesh, rank: int) -> Iterator[DeviceMesh]:
    """This process as one rank of a mesh [replicas * shards, experts] whose others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.ranks)
    try:
        shape = (mesh.replicas, mesh.shards) if mesh.replicas > 1 else (mesh.shards, mesh.experts)
        yield init_device_mesh("cpu", shape, mesh_dim_names=(f"outer_{rank}", f"inner_{rank}"))
    finally:
        dist.destroy_process_group()


def parameters_of(model: nn.Module) -> list[Parameter]:
    return [
        Parameter(name, tuple(p.shape), QWEN_MOE.parts(name, tuple(p.shape))) for name, p in model.named_parameters()
    ]


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize("spec", ["fsdp=2", "fsdp=3", "fsdp=7", "hsdp=2x2", "hsdp=2x3"])
def test_it_agrees_with_the_placements_of_a_model_that_fsdp2_sharded(spec: str) -> None:
    """Uneven shards, ranks without any expert: the same holdings, in the same places of the arena, as the live parameters tell."""
    mesh = TrainerMesh.parse(spec)
    for rank in range(mesh.ranks):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, tie_word_embeddings=False))
        said = mesh.layout(parameters_of(model), rank)
        with rank_of(mesh, rank) as devices:
            used = devices if mesh.replicas > 1 else devices[f"outer_{rank}"]
            for layer in model.model.layers:
                fully_shard(layer, mesh=used)
            fully_shard(model, mesh=used)
            assert said.holdings == sources_of(model.named_parameters(), QWEN_MOE).layout(rank).holdings


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize(
    ("spec", "n_experts"), [("fsdp=2,ep=2", 8), ("fsdp=2,ep=3", 9), ("fsdp=2,ep=2", 6), ("fsdp=4,ep=2", 4)]
)
def test_it_agrees_with_fsdp2_inside_expert_parallelism(spec: str, n_experts: int) -> None:
    """Experts of which each rank of the inner axis has a chunk, sharded by FSDP2 over the outer one: torch's own local elements."""
    mesh = TrainerMesh.parse(spec)
    whole = torch.arange(n_experts * 6.0).view(n_experts, 3, 2)
    experts = Parameter("model.layers.0.mlp.experts.gate_up_proj", (n_experts, 3, 2), ())
    for rank in range(mesh.ranks):
        with rank_of(mesh, rank) as devices:
            mine = chunk(range(n_experts), mesh.experts, rank % mesh.experts)
            module = nn.Module()
            local = DTensor.from_local(
                whole[mine.start : mine.stop],
                devices[f"inner_{rank}"],
                [Shard(0)],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            module.weight = nn.Parameter(local)
            fully_shard(module, mesh=devices[f"outer_{rank}"])
            found = module.weight.to_local().detach().reshape(-1)
        held = mesh.held(experts, rank)
        assert found.tolist() == whole.reshape(-1)[held.start : held.stop].tolist()


@given(
    st.builds(TrainerMesh, shards=st.integers(1, 9), replicas=st.integers(1, 3), experts=st.integers(1, 5)),
    st.integers(1, 20),
    st.booleans(),
)
def test_each_replica_holds_each_element_once(mesh: TrainerMesh, rows: int, experts: bool) -> None:
    name = "m.mlp.experts.down_proj" if experts else "m.o_proj.weight"
    parameter = Parameter(name, (rows, 2, 3) if experts else (rows, 3), ())
    hits = np.zeros(rows * (6 if experts else 3), dtype=int)
    for rank in range(mesh.ranks):
        held = mesh.held(parameter, rank)
        hits[held.start : held.stop] += 1
    assert (hits == mesh.replicas).all()


def test_meshes_are_read_as_the_command_line_has_them() -> None:
    assert TrainerMesh.parse("fsdp=16,ep=4") == TrainerMesh(shards=16, experts=4)
    assert TrainerMesh.parse("hsdp=2x32") == TrainerMesh(shards=32, replicas=2)
    assert TrainerMesh.parse("hsdp=2x32").ranks == TrainerMesh.parse("fsdp=16,ep=4").ranks == 64
    assert EngineMesh.parse("tp=8") == EngineMesh(tensor=8)
    assert EngineMesh.parse("tp=8,dp=4,ep") == EngineMesh(tensor=8, data=4, expert_parallel=True)
    assert EngineMesh.parse("tp=8 ep redundant=16").redundant_experts == 16


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        (TrainerMesh, "", "give fsdp=SHARDS or hsdp"),
        (TrainerMesh, "fsdp=8,hsdp=2x4", "give fsdp=SHARDS or hsdp"),
        (TrainerMesh, "hsdp=8", "'hsdp=8' is not understood; write hsdp=2x32"),
        (TrainerMesh, "fsdp=0", "'fsdp=0' is not understood"),
        (TrainerMesh, "fsdp=-1", "not understood"),
        (TrainerMesh, "fsdp=8,fsdp=8", "given twice"),
        (TrainerMesh, "tp=8", "'tp' is not an axis or is given twice; axes are ep, fsdp, hsdp"),
        (EngineMesh, "ep", "give tp=RANKS"),
        (EngineMesh, "tp=8,ep=4", "'ep=4' is not understood; write ep"),
        (EngineMesh, "tp=8,redundant=4", "redundant experts need expert parallelism: add ,ep"),
    ],
)
def test_a_mesh_that_is_not_understood_is_refused_with_the_way_to_write_it(kind: Any, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kind.parse(text)

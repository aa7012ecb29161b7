"""What ranks say they hold, put together, is the checkpoint that the model itself would save."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import dense, family_of, qwen3_moe
from weightsync.layout.shards import LocalSources, sources_of

SIZES: dict[str, Any] = dict(
    vocab_size=49,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
MOE: dict[str, Any] = dict(moe_intermediate_size=8, head_dim=8, num_experts=5, num_experts_per_tok=2)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama, attention bias": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE, tie_word_embeddings=False)),
}


@contextlib.contextmanager
def one_of(n_ranks: int, rank: int) -> Iterator[None]:
    """This process as one rank of many that are not there: placements and shards are real, collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh whose dims are named after this rank: torch interns equal meshes, with the first one's coordinate."""
    return init_device_mesh(
        "cpu", shape, mesh_dim_names=tuple(f"dim{i}_of_{dist.get_rank()}" for i in range(len(shape)))
    )


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    return MODELS[name]().bfloat16()


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """FSDP2 as trainers apply it: every layer, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local_sources(model: PreTrainedModel) -> LocalSources:
    return sources_of(model.named_parameters(), family_of(model.config.to_dict()))


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def gather(ranks: list[LocalSources]) -> dict[str, Tensor]:
    """The checkpoint from every rank's pieces; each element must come from exactly one rank."""
    whole = {t.name: torch.zeros(t.numel, dtype=torch.bfloat16) for t in ranks[0].tensors}
    hits = {t.name: torch.zeros(t.numel, dtype=torch.int) for t in ranks[0].tensors}
    for local in ranks:
        for piece in local.pieces:
            whole[piece.name][piece.start : piece.stop] = piece.flat()
            hits[piece.name][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in hits.values())
    return {t.name: whole[t.name].reshape(t.shape) for t in ranks[0].tensors}


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(want)
    for name, tensor in want.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.failure_mode(5)
@pytest.mark.parametrize("name", MODELS)
def test_a_family_gives_the_names_shapes_and_bytes_that_the_model_saves(name: str, tmp_path: Path) -> None:
    model = build(name)
    assert_same(gather([local_sources(model)]), saved(model, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert [t.name for t in sources_of(model.named_parameters(), family_of(config)).tensors] == [
        t.name for t in local_sources(model).tensors
    ], "the mapping must follow from config.json as from the live model"


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize("n_ranks", [2, 3, 7])
@pytest.mark.parametrize("name", ["llama, tied", "qwen3_moe"])
def test_uneven_fsdp2_shards_of_all_ranks_make_the_checkpoint(name: str, n_ranks: int, tmp_path: Path) -> None:
    """1. shards are uneven, with seven ranks some hold no expert; 2. together they are what save_pretrained writes."""
    want = saved(build(name), tmp_path)
    ranks = []
    for rank in range(n_ranks):
        with one_of(n_ranks, rank):
            model = build(name)
            shard(model, mesh_of(n_ranks))
            ranks.append(local_sources(model))
    assert len({local.arena_numel for local in ranks}) > 1
    if name == "qwen3_moe" and n_ranks == 7:
        assert not any("experts" in piece.name for piece in ranks[-1].pieces)
    assert_same(gather(ranks), want)


def test_hsdp_replicas_hold_the_same_pieces(tmp_path: Path) -> None:
    want = saved(build("llama, tied"), tmp_path)
    ranks = []
    for rank in range(4):
        with one_of(4, rank):
            model = build("llama, tied")
            shard(model, mesh_of(2, 2))
            ranks.append(local_sources(model))
    assert ranks[0].layout(0).holdings == ranks[2].layout(2).holdings
    assert ranks[1].layout(1).holdings == ranks[3].layout(3).holdings
    assert_same(gather(ranks[:2]), want)
    assert_same(gather(ranks[2:]), want)


def test_the_arena_has_no_gaps_and_the_layout_says_where_each_piece_is() -> None:
    with one_of(3, 1):
        model = build("qwen3_moe")
        shard(model, mesh_of(3))
        local = local_sources(model)
    ends = [0]
    for piece, holding in zip(local.pieces, local.layout(1).holdings, strict=True):
        assert piece.local_offset == ends[-1]
        assert (holding.name, holding.start, holding.stop, holding.local_offset) == (
            piece.name,
            piece.start,
            piece.stop,
            piece.local_offset,
        )
        assert piece.flat().numel() == piece.stop - piece.start
        ends.append(piece.local_offset + piece.stop - piece.start)
    assert ends[-1] == local.arena_numel
    assert local.layout(1).rank == 1
    assert local.layout(1).tensors == local.tensors


def test_a_piece_shows_what_the_optimizer_made_of_the_parameter() -> None:
    with one_of(2, 1):
        model = build("llama, tied").float()
        shard(model, mesh_of(2))
        local = local_sources(model)
        piece = next(p for p in local.pieces if p.name == "model.norm.weight")
        before = piece.flat().clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.25)
        assert piece.flat().dtype == torch.float32
        assert not piece.flat().requires_grad
        assert torch.equal(piece.flat(), before - 0.25)
    assert all(t.dtype == "bfloat16" for t in local.tensors), (
        "announced in the checkpoint's dtype, whatever the master's"
    )


def test_plain_and_replicated_tensors_are_held_whole_by_every_rank() -> None:
    with one_of(2, 1):
        mesh = mesh_of(2)
        plain = nn.Parameter(torch.ones(4, 3))
        copied = DTensor.from_local(torch.ones(5), mesh, [Replicate()], run_check=False)
        local = sources_of([("plain", plain), ("copied", copied)], dense)
    assert [(p.name, p.start, p.stop) for p in local.pieces] == [("plain", 0, 12), ("copied", 0, 5)]


def test_a_rank_outside_a_tensors_mesh_holds_nothing_of_it() -> None:
    with one_of(4, 3), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mesh = DeviceMesh("cpu", [0, 1])
        shard_of_others = DTensor.from_local(
            torch.ones(0, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
        )
        local = sources_of([("w", shard_of_others)], dense)
    assert (local.pieces, local.arena_numel) == ((), 0)
    assert [t.shape for t in local.tensors] == [(4, 3)]


@pytest.mark.parametrize("placements", [[Shard(1)], [Partial()]])
def test_a_placement_that_cannot_be_pushed_is_refused_by_name(placements: list) -> None:
    with one_of(2, 0):
        tensor = DTensor.from_local(torch.ones(4, 3), mesh_of(2), placements, run_check=False)
        with pytest.raises(UnsupportedLayout, match=r"layer\.w has placements .*(Shard\(dim=1\)|Partial)"):
            sources_of([("layer.w", tensor)], dense)


def test_a_tensor_sharded_twice_is_refused() -> None:
    with one_of(4, 0):
        mesh = mesh_of(2, 2)
        tensor = DTensor.from_local(torch.ones(1, 3), mesh, [Shard(0), Shard(0)], run_check=False)
        with pytest.raises(UnsupportedLayout, match="one Shard"):
            sources_of([("w", tensor)], dense)


@pytest.mark.failure_mode(6)
def test_a_shard_that_is_not_what_torch_chunk_gives_is_refused_with_both_sizes() -> None:
    """Seven rows over two ranks are four and three; a rank with five would be read at the wrong rows."""
    with one_of(2, 0):
        mesh = mesh_of(2)
        tensor = DTensor.from_local(
            torch.ones(5, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((7, 3)), stride=(3, 1)
        )
        with pytest.raises(
            UnsupportedLayout, match=r"w: this rank has 15 elements .*, want 12 contiguous ones of \[7, 3\]"
        ):
            sources_of([("w", tensor)], dense)


def test_a_parameter_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(UnsupportedLayout, match=r"w: this rank has 12 elements \(strides \(1, 4\)\)"):
        sources_of([("w", torch.ones(3, 4).t())], dense)


def test_two_parameters_for_one_checkpoint_tensor_are_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="w and another parameter both hold w: if they are tied, omit one"):
        sources_of([("w", torch.ones(3)), ("w", torch.ones(3))], dense)


def test_a_tied_head_that_is_listed_after_all_is_omitted() -> None:
    family = family_of({"model_type": "qwen2", "tie_word_embeddings": True})
    embed = torch.ones(3, 2)
    local = sources_of([("model.embed_tokens.weight", embed), ("lm_head.weight", embed)], family)
    assert [t.name for t in local.tensors] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("shape", "match"),
    [((4, 6), "fused experts have three dims"), ((4, 7, 6), "has 7 rows an expert")],
)
def test_fused_experts_of_another_shape_are_refused(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(UnsupportedLayout, match=match):
        qwen3_moe("model.layers.0.mlp.experts.gate_up_proj", shape)


def test_an_unknown_model_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnsupportedLayout, match=r"model_type 'gpt_oss' has no mapping; known are .*llama.*qwen3_moe"):
        family_of({"model_type": "gpt_oss"})

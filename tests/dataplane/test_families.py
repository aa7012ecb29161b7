"""A family's mapping gives the names, shapes, dtypes and bytes that the model itself saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.dataplane.family_makers import MODELS, build, config_json, saved
from tests.dataplane.rank_makers import all_ranks, assert_same, ep_fsdp, fsdp, gather, holders, sources_of_model
from weightsync.errors import UnsupportedLayout
from weightsync.layout.families import DENSE, QWEN_MOE, ROUTER_BIAS_MOE, family_of
from weightsync.layout.shards import named_tensors, sources_of
from weightsync.preflight import ARCHITECTURES


@pytest.mark.failure_mode(9)
@pytest.mark.failure_mode(5)
@pytest.mark.parametrize("name", MODELS)
def test_a_family_gives_what_the_model_saves(name: str, tmp_path: Path) -> None:
    """1. fp32 masters, rounded to each tensor's dtype, are the saved bytes; 2. config.json says as much as the live model.

    Without `Family.fp32` the router's bias arrives rounded to bf16, without buffers it does not arrive; each was seen to fail.
    """
    model = build(name)
    want = saved(model, tmp_path)
    assert_same(gather([sources_of_model(model)]), want)
    from_file = sources_of(named_tensors(model), family_of(config_json(tmp_path)))
    assert from_file.tensors == sources_of_model(model).tensors
    assert config_json(tmp_path)["architectures"][0] in ARCHITECTURES


@pytest.mark.failure_mode(6)
@pytest.mark.parametrize("parallelize", [fsdp, ep_fsdp])
@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v3"])
def test_ranks_together_hold_what_the_model_saves(name: str, parallelize, tmp_path: Path) -> None:
    want = saved(build(name), tmp_path)
    ranks = all_ranks(lambda: build(name), 4, parallelize)
    assert_same(gather(ranks), want)
    shared = {name for name, count in holders(ranks).items() if count > 1}
    assert shared == {"model.layers.1.mlp.gate.e_score_correction_bias"}, "a buffer, which FSDP shards nowhere"


def test_buffers_that_a_checkpoint_leaves_out_are_not_sent() -> None:
    names = [name for name, _ in named_tensors(build("deepseek_v3"))]
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert not any("inv_freq" in name for name in names)


def test_wrappers_of_a_trainer_do_not_change_names() -> None:
    """Activation checkpointing and torch.compile rename what they wrap."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("llama, tied")
    plain = sources_of_model(model).tensors
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert sources_of_model(model).tensors == plain


def test_two_parameters_for_one_checkpoint_tensor_are_refused() -> None:
    with pytest.raises(UnsupportedLayout, match="w and another parameter both hold w: if they are tied, omit one"):
        sources_of([("w", torch.ones(3)), ("w", torch.ones(3))], DENSE)


@pytest.mark.failure_mode(5)
def test_a_tied_head_that_is_listed_after_all_is_omitted() -> None:
    family = family_of({"model_type": "qwen2", "tie_word_embeddings": True})
    embed = torch.ones(3, 2)
    local = sources_of([("model.embed_tokens.weight", embed), ("lm_head.weight", embed)], family)
    assert [t.name for t in local.tensors] == ["model.embed_tokens.weight"]


def test_a_tied_parameter_is_listed_once() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    model.b.weight = model.a.weight
    assert [name for name, _ in named_tensors(model)] == ["a.weight"]


def test_experts_that_the_module_does_not_fuse_keep_their_names() -> None:
    """transformers 4, and trainers that hold one matrix an expert."""
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    assert QWEN_MOE.parts(name, (8, 16)) == ((name, (8, 16), 0),)


@pytest.mark.parametrize(
    ("shape", "match"),
    [((4, 6), "fused experts have three dims"), ((4, 7, 6), "has 7 rows an expert: gate_proj and up_proj must be")],
)
def test_fused_experts_of_another_shape_are_refused(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(UnsupportedLayout, match=match):
        ROUTER_BIAS_MOE.parts("model.layers.0.mlp.experts.gate_up_proj", shape)


def test_an_unknown_model_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        UnsupportedLayout, match="model_type 'gpt_oss' has no mapping; known are deepseek_v3, deepseek_v32, glm4_moe"
    ):
        family_of({"model_type": "gpt_oss"})

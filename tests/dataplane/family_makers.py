"""Tiny random models of every family that has a mapping, as trainers hold them, and what the models themselves save of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = dict(
    vocab_size=49,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
_QWEN_MOE = dict(moe_intermediate_size=8, head_dim=8, num_experts=5, num_experts_per_tok=2)
_ROUTED = dict(
    moe_intermediate_size=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)
_MLA = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8)
_INDEXER = dict(index_topk=4, index_head_dim=8, index_n_heads=2)
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama, attention bias": ("llama", dict(attention_bias=True)),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", _QWEN_MOE),
    "qwen3_moe, layer 0 dense": ("qwen3_moe", dict(**_QWEN_MOE, mlp_only_layers=[0])),
    "glm4_moe": ("glm4_moe", dict(**_ROUTED, head_dim=8, attention_bias=True, use_qk_norm=True)),
    "glm_moe_dsa": ("glm_moe_dsa", {**_ROUTED, **_MLA, **_INDEXER}),
    "deepseek_v3": ("deepseek_v3", {**_ROUTED, **_MLA}),
    "deepseek_v3, q whole": ("deepseek_v3", {**_ROUTED, **_MLA, "q_lora_rank": None}),
    "deepseek_v32": ("deepseek_v32", {**_ROUTED, **_MLA, **_INDEXER}),
}
"""Model type, and what its config has besides SIZES."""


def build(name: str, **changes: Any) -> PreTrainedModel:
    """The model with fp32 masters; no element is representable in bf16, the router's bias included."""
    model_type, sizes = MODELS[name]
    return randomized(model_type, **{**SIZES, **sizes, **changes})


def randomized(model_type: str, **sizes: Any) -> PreTrainedModel:
    """A model whose parameters and persistent buffers are random, the same each time."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05)
    return model


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What the model writes once it is in bf16 as transformers loads it, by name; the files stay in `folder`."""
    model.save_pretrained(folder / "masters")
    AutoModelForCausalLM.from_pretrained(folder / "masters", dtype=torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())

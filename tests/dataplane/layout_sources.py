"""The rows, columns and sheets of docs/layouts.md: how trainers shard, how engines are parallel, what engines store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.dataplane.family_makers import randomized, saved
from tests.dataplane.rank_makers import Parallelize, cp_fsdp, ep, ep_fsdp, fsdp, mesh_of, tp_fsdp
from tests.fixtures.models import quantize_checkpoint

_SIZES: dict[str, Any] = dict(
    vocab_size=500,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
"""Sizes that vLLM takes in FP8 at TP 2: each rank has whole blocks. The vocabulary is padded to 512."""
_QWEN = ("qwen3_moe", {**_SIZES, "num_experts": 4})
_ROUTED = dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1)
_PREDICTS = dict(num_nextn_predict_layers=1)
"""As published: the checkpoint has a layer more (MTP), which neither the trainer's module nor the engine's main model has."""
_MLA = dict(q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64)
_NOAUX = dict(topk_method="noaux_tc", scoring_func="sigmoid")
"""As published; without it vLLM's router has no bias."""
FORMATS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bf16": _QWEN,
    "bf16, dense and tied": ("llama", {**_SIZES, "tie_word_embeddings": True}),
    "fp32 router": ("glm4_moe", {**_SIZES, **_ROUTED, **_PREDICTS, "use_qk_norm": True}),
    "fp32 router, MLA": ("deepseek_v3", {**_SIZES, **_ROUTED, **_PREDICTS, **_MLA, **_NOAUX}),
    "fp8": _QWEN,
    "fp8 ue8m0": _QWEN,
}
"""What engines store: the model type and sizes by which it is tried."""
TRANSFER = {"fp8": "fp8-128x128", "fp8 ue8m0": "fp8-128x128-ue8m0"}
"""`transfer.format` of the contract; auto where it is not named."""
SOURCES: Mapping[str, tuple[int, Parallelize]] = {
    "plain": (1, lambda model: None),
    "fsdp 2": (2, fsdp),
    "fsdp 3": (3, fsdp),
    "hsdp 2x2": (4, lambda model: fsdp(model, mesh_of(2, 2))),
    "ep 2": (2, ep),
    "ep 2 x fsdp 2": (4, ep_fsdp),
    "ep 2 x fsdp 2, rows of experts": (4, lambda model: ep_fsdp(model, inner_dim=1)),
    "cp 2 x fsdp 2": (4, cp_fsdp),
    "tp 2 x fsdp 2": (4, tp_fsdp),
}
"""Ranks, and how a trainer shards its model over them."""


MTP = {
    f"model.layers.{_SIZES['num_hidden_layers']}.{name}.weight": shape
    for name, shape in {"eh_proj": (256, 512), "enorm": (256,), "hnorm": (256,), "shared_head.norm": (256,)}.items()
}


@dataclasses.dataclass(frozen=True)
class Target:
    """How an engine is parallel."""

    n_ranks: int
    expert_parallel: bool = False


TARGETS: Mapping[str, Target] = {
    "tp 1": Target(1),
    "tp 2": Target(2),
    "tp 2 + ep 2": Target(2, expert_parallel=True),
}


def has_experts(format_: str) -> bool:
    """Without them there is no expert parallelism on either side: vLLM refuses it."""
    return FORMATS[format_][0] != "llama"


def cells() -> Iterator[tuple[str, str, str]]:
    """(source, target, format) of every cell that there is."""
    for format_ in FORMATS:
        for source in SOURCES:
            for target in TARGETS:
                if has_experts(format_) or not ("ep 2" in source or TARGETS[target].expert_parallel):
                    yield source, target, format_


def is_refused(source: str, format_: str) -> bool:
    """FP8 blocks need whole rows; tensor parallelism of a trainer parts those of output and down projections."""
    return format_ in TRANSFER and source.startswith("tp 2")


def make_model(format_: str) -> PreTrainedModel:
    """What the trainer holds: fp32 masters, the same each time."""
    model_type, sizes = FORMATS[format_]
    return randomized(model_type, **sizes)


def write_checkpoints(folder: Path) -> None:
    """FOLDER/FORMAT: what a trainer would save of the same masters, in each format."""
    for format_ in FORMATS:
        plain = folder / "plain" / format_
        saved(make_model(format_), plain if format_ in TRANSFER else folder / format_)
        if format_ in TRANSFER:
            quantize_checkpoint(plain, folder / format_, ue8m0=format_.endswith("ue8m0"))
        if "num_nextn_predict_layers" in FORMATS[format_][1]:
            save_file({name: torch.ones(shape) for name, shape in MTP.items()}, folder / format_ / "mtp.safetensors")

"""Where a trainer's module differs from its checkpoint: which checkpoint tensors a module's parameter is made of.

A parameter is one contiguous tensor; each of its checkpoint tensors is a contiguous range of its elements. Standard
library and records only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from weightsync.errors import UnsupportedLayout
from weightsync.layout.records import Shape

Parts = tuple[tuple[str, Shape, int], ...]
"""(checkpoint name, its shape, its first element within the parameter), in that order."""

Family = Callable[[str, Shape], Parts]
"""Maps a parameter's name and whole shape to the checkpoint tensors in it; none if the checkpoint leaves it out."""

_FUSED_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<kind>gate_up_proj|down_proj)")


def dense(name: str, shape: Shape) -> Parts:
    """Llama, Qwen2, Qwen3: the parameter is the checkpoint's tensor."""
    return ((name, shape, 0),)


def qwen3_moe(name: str, shape: Shape) -> Parts:
    """Qwen3-MoE: dense but for its experts.

    transformers 5 fuses them as gate_up_proj [E, 2I, H] and down_proj [E, H, I]; a checkpoint has one tensor an expert.
    """
    found = _FUSED_EXPERTS.fullmatch(name)
    if found is None:
        return dense(name, shape)
    if len(shape) != 3:
        raise UnsupportedLayout(f"{name} has shape {list(shape)}: fused experts have three dims, experts first")
    n_experts, rows, columns = shape
    if found["kind"] == "down_proj":
        kinds = ("down_proj",)
    elif rows % 2 == 0:
        kinds = ("gate_proj", "up_proj")
    else:
        raise UnsupportedLayout(f"{name} has {rows} rows an expert: gate and up must be halves of it")
    part = (rows // len(kinds), columns)
    return tuple(
        (f"{found['prefix']}.{expert}.{kind}.weight", part, (expert * len(kinds) + i) * math.prod(part))
        for expert in range(n_experts)
        for i, kind in enumerate(kinds)
    )


_BY_MODEL_TYPE: Mapping[str, Family] = {
    "llama": dense,
    "qwen2": dense,
    "qwen3": dense,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": qwen3_moe,
    "glm4_moe": qwen3_moe,
    "glm_moe_dsa": qwen3_moe,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The mapping for a model, from its config.json. Raises UnsupportedLayout naming the model types that are known."""
    model_type = str(config.get("model_type"))
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedLayout(
            f"model_type {model_type!r} has no mapping; known are {', '.join(sorted(_BY_MODEL_TYPE))}"
        )
    family = _BY_MODEL_TYPE[model_type]
    return _without_tied_head(family) if config.get("tie_word_embeddings") else family


def _without_tied_head(family: Family) -> Family:
    def mapped(name: str, shape: Shape) -> Parts:
        return () if name == "lm_head.weight" else family(name, shape)

    return mapped

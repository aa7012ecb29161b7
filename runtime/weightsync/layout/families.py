"""Where a trainer's module differs from its checkpoint: which checkpoint tensors a module's tensor is made of, and their dtypes.

A tensor of the module is contiguous; each of its checkpoint tensors is a contiguous range of its elements. Standard library and
records only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from weightsync.errors import UnsupportedLayout
from weightsync.layout.records import Shape

Parts = tuple[tuple[str, Shape, int], ...]
"""(checkpoint name, its shape, its first element within the module's tensor), in that order."""

_FUSED_EXPERTS = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<kind>\w+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How models of one kind are written to a checkpoint."""

    fused_experts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """What transformers 5 fuses under `mlp.experts`: its name to the projections in it. [E, rows, columns], experts first, the
    projections of an expert one behind the other along its rows; a checkpoint has one tensor an expert and projection."""
    fp32: frozenset[str] = frozenset()
    """Last part of the name of tensors that a checkpoint holds as fp32, whatever its dtype."""
    tied_head: bool = False
    """The checkpoint leaves `lm_head.weight` out: it is the embedding."""

    def parts(self, name: str, shape: Shape) -> Parts:
        """The checkpoint tensors in a module's tensor of whole shape `shape`; none if the checkpoint leaves it out.

        Raises UnsupportedLayout for fused experts of another shape.
        """
        if self.tied_head and name == "lm_head.weight":
            return ()
        found = _FUSED_EXPERTS.fullmatch(name)
        if found is None or found["kind"] not in self.fused_experts:
            return ((name, shape, 0),)
        return _experts(name, shape, found["prefix"], self.fused_experts[found["kind"]])

    def dtype(self, name: str, dtype: str) -> str:
        """Of a checkpoint tensor, in a checkpoint of `dtype`."""
        return "float32" if name.rpartition(".")[2] in self.fp32 else dtype


def _experts(name: str, shape: Shape, prefix: str, projections: tuple[str, ...]) -> Parts:
    if len(shape) != 3:
        raise UnsupportedLayout(f"{name} has shape {list(shape)}: fused experts have three dims, experts first")
    n_experts, rows, columns = shape
    if rows % len(projections):
        raise UnsupportedLayout(
            f"{name} has {rows} rows an expert: {' and '.join(projections)} must be equal parts of it"
        )
    part = (rows // len(projections), columns)
    return tuple(
        (f"{prefix}.{expert}.{projection}.weight", part, (expert * len(projections) + i) * math.prod(part))
        for expert in range(n_experts)
        for i, projection in enumerate(projections)
    )


DENSE = Family()
QWEN_MOE = Family(fused_experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
ROUTER_BIAS_MOE = dataclasses.replace(QWEN_MOE, fp32=frozenset({"e_score_correction_bias"}))
"""DeepSeek-V3 and GLM: besides fused experts a router's bias, which the module keeps as an fp32 buffer. Shared experts, MLA and
the indexer of sparse attention have the checkpoint's names. Layers that predict further tokens (MTP) are in published checkpoints,
not in the module: a trainer does not hold them, and an engine that wants them is refused by name."""

_BY_MODEL_TYPE: Mapping[str, Family] = {
    "deepseek_v3": ROUTER_BIAS_MOE,
    "deepseek_v32": ROUTER_BIAS_MOE,
    "glm4_moe": ROUTER_BIAS_MOE,
    "glm_moe_dsa": ROUTER_BIAS_MOE,
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "qwen3_moe": QWEN_MOE,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The mapping for a model, from its config.json. Raises UnsupportedLayout naming the model types that are known."""
    model_type = str(config.get("model_type"))
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedLayout(
            f"model_type {model_type!r} has no mapping; known are {', '.join(sorted(_BY_MODEL_TYPE))}"
        )
    return dataclasses.replace(_BY_MODEL_TYPE[model_type], tied_head=bool(config.get("tie_word_embeddings")))

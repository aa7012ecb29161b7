"""Tensors of a Qwen3-30B-A3B layer (Hugging Face config of Qwen/Qwen3-30B-A3B), as an engine at TP 1 stores them in FP8."""

from __future__ import annotations

HIDDEN, EXPERTS, INTERMEDIATE = 2048, 128, 768
EXPERT_SHAPES = {"w13": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "w2": (EXPERTS, HIDDEN, INTERMEDIATE)}
MATRICES = {"q": (4096, HIDDEN), "k": (512, HIDDEN), "v": (512, HIDDEN), "o": (HIDDEN, 4096)}
"""Attention's projections."""
PLAIN = {"input_norm": 2048, "post_norm": 2048, "q_norm": 128, "k_norm": 128, "router": EXPERTS * HIDDEN}
"""Elements that stay bf16."""
LAYERS = 48

"""Run by test_trace_vllm in a process of its own: `python -m tests.dataplane.vllm_trace_probe MODEL FOLDER`.

Starts vLLM's CPU build on a tiny random model, in this one process; traces the live model's loader; loads random weights by
the loader, then by a plan executed on poisoned parameters; prints what it found as JSON on its last line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")

SIZES: dict[str, Any] = dict(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MOE: dict[str, Any] = dict(head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE)),
}


def main(name: str, folder: str) -> None:
    import torch

    MODELS[name]().bfloat16().save_pretrained(folder)
    from weightsync.vllm.plugin import register

    register()
    from vllm import LLM

    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, dtype="bfloat16")
    model: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model  # type: ignore[attr-defined]
    with torch.no_grad():
        print(json.dumps(compare(model, folder)))


def compare(model: Any, folder: str) -> dict[str, Any]:
    """The trace's figures, and the parameters in which a push differs from a load."""
    import torch

    from tests.dataplane.toy_models import POISON, chunked, execute
    from weightsync.plan import make_plan
    from weightsync.vllm.worker import checkpoint_sources, trace_model

    sources = checkpoint_sources(folder)
    params = {name: parameter.data for name, parameter in model.named_parameters()}
    before = {name: param.clone() for name, param in params.items()}
    started = time.perf_counter()
    layout = trace_model(model, sources)
    trace_s = time.perf_counter() - started
    written = [name for name, param in params.items() if not torch.equal(param, before[name])]

    weights = {s.name: torch.randn(s.shape).bfloat16() for s in sources}
    for param in params.values():
        param.view(torch.int16).fill_(POISON)
    model.load_weights(weights.items())
    loaded = {name: param.clone() for name, param in params.items()}
    for param in params.values():
        param.view(torch.int16).fill_(POISON)
    for fill in layout.fills:
        params[fill.target].view(torch.int16).view(-1)[fill.offset : fill.offset + fill.numel] = fill.value_bits
    layouts = chunked(sources, 3)
    execute(make_plan(layouts, layout), layouts, weights, params)
    differing = [
        n for n, param in params.items() if not torch.equal(param.view(torch.int16), loaded[n].view(torch.int16))
    ]
    return {
        "written_by_trace": written,
        "differing": differing,
        "parameters": sorted(params),
        "targets": sorted(t.name for t in layout.targets),
        "sources": len(sources),
        "copies": len(layout.copies),
        "fills": sum(fill.numel for fill in layout.fills),
        "unused": list(layout.unused),
        "trace_s": trace_s,
        "digest": layout.digest(),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

"""Entry point of `vllm.general_plugins`: called in every process of vLLM before a model is built, sometimes twice.

On the CPU build it keeps live parameters in the layout that the loader wrote, which is also a GPU's. vLLM would otherwise
repack linear weights for oneDNN or SGL kernels, and leave empty parameters behind (vllm/_custom_ops.py,
vllm/model_executor/layers/utils.py), and experts into tiles of the same size (fused_moe/experts/cpu_moe.py). Here the experts
are packed at each call instead: slow, and right after a push.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from weightsync.config import Contract


def register() -> None:
    """Prepare this process; safe to repeat."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _keep_load_layout()
    if "WEIGHTSYNC_CONFIG" in os.environ and Contract.load().transfer.commit == "staged":
        _stage_when_loaded()


def _stage_when_loaded() -> None:
    """Have each worker take its staging memory as the last step of loading: vLLM measures what is free only afterwards.

    The worker extension has no part in loading, and its RPCs come when the KV cache has taken the memory (failure mode 52).
    """
    from vllm.v1.worker.gpu_worker import Worker  # the CPU's worker inherits `load_model`

    load_model = Worker.load_model
    if getattr(load_model, "stages", False):
        return

    def load_and_stage(self: Any, *, load_dummy_weights: bool = False) -> None:
        load_model(self, load_dummy_weights=load_dummy_weights)
        if hasattr(self, "weightsync_stage"):
            self.weightsync_stage()

    load_and_stage.stages = True
    Worker.load_model = load_and_stage


def _keep_load_layout() -> None:
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layer_utils

    cpu_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")

    custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = _no_repacked_kernel
    if cpu_moe.cpu_fused_moe is not _pack_and_run:
        cpu_moe.cpu_fused_moe = _pack_and_run
        # `_pad_moe_intermediate` still changes shapes that the kernel cannot take; the receiver's probe refuses those by name.
        cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = (
            cpu_moe.CPUUnquantizedExperts._pad_moe_intermediate
        )


def _no_repacked_kernel(*_: object, **__: object) -> bool:
    return False


def _pack_and_run(output: Any, hidden: Any, w13: Any, w2: Any, *rest: Any) -> None:
    """`cpu_fused_moe` on weights in load layout; `rest` ends with (..., activation, isa, skip_weighted)."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = rest[-2]
    cpu_fused_moe(output, hidden, cpu_prepack_moe_weight(w13, isa), cpu_prepack_moe_weight(w2, isa), *rest)

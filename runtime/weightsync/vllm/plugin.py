"""Entry point of `vllm.general_plugins`: called in every process of vLLM before a model is built, sometimes twice.

On the CPU build it keeps live parameters in the layout that the loader wrote, which is also a GPU's. vLLM would otherwise
repack the weights of linear layers for oneDNN or SGL kernels and leave empty parameters behind (vllm/_custom_ops.py,
vllm/model_executor/layers/utils.py), and nothing could be written into them.
"""

from __future__ import annotations

import os


def register() -> None:
    """Prepare this process; safe to repeat."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _keep_load_layout()


def _keep_load_layout() -> None:
    os.environ["VLLM_CPU_MOE_PREPACK"] = "0"
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layer_utils

    custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = _no_repacked_kernel


def _no_repacked_kernel(*_: object, **__: object) -> bool:
    return False

"""Entry point of `vllm.general_plugins`: called in every process of vLLM before a model is built, sometimes twice.

It registers `weightsync` as a backend of vLLM's own weight transfer, for engines and for trainers, and has engines that need the
worker extension get it without a flag, so that this package and VLLM_PLUGINS are all that a plain `vllm serve` needs.

On the CPU build it keeps live parameters in the layout that the loader wrote, which is also a GPU's. vLLM would otherwise
repack linear weights for oneDNN or SGL kernels, and leave empty parameters behind (vllm/_custom_ops.py,
vllm/model_executor/layers/utils.py), and experts into tiles of the same size (fused_moe/experts/cpu_moe.py). Here the experts
are packed at each call instead: slow, and right after a push; and latent attention uses the backend that reads `kv_b_proj`
(CPU_MLA), where AMX_MLA would pack it away. With WEIGHTSYNC_CPU_KERNELS=vllm in the environment vLLM has its way, and those
modules are replayed.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from typing import Any

import torch

from weightsync.vllm.ranks import require_one_client

BACKEND = "weightsync"
"""`--weight-transfer-config '{"backend": "weightsync"}'`"""
WORKER_EXTENSION = "weightsync.vllm.worker.WorkerExtension"
CPU_KERNELS = "WEIGHTSYNC_CPU_KERNELS"
"""`vllm`: leave vLLM's CPU kernels as they are, faster, and have what they repack replayed."""

logger = logging.getLogger(__name__)

_done: set[str] = set()
"""What was registered in this process."""


def register() -> None:
    """Prepare this process; safe to repeat."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _ask_for_amx()
        if os.environ.get(CPU_KERNELS, "") != "vllm":
            _keep_load_layout()
    if "staging" not in _done and "WEIGHTSYNC_CONFIG" in os.environ:
        _stage_when_loaded()
        _done.add("staging")
    if "backend" not in _done:
        _register_backend()
        _done.add("backend")
    # Who builds an engine's configuration has imported this module; other processes are sent the finished configuration.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if "extension" not in _done and hasattr(arguments, "EngineArgs"):
        _extend_workers(arguments.EngineArgs)  # type: ignore[union-attr]
        _done.add("extension")


def _stage_when_loaded() -> None:
    """Have each worker take its memory for pushes as the last step of loading: vLLM measures what is free only afterwards.

    The worker extension has no part in loading, and its RPCs come when the KV cache has taken the memory (failure mode 52).
    """
    from vllm.v1.worker.gpu_worker import Worker  # the CPU's worker inherits `load_model`

    load_model = Worker.load_model

    def load_and_stage(self: Any, *, load_dummy_weights: bool = False) -> None:
        load_model(self, load_dummy_weights=load_dummy_weights)
        if hasattr(self, "weightsync_stage"):
            self.weightsync_stage()

    Worker.load_model = load_and_stage


def _register_backend() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    WeightTransferEngineFactory.register_engine(BACKEND, "weightsync.vllm.transfer", "WeightSyncTransferEngine")
    WeightTransferTrainerFactory.register_engine(BACKEND, "weightsync.vllm.trainer", "WeightSyncTrainer")


def _extend_workers(engine_args: Any) -> None:
    """Engines of a session, and those with this backend, get the worker extension unless the command line names one.

    One that could not commit as a whole is refused before it loads (ConfigError).
    """
    build = engine_args.create_engine_config

    @functools.wraps(build)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        native = getattr(self.weight_transfer_config, "backend", None) == BACKEND
        in_session = "WEIGHTSYNC_CONFIG" in os.environ
        if not self.worker_extension_cls and (native or in_session):
            self.worker_extension_cls = WORKER_EXTENSION
        config = build(self, *args, **kwargs)
        if in_session:
            require_one_client(config.parallel_config)
        return config

    engine_args.create_engine_config = create_engine_config


def _ask_for_amx() -> None:
    """Linux kills who uses AMX tiles without having asked (arch_prctl, ARCH_REQ_XCOMP_PERM), once for a process.

    oneDNN and torch ask before their own; vLLM's attention uses tiles and asks nobody (csrc/cpu). A model small enough to have all
    its matrices in SGL's kernels reaches it first, and dies of an illegal instruction at its first long request.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        logger.warning("Linux refuses this process the CPU's AMX tiles; vLLM's attention may die of an illegal instruction")


def _keep_load_layout() -> None:
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layer_utils

    cpu_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")

    custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = _no_repacked_kernel
    if "attention" not in _done:
        _prefer_cpu_mla()
        _done.add("attention")
    if cpu_moe.cpu_fused_moe is not _pack_and_run:
        cpu_moe.cpu_fused_moe = _pack_and_run
        # `_pad_moe_intermediate` still changes shapes that the kernel cannot take; the receiver's probe refuses those by name.
        cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = (
            cpu_moe.CPUUnquantizedExperts._pad_moe_intermediate
        )


def _prefer_cpu_mla() -> None:
    """In the configuration, of which vLLM derives the block size and what else the backend wants; an explicit one stays."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    complete = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        attention = vllm_config.attention_config
        if attention.backend is None and getattr(vllm_config.model_config, "use_mla", False):
            attention.backend = AttentionBackendEnum.CPU_MLA
        complete(cls, vllm_config)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]


def _no_repacked_kernel(*_: object, **__: object) -> bool:
    return False


def _pack_and_run(output: Any, hidden: Any, w13: Any, w2: Any, *rest: Any) -> None:
    """`cpu_fused_moe` on weights in load layout; `rest` ends with (..., activation, isa, skip_weighted)."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = rest[-2]
    cpu_fused_moe(output, hidden, cpu_prepack_moe_weight(w13, isa), cpu_prepack_moe_weight(w2, isa), *rest)

"""Engines without processes of their own: `python -m tests.dataplane.layout_targets FOLDER FORMAT...`, run by test_layouts.

For every rank of every target and each checkpoint FOLDER/FORMAT it builds vLLM's own model on torch's fake process group,
traces its loader, loads the checkpoint, and leaves FOLDER/FORMAT-TARGET-RANK.pt: the layout, and the bytes of each parameter as a
freshly loaded engine has them. One process does all, since importing vLLM takes longer than the rest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_MOE_PREPACK="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1"
)

from tests.dataplane.layout_sources import TARGETS, Target, has_experts


def main(folder: Path, formats: list[str]) -> None:
    import torch

    _stand_alone()
    for name, target in TARGETS.items():
        for rank in range(target.n_ranks):
            with torch.no_grad(), _rank_of(target, rank):
                for format_ in formats:
                    if not has_experts(format_) and target.expert_parallel:
                        continue
                    torch.save(_layout_and_bytes(folder / format_, target), folder / f"{format_}-{name}-{rank}.pt")


def _stand_alone() -> None:
    """Let vLLM build models where no other rank answers and no FP8 kernel runs."""
    import torch.distributed as dist

    from weightsync.vllm.plugin import register
    from weightsync.vllm.serve import name_the_distribution

    name_the_distribution()
    register()
    import vllm.distributed.device_communicators.cpu_communicator as communicators
    import vllm.distributed.device_communicators.shm_broadcast as broadcast
    import vllm.distributed.parallel_state as state
    import vllm.model_executor.kernels.linear.scaled_mm.cpu as kernels

    new_group = dist.new_group
    dist.new_group = lambda ranks=None, *_, **__: new_group(ranks, backend="fake")  # type: ignore[assignment]
    state.in_the_same_node_as = lambda group, source_rank=0: [True] * dist.get_world_size()  # type: ignore[assignment]
    broadcast.MessageQueue = _NoQueue  # type: ignore[misc, assignment]
    communicators.CpuCommunicator = _NoCommunicator  # type: ignore[misc, assignment]
    for kernel in vars(kernels).values():
        if isinstance(kernel, type) and kernel.__name__.startswith("CPUFp8"):
            kernel.is_supported = kernel.can_implement = classmethod(lambda *_, **__: (True, None))  # type: ignore[attr-defined]


class _NoQueue:
    @staticmethod
    def create_from_process_group(*_: Any, **__: Any) -> None:
        return None


class _NoCommunicator:
    use_all2all = is_ep_communicator = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def destroy(self) -> None: ...

    def __getattr__(self, _: str) -> None:
        return None


class _rank_of:
    """The process as one rank of a target, in torch.distributed's eyes."""

    def __init__(self, target: Target, rank: int) -> None:
        self._target, self._rank = target, rank

    def __enter__(self) -> None:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=self._rank, world_size=self._target.n_ranks)

    def __exit__(self, *_: object) -> None:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        destroy_distributed_environment()


def _layout_and_bytes(path: Path, target: Target) -> tuple[bytes, dict[str, Any]]:
    import torch

    from tests.fixtures.fp8_engine import Everything
    from weightsync.vllm.worker import checkpoint_sources, checkpoint_tensors, trace_model

    model = _build(path, target)
    layout = trace_model(model, checkpoint_sources(str(path)))
    for parameter in model.parameters():
        parameter.view(torch.uint8).fill_(0x5A)
    model.load_weights(checkpoint_tensors(str(path), Everything()))  # type: ignore[operator]
    loaded = {name: parameter.reshape(-1).view(torch.uint8) for name, parameter in model.named_parameters()}
    return layout.to_bytes(), {name: value.clone() for name, value in loaded.items()}


def _build(path: Path, target: Target) -> Any:
    """vLLM's model, its parameters not loaded; without the scales that vLLM drops after loading."""
    import torch
    import torch.distributed as dist
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=str(path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        dtype="bfloat16",
        tensor_parallel_size=target.n_ranks,
        enable_expert_parallel=target.expert_parallel,
        distributed_executor_backend="external_launcher",
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not model_parallel_is_initialized():
            init_distributed_environment(target.n_ranks, dist.get_rank(), "env://", 0, "fake")
            initialize_model_parallel(target.n_ranks, 1)
        model = initialize_model(vllm_config=config)
    for module in model.modules():
        for name in ("q_scale", "k_scale", "v_scale", "prob_scale"):
            if isinstance(getattr(module, name, None), torch.nn.Parameter):
                delattr(module, name)
    return model.requires_grad_(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

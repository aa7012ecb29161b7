"""What any rank of an engine wants of a model, learnt with no weights, no GPU and no other rank.

`python -m weightsync.vllm.offline` reads a `Job` as JSON from its standard input and leaves one file for each rank in the job's
folder: `N.layout` (a TargetLayout) with `N.faults` (parameters that it leaves out, and why), or `N.error` when vLLM refuses the
sizes or its loader cannot be followed at all.

Each rank is a fork of its own: vLLM's parallel state, its rotary cache and its layer names are globals, and a process can be one
rank only. The other ranks are torch's fake process group. The trace is of the classes that vLLM chooses on this machine's platform;
the layout says which, and a live engine's own trace decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from weightsync.errors import WeightSyncError
from weightsync.inspection.tracing import REFUSED, UNTRACEABLE, Job
from weightsync.layout.records import TargetLayout

DROPPED = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""Parameters of attention's KV cache quantization: vLLM deletes them after loading, and no checkpoint here has them."""


def main() -> int:
    """Trace every rank of the job; a rank that fails leaves its reason and does not stop the others."""
    asker = os.getppid()
    job = Job.from_json(sys.stdin.read())
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["WORLD_SIZE"] = str(job.world)
    _import_vllm()
    for rank in job.ranks:
        if os.getppid() != asker:
            return 1  # nobody is left to read what the other ranks want
        child = os.fork()
        if child == 0:
            os._exit(_guarded(job, rank))
        _, status = os.waitpid(child, 0)
        if status:
            _leave_error(job, rank, REFUSED, f"vLLM's process ended with status {os.waitstatus_to_exitcode(status)}")
    return 0


def _import_vllm() -> None:
    """All that ranks share, before the first fork."""
    from weightsync.vllm.serve import name_the_distribution

    name_the_distribution()
    for name in (
        "vllm.config",
        "vllm.distributed",
        "vllm.engine.arg_utils",
        "vllm.model_executor.model_loader.utils",
        "vllm.model_executor.layers.fused_moe",
        "weightsync.vllm.worker",
    ):
        importlib.import_module(name)


def _guarded(job: Job, rank: int) -> int:
    """Exit status of a rank's process: 0 when it left its layout or a reason."""
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with _one_of(job.world, rank):
            layout, faults = _trace(job)
        Path(job.out, f"{rank}.faults").write_text(json.dumps(faults))
        Path(job.out, f"{rank}.layout").write_bytes(layout.to_bytes())
    except WeightSyncError as error:
        _leave_error(job, rank, UNTRACEABLE, str(error))
    except Exception as error:
        traceback.print_exc()
        _leave_error(job, rank, REFUSED, f"{type(error).__name__}: {error}")
    return 0


def _leave_error(job: Job, rank: int, kind: str, message: str) -> None:
    Path(job.out, f"{rank}.error").write_text(json.dumps({"kind": kind, "message": message}))


@contextlib.contextmanager
def _one_of(world: int, rank: int) -> Iterator[None]:
    """This process as one rank of `world` that are not there: groups have their sizes, collectives do nothing."""
    import torch
    import torch.distributed as dist
    import vllm.distributed.device_communicators.cpu_communicator as communicators
    import vllm.distributed.device_communicators.shm_broadcast as broadcast
    import vllm.distributed.parallel_state as parallel_state
    import vllm.model_executor.layers.fused_moe.expert_map_manager as expert_maps
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make_group, make_map = dist.new_group, expert_maps.determine_expert_map

    def fake_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return make_group(ranks, backend="fake")

    def map_with_data(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return make_map(*args, **kwargs)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    patches = (
        mock.patch.object(dist, "new_group", fake_group),
        mock.patch.object(parallel_state, "in_the_same_node_as", return_value=[True] * world),
        mock.patch.object(broadcast.MessageQueue, "create_from_process_group", return_value=None),
        mock.patch.object(communicators, "CpuCommunicator", _Silent),
        mock.patch.object(expert_maps, "determine_expert_map", map_with_data),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


class _Silent:
    """A communicator between ranks that are not there."""

    use_all2all = False
    is_ep_communicator = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> None:
        return None


def _trace(job: Job) -> tuple[TargetLayout, dict[str, str]]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    from weightsync.vllm.worker import trace_model

    config = _engine_config(job)
    with set_current_vllm_config(config):
        init_distributed_environment(job.world, int(os.environ["RANK"]), "env://", 0, "fake")
        initialize_model_parallel(job.tensor_parallel, 1)
        with torch.device("meta"), set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        for module in model.modules():
            for name in DROPPED:
                if isinstance(getattr(module, name, None), torch.nn.Parameter):
                    delattr(module, name)
        faults: dict[str, str] = {}
        layout = trace_model(model, list(job.sources), faults)
    meta = {**layout.meta, "platform": current_platform.device_type}
    return dataclasses.replace(layout, meta=meta), faults


def _engine_config(job: Job) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    _admit_fp8()
    config = EngineArgs(
        model=job.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        dtype="bfloat16",
        tensor_parallel_size=job.tensor_parallel,
        data_parallel_size=job.data_parallel,
        enable_expert_parallel=job.expert_parallel,
        distributed_executor_backend="external_launcher",
    ).create_engine_config()
    if job.redundant_experts:
        # vLLM balances experts on GPUs only and refuses the arguments elsewhere; layouts are the same.
        config.parallel_config.enable_eplb = True
        config.parallel_config.eplb_config.num_redundant_experts = job.redundant_experts
    return config


def _admit_fp8() -> None:
    """CPU kernels of block FP8 refuse machines without AMX; here they are chosen for their layout and never run."""
    import vllm.model_executor.kernels.linear.scaled_mm.cpu as kernels

    for kernel in vars(kernels).values():
        if isinstance(kernel, type) and kernel.__name__.startswith("CPUFp8"):
            admit = classmethod(lambda *_, **__: (True, None))
            kernel.is_supported = kernel.can_implement = admit  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())

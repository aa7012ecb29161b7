"""What the plug-in does to a process of vLLM, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.fixtures.models import make_tiny_deepseek
from weightsync.errors import ConfigError
from weightsync.vllm import plugin
from weightsync.vllm.kernels import Kernel, kernel_of


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> type:
    """vLLM's EngineArgs after registration, whose `create_engine_config` only tells the worker extension and how it is reached."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.delenv("WEIGHTSYNC_CONFIG", raising=False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: self)
    plugin._extend_workers(EngineArgs)
    return EngineArgs


def configured(engine_args: type, *, extension: str = "", backend: str | None = None, api_servers: int = 1) -> str:
    transfer = None if backend is None else SimpleNamespace(backend=backend)
    reached = SimpleNamespace(data_parallel_size=2, local_engines_only=False, _api_process_count=api_servers)
    made = SimpleNamespace(worker_extension_cls=extension, weight_transfer_config=transfer, parallel_config=reached)
    return engine_args.create_engine_config(made).worker_extension_cls  # type: ignore[attr-defined]


@pytest.mark.vllm
def test_registration_can_be_repeated_and_both_factories_know_the_backend() -> None:
    """vLLM's factories raise on a second registration, and vLLM calls plug-ins several times in a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from weightsync.vllm.trainer import WeightSyncTrainer
    from weightsync.vllm.transfer import WeightSyncTransferEngine

    plugin.register()
    plugin.register()
    assert WeightTransferEngineFactory._registry["weightsync"]() is WeightSyncTransferEngine
    assert WeightTransferTrainerFactory._registry["weightsync"]() is WeightSyncTrainer


@pytest.mark.vllm
def test_engines_that_need_the_worker_extension_get_it_without_a_flag(
    arguments: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured(arguments) == ""
    assert configured(arguments, backend="nccl") == ""
    assert configured(arguments, backend="weightsync") == plugin.WORKER_EXTENSION
    monkeypatch.setenv("WEIGHTSYNC_CONFIG", "contract.json")
    assert configured(arguments) == plugin.WORKER_EXTENSION
    assert configured(arguments, extension="mine.Extension") == "mine.Extension"


@pytest.mark.vllm
def test_an_engine_of_a_session_with_several_api_servers_is_refused_before_it_loads(
    arguments: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would open pushes of its own. A plain engine may have as many as it likes."""
    assert configured(arguments, api_servers=2) == ""
    monkeypatch.setenv("WEIGHTSYNC_CONFIG", "contract.json")
    with pytest.raises(ConfigError, match="add --api-server-count 1"):
        configured(arguments, api_servers=2)


@pytest.mark.vllm
@pytest.mark.parametrize(("given", "used"), [(None, "CPU_MLA"), ("AMX_MLA", "AMX_MLA")])
def test_where_the_cpu_has_amx_latent_attention_is_configured_to_keep_its_matrix(
    given: str | None, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMX_MLA leaves no `kv_b_proj` to write to. What vLLM derives of the choice follows it: blocks of 16, no prefix cache."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    plugin.register()
    model = make_tiny_deepseek(tmp_path / "model")
    config = EngineArgs(model=str(model), skip_tokenizer_init=True, attention_backend=given).create_engine_config()
    assert config.attention_config.backend.name == used
    assert (config.cache_config.block_size == 16, config.cache_config.enable_prefix_caching) == (
        used == "CPU_MLA",
        used != "CPU_MLA",
    )


@pytest.mark.vllm
@pytest.mark.parametrize("granted", [True, False])
def test_amx_is_asked_for_and_a_refusal_is_told(
    granted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's attention uses tiles without asking Linux for them."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True) or granted)
    plugin.register()
    assert asked
    assert ("refuses this process" in caplog.text) is not granted


@pytest.mark.vllm
@pytest.mark.parametrize(("small", "backend"), [(True, "SGL"), (False, "oneDNN")])
def test_the_cpu_builds_kernels_are_told_apart(small: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own dispatch: SGL for small matrices where the CPU has AMX, else oneDNN."""
    import vllm._custom_ops as custom_ops
    import vllm.model_executor.layers.utils as layer_utils

    monkeypatch.setattr(custom_ops, "_supports_onednn", True)
    monkeypatch.setattr(layer_utils, "check_cpu_sgl_kernel", lambda *_: small)
    layer = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.quant_method = SimpleNamespace()  # type: ignore[assignment]
    layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert kernel_of(layer) == Kernel("SimpleNamespace", backend)

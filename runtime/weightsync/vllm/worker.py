"""The worker extension: gives each vLLM worker a `Receiver` over its live model, and RPC methods that reach it.

vLLM adds this class to its worker's bases (`--worker-extension-cls`); its public methods are called through
`collective_rpc`, in the engine's step loop, so each of them is short. Arguments and results are JSON text, since vLLM's
serialization between processes admits plain values only.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from weightsync.config import Contract, PodFacts
from weightsync.errors import ConfigError, UnsupportedLayout, WeightSyncError
from weightsync.layout.forms import SCALE_SUFFIX
from weightsync.layout.records import Copy, SourceTensor, TargetLayout
from weightsync.layout.trace import trace_loader
from weightsync.receiver import Receiver
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import Rendezvous
from weightsync.rendezvous.records import PushRecord
from weightsync.staging import StagingArena

logger = logging.getLogger(__name__)


class WorkerExtension:
    """Mixed into vLLM's worker; every name starts with `weightsync_`, since the worker must not have it already."""

    model_runner: Any
    rank: int
    weight_transfer_engine: Any
    vllm_config: Any

    def weightsync_start(self, replica: str) -> str:
        """Trace the loader, offer the live parameters and describe them. Repeating it only describes."""
        return _guarded(lambda: self._weightsync_offer(replica).describe())

    def _weightsync_offer(self, replica: str) -> Receiver:
        receiver = getattr(self, "_weightsync_receiver", None)
        if receiver is None:
            receiver = self._weightsync_receiver = _make_receiver(
                self.model_runner.model, self.rank, replica, getattr(self, "_weightsync_staging", None)
            )
        return receiver

    def weightsync_stage(self) -> None:
        """Take the memory of staged pushes; called when the model is loaded, before the KV cache is sized.

        Raises ConfigError with the numbers when it is more than the budget, or than there is: the engine does not start.
        """
        transfer = Contract.load().transfer
        if transfer.staging == "none":
            return
        live = _live_parameters(self.model_runner.model)
        self._weightsync_staging = StagingArena(
            live, place=transfer.staging, budget_bytes=transfer.staging_budget_bytes
        )

    def weightsync_describe(self) -> str:
        """State of this rank."""
        return _guarded(lambda: self._weightsync_receiver.describe())

    def weightsync_verify(self) -> str:
        """Measure the live parameters again."""
        return _guarded(lambda: self._weightsync_receiver.verify())

    def weightsync_open(self, record: str) -> str:
        """Offer memory to the writers of a push; the engine must be paused unless it stages."""
        return _guarded(lambda: self._weightsync_receiver.open(PushRecord.from_json(record)))

    def weightsync_commit(self, push_id: str) -> str:
        """The push is committed; the engine must be paused."""
        return _guarded(lambda: self._weightsync_receiver.commit(push_id))

    def weightsync_abort(self, push_id: str, reason: str) -> str:
        """The push is aborted."""
        return _guarded(lambda: self._weightsync_receiver.abort(push_id, reason))

    def weightsync_native(self) -> tuple[str, int]:
        """What vLLM's native weight transfer has left of this rank: why it is torn, or nothing, and its version.

        Of several engines only the first one's answers come back, but every one's error: the last rank raises. No other may, vLLM
        would take the answers behind an error for those of its next call.
        """
        engine, last = self.weight_transfer_engine, self.vllm_config.parallel_config.world_size - 1
        if engine.torn and self.rank == last:
            raise WeightSyncError(engine.torn)
        return engine.torn, engine.version


def _answer(description: Any) -> str:
    return json.dumps(dataclasses.asdict(description))


def _guarded(call: Any) -> str:
    """A refusal must not kill the engine's step loop: it travels back as a value."""
    try:
        return _answer(call())
    except WeightSyncError as error:
        logger.warning("refused: %s", error)
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def _live_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _make_receiver(model: torch.nn.Module, rank: int, replica: str, staging: StagingArena | None) -> Receiver:
    contract, facts = Contract.load(), PodFacts.load()
    if (contract.transfer.commit == "staged") != (staging is not None):
        raise ConfigError(
            f"transfer.commit is {contract.transfer.commit}, but staging was {'not ' if staging is None else ''}taken when the "
            "model was loaded: start the engine with VLLM_PLUGINS naming weightsync"
        )
    ledger = Ledger.from_contract(contract)
    rendezvous = Rendezvous.from_contract(contract)
    params = _live_parameters(model)
    layout = trace_model(model, checkpoint_sources(contract.model.path))
    check_load_format(params, layout, contract.model.path)
    return Receiver(
        contract=contract,
        facts=facts,
        replica=replica,
        rank=rank,
        params=params,
        layout=layout,
        ledger=ledger,
        rendezvous=rendezvous,
        staging=staging,
        refresh=lambda: refresh_derived(model),
    )


@torch.no_grad()
def refresh_derived(model: torch.nn.Module) -> None:
    """Compute anew what multi-head latent attention keeps of `kv_b_proj` (W_UV, W_UK_T); vLLM copies it into the old tensors."""
    for module in model.modules():
        if hasattr(module, "W_UV") or hasattr(module, "W_UK_T"):
            kept: Any = module
            kept.process_weights_after_loading(next(model.parameters()).dtype)


def trace_model(
    model: torch.nn.Module, sources: list[SourceTensor], faults: dict[str, str] | None = None
) -> TargetLayout:
    """Ask the model's own `load_weights` where each element of each parameter comes from; copies nothing.

    `faults`: as of `trace_loader`.
    """
    import vllm

    layout = trace_loader(model.load_weights, dict(model.named_parameters()), sources, faults=faults)  # type: ignore[arg-type, operator]
    meta = {
        "vllm": vllm.__version__,
        "model": type(model).__name__,
        "platform": str(next(model.parameters()).device.type),
    }
    return dataclasses.replace(layout, meta=meta)


@torch.no_grad()
def check_load_format(params: Mapping[str, torch.Tensor], layout: TargetLayout, path: str) -> None:
    """Prove on the loaded checkpoint that live parameters are what a direct write would make of it.

    Raises UnsupportedLayout naming those that are not: their kernel repacked them after loading, to the same size or another,
    and bytes in load format would be garbage to it (failure mode 3).
    """
    wrong: set[str] = set()
    copies: dict[str, list[Copy]] = defaultdict(list)
    for copy in layout.copies:
        copies[copy.source].append(copy)
    for name, loaded in checkpoint_tensors(path, copies):
        for copy in copies[name]:
            live = params[copy.target].as_strided(copy.shape, copy.target_strides, copy.target_offset)
            want = loaded.as_strided(copy.shape, copy.source_strides, copy.source_offset).to(live)
            if not torch.equal(_bits(live), _bits(want)):
                wrong.add(copy.target)
    if wrong:
        raise UnsupportedLayout(
            f"{len(wrong)} of {len(params)} live parameters are not in load format, their kernel repacks weights: "
            f"{', '.join(sorted(wrong)[:5])}; choose another backend for them (docs/operations.md)"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers: torch compares no FP8."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def checkpoint_tensors(path: str, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors of these names, one at a time, on the CPU; each file is opened once."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in names:
                    yield name, opened.get_tensor(name)


def checkpoint_sources(path: str) -> list[SourceTensor]:
    """Names, shapes and dtypes that a trainer of the checkpoint can send, from the headers of its safetensors files.

    FP8 matrices and their block scales as they are, everything else as bf16. Raises ConfigError when the folder holds none.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path {path} has no safetensors file to learn the checkpoint's names from")
    sources = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                view = opened.get_slice(name)
                sources.append(SourceTensor(name, tuple(view.get_shape()), _offered(name, view.get_dtype())))
    return sources


def _offered(name: str, stored: str) -> str:
    """The dtype in which a tensor is offered to the loader, from safetensors' word for the one that it is stored in."""
    if stored == "F8_E4M3":
        return "float8_e4m3fn"
    return "float32" if stored == "F32" and name.endswith(SCALE_SUFFIX) else "bfloat16"

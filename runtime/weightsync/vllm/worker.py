"""The worker extension: gives each vLLM worker a `Receiver` over its live model, and RPC methods that reach it.

vLLM adds this class to its worker's bases (`--worker-extension-cls`); its public methods are called through
`collective_rpc`, in the engine's step loop, so each of them is short. Arguments and results are JSON text, since vLLM's
serialization between processes admits plain values only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from weightsync.config import Contract, PodFacts
from weightsync.errors import ConfigError, UnsupportedLayout, WeightSyncError
from weightsync.layout.forms import SCALE_SUFFIX
from weightsync.layout.records import SourceTensor, TargetLayout
from weightsync.layout.trace import trace_loader
from weightsync.receiver import Receiver
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import Rendezvous
from weightsync.rendezvous.records import PushRecord
from weightsync.staging import StagingArena
from weightsync.vllm.offer import Offer, make_offer
from weightsync.vllm.ranks import number_of

logger = logging.getLogger(__name__)


class WorkerExtension:
    """Mixed into vLLM's worker; every name starts with `weightsync_`, since the worker must not have it already."""

    model_runner: Any
    rank: int
    """Within its engine core: the tensor parallel rank."""
    parallel_config: Any
    weight_transfer_engine: Any
    vllm_config: Any

    def weightsync_start(self, replica: str) -> str:
        """Offer the live parameters and what is staged beside them, and describe this rank. Repeating it only describes."""
        return _guarded(lambda: self._weightsync_join(replica).describe())

    def _weightsync_join(self, replica: str) -> Receiver:
        receiver = getattr(self, "_weightsync_receiver", None)
        if receiver is None:
            receiver = self._weightsync_receiver = _make_receiver(
                self.model_runner.model,
                number_of(self.parallel_config, self.rank),
                replica,
                self._weightsync_offered(),
                getattr(self, "_weightsync_staging", None),
                self.model_runner.dtype,
            )
        return receiver

    def _weightsync_offered(self) -> Offer:
        """What of the model is written directly and what is replayed; decided once."""
        offer = getattr(self, "_weightsync_offer", None)
        if (why := getattr(self, "_weightsync_refused", None)) is not None:
            raise UnsupportedLayout(
                why
            )  # asked for again and again, and what it took the first time is never given back
        if offer is None:
            offer = self._weightsync_offer = self._weightsync_make_offer()
        return offer

    def _weightsync_make_offer(self) -> Offer:
        contract = Contract.load()
        try:
            return make_offer(
                self.model_runner.model,
                checkpoint_sources(contract.model.path),
                contract.model.path,
                place="pinnedHost" if contract.transfer.staging == "pinnedHost" else "device",
                budget_bytes=contract.transfer.staging_budget_bytes,
                around=functools.partial(_configured, getattr(self, "vllm_config", None)),
            )
        except UnsupportedLayout as error:
            self._weightsync_refused = str(error)
            raise

    def weightsync_stage(self) -> None:
        """Take the memory of staged pushes and of replays; called when the model is loaded, before the KV cache is sized.

        Raises ConfigError with the numbers when it is more than the budget, or than there is: the engine does not start. What can
        neither be written nor replayed is told when the engine joins.
        """
        transfer = Contract.load().transfer
        try:
            offer = self._weightsync_offered()
        except UnsupportedLayout as error:
            logger.error("%s", error)
            return
        if transfer.staging == "none":
            return
        budget = transfer.staging_budget_bytes
        if budget is not None and offer.replay is not None:
            budget -= offer.replay.memory.numel()
        self._weightsync_staging = StagingArena(offer.params, place=transfer.staging, budget_bytes=budget)

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

    def weightsync_lend(self, record: str) -> str:
        """Write the live parameters into the replica that a repair is for, on a thread; the engine goes on."""
        return _guarded(lambda: self._weightsync_receiver.lend(PushRecord.from_json(record)))

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
    return json.dumps(vars(description))


def _guarded(call: Any) -> str:
    """A refusal must not kill the engine's step loop: it travels back as a value."""
    try:
        return _answer(call())
    except WeightSyncError as error:
        logger.warning("refused: %s", error)
        return json.dumps({"error": type(error).__name__, "message": str(error)})
    except Exception as error:  # one rank's exception would leave the others' answers in the queue for vLLM's next call
        logger.exception("failed")
        return json.dumps({"error": type(error).__name__, "message": f"{type(error).__name__}: {error}"})


def _configured(config: Any) -> contextlib.AbstractContextManager[Any]:
    """What vLLM's kernels ask for while they process weights."""
    if config is None:
        return contextlib.nullcontext()
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(config)


def _make_receiver(
    model: torch.nn.Module, rank: int, replica: str, offer: Offer, staging: StagingArena | None, dtype: torch.dtype
) -> Receiver:
    contract, facts = Contract.load(), PodFacts.load()
    if dtype != getattr(torch, contract.model.dtype):
        raise ConfigError(
            f"the engine computes in {dtype}, the contract says {contract.model.dtype}: start it with --dtype "
            f"{contract.model.dtype}; a fleet is written one set of weights"
        )
    if (contract.transfer.commit == "staged") != (staging is not None):
        raise ConfigError(
            f"transfer.commit is {contract.transfer.commit}, but staging was {'not ' if staging is None else ''}taken when the "
            "model was loaded: start the engine with VLLM_PLUGINS naming weightsync"
        )
    ledger = Ledger.from_contract(contract)
    rendezvous = Rendezvous.from_contract(contract)
    return Receiver(
        contract=contract,
        facts=facts,
        replica=replica,
        rank=rank,
        params=offer.params,
        layout=offer.layout,
        ledger=ledger,
        rendezvous=rendezvous,
        staging=staging,
        refresh=lambda: refresh_derived(model),
        replay=offer.replay,
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

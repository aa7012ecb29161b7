"""Backend `weightsync` of vLLM's own weight transfer, the engine's side: one object in each worker process.

A round is one `update_weights`: the worker says that it is open, a trainer writes into the live parameters, says what that adds up
to, the worker compares it with what its memory holds, and the trainer, who hears all of them, says whether the round counts. vLLM
calls it between two steps and goes on when it returns, so nothing computes while bytes move, for as long as they move: the
compatible path, not the fast one. A rank whose round failed computes nothing until a later one succeeded.

What fails is told to the trainer, and not raised: vLLM 0.32 reads the answers of a call up to the first error, and takes the other
ranks' answers for those of its next call (v1/executor/multiproc_executor.py).
"""

from __future__ import annotations

import functools
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine

from weightsync import verify
from weightsync.channel import Channel
from weightsync.errors import (
    ConfigError,
    FencedOut,
    PushAborted,
    TransportError,
    UnsupportedLayout,
    WeightSyncError,
)
from weightsync.layout.coverage import listed
from weightsync.layout.forms import SCALE_SUFFIX
from weightsync.layout.records import SourceTensor, TargetLayout
from weightsync.rendezvous.fencing import Fence, Notification
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.rendezvous.records import PushRecord
from weightsync.transport import Agent
from weightsync.transport.agent import only_network_transport
from weightsync.vllm.native import (
    EPOCH,
    WeightSyncInitInfo,
    WeightSyncUpdateInfo,
    encode_descriptor,
    source_tensors,
)
from weightsync.vllm.offer import Following, make_offer
from weightsync.vllm.worker import checkpoint_sources
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

POLL_S = 0.002
TELL_S = 1.0


class WeightSyncTransferEngine(WeightTransferEngine[WeightSyncInitInfo, WeightSyncUpdateInfo]):
    """The live parameters of one engine rank as the target of a native trainer's writes."""

    init_info_cls = WeightSyncInitInfo
    update_info_cls = WeightSyncUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        """Raises UnsupportedLayout naming parameters that a kernel repacked, ConfigError where this backend cannot work."""
        super().__init__(config, vllm_config, device, model)
        if "WEIGHTSYNC_CONFIG" in os.environ:
            raise ConfigError(
                "this engine belongs to the session of WEIGHTSYNC_CONFIG, and its trainer pushes: leave out "
                "--weight-transfer-config, or WEIGHTSYNC_CONFIG"
            )
        self._checkpoint = _loaded_sources(vllm_config)
        offer = make_offer(model, list(self._checkpoint.values()), vllm_config.model_config.model)
        if offer.reasons:
            told = [f"{name} ({why})" for name, why in sorted(offer.reasons.items())]
            raise UnsupportedLayout(
                f"backend weightsync cannot write {len(told)} modules directly, and only engines of a session replay modules: "
                f"{listed(told)}"
            )
        self._params = offer.params
        self.version = 0
        """What the live parameters hold, as the trainers number it; 0 is the checkpoint."""
        self.torn = ""
        """Why nothing may be computed with the live parameters; empty while they are one version's."""
        self._started = False
        self._lost_writer = ""
        self._link: _Link | None = None
        _refuse_torn_steps()

    def init_transfer_engine(self, init_info: WeightSyncInitInfo) -> None:
        """Offer the live parameters to a trainer, who hears why when it is refused. Whoever was connected before is cut off."""
        self.shutdown()
        deadline = Deadline(init_info.timeout_s)
        try:
            channel = Channel.connect(init_info.address, init_info.port, init_info.token, deadline)
        except WeightSyncError as error:
            logger.error("%s; engines must reach the trainer's master_address", error)  # it misses this rank
            return
        try:
            if self._lost_writer:
                raise FencedOut(self._lost_writer)
            layout = self._layout(init_info)
            params = {target.name: self._params[target.name] for target in layout.targets}
            self._link = _Link(init_info.session, channel, layout, params)
            channel.send(encode_descriptor(self._link.descriptor(), self.version, self._started), deadline)
        except WeightSyncError as error:
            _tell(channel, {"refused": str(error)})
            self.shutdown()
            channel.close()

    def start_weight_update(self) -> None:
        """vLLM's own bookkeeping begins."""
        self._started = True

    def receive_weights(self, update_info: WeightSyncUpdateInfo) -> None:
        """Take one round in, to its end. When it fails `torn` says why, also when no byte of this rank had changed: another one may
        hold the new version.

        Raises ConfigError when no trainer is connected that could be told.
        """
        link = self._link
        if link is None:
            self._started = False  # vLLM ends an update that raises
            raise ConfigError(
                "no trainer is connected: backend weightsync is driven by its trainer, see docs/native.md"
            )
        record, deadline = PushRecord.from_json(update_info.record), Deadline(update_info.timeout_s)
        try:
            fence = link.fence(record, held=(EPOCH, self.version), repairs=bool(self.torn))
        except FencedOut as error:
            link.tell({"refused": str(error)})
            return
        _synchronize()
        self.torn = f"version {record.version} is being written"
        try:
            link.check(link.take(fence, deadline))
            link.conclude(record.version, deadline)
            self.version, self.torn = record.version, ""
        except WeightSyncError as error:
            self.torn = f"version {record.version} was not received whole: {error}"
            logger.error("computing nothing until a round succeeds: %s", self.torn)
            link.tell({"failed": str(error)})
        finally:
            if self.torn:
                self._lost_writer, self._link = link.cut(), None

    def finish_weight_update(self) -> None:
        """vLLM's own bookkeeping ends; `receive_weights` returned when all was proved."""
        self._started = False

    def shutdown(self) -> None:
        """Let the trainer go; the weights stay."""
        if self._link is not None:
            self._link.cut()
            self._link = None

    def _layout(self, info: WeightSyncInitInfo) -> TargetLayout:
        """Where what the trainer sends goes. Raises UnsupportedLayout naming parameters that it does not make whole."""
        followed = Following(self.model, self._offered(info))
        if doubts := followed.doubtful():
            told = listed([f"{name} ({why})" for name, why in sorted(doubts.items())])
            raise UnsupportedLayout(f"what this trainer sends does not make the engine's parameters: {told}")
        return followed.layout_without(())

    def _offered(self, info: WeightSyncInitInfo) -> list[SourceTensor]:
        """What the trainer sends, in the form that this engine's checkpoint has it: FP8 with scales where that is in FP8."""
        offered = []
        for tensor in source_tensors(info.sources):
            stored = self._checkpoint.get(tensor.name, tensor)
            offered.append(stored if stored.shape == tensor.shape else tensor)
            scales = self._checkpoint.get(tensor.name + SCALE_SUFFIX)
            if scales is not None:
                offered.append(scales)
        return offered


class _Link:
    """One trainer's access to the live parameters: a NIXL agent of its own, and the line to the trainer."""

    def __init__(
        self, session: str, channel: Channel, layout: TargetLayout, params: Mapping[str, torch.Tensor]
    ) -> None:
        self._session = session
        self._channel = channel
        self._layout = layout
        self._params = params
        self._name = f"native-{uuid.uuid4().hex}"
        self._fills = _measure_fills(layout, params)
        self._said_all = True
        self._agent = Agent(self._name)
        self._agent.register(list(params.values()))

    def descriptor(self) -> EngineDescriptor:
        """How the trainer writes here."""
        tensors = {
            name: RemoteTensor(
                name=name,
                address=tensor.data_ptr(),
                length_bytes=tensor.numel() * tensor.element_size(),
                device_id=max(tensor.get_device(), 0),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
            for name, tensor in self._params.items()
        }
        return EngineDescriptor(
            replica=self._name,
            incarnation=self._name,
            rank=0,
            agent_name=self._name,
            metadata=self._agent.metadata(),
            tensors=tensors,
            layout=self._layout.to_bytes(),
        )

    def fence(self, record: PushRecord, *, held: tuple[int, int], repairs: bool) -> Fence:
        """Raises FencedOut unless this round is of this trainer, newer than what is held, and planned for this very link."""
        fence = Fence.of(record, self._layout.digest())
        fence.require_admissible(session=self._session, seen_epoch=EPOCH, held=held, repairs=repairs)
        if self._name not in record.members:
            raise FencedOut(f"round {record.push_id} was planned for other engines than {self._name}: connect again")
        return fence

    def take(self, fence: Fence, deadline: Deadline) -> Notification:
        """Open, and wait for the writer's last word. Raises PushAborted when it gives up, TransportError when it is gone."""
        self._said_all = False
        self._channel.send({"open": fence.push_id}, deadline)
        while True:
            for _, payload in self._agent.notifications():
                note = Notification.decode(payload)
                note.require(fence)
                self._said_all = True
                return note
            if self._channel.said_something():
                word = self._channel.receive(deadline)
                self._said_all = True  # a trainer speaks when all its handles are terminal
                raise PushAborted(f"the trainer gave up: {word['abort']}")
            if deadline.passed:
                raise TransportError(f"the trainer did not write within {deadline.timeout_s:.0f} s")
            time.sleep(POLL_S)

    def check(self, note: Notification) -> None:
        """Raises PushAborted unless live memory holds exactly what was sent."""
        digests, wrong = _measure(self._params), []
        for index, name in enumerate(sorted(self._params)):
            sent = note.partial_digests.get(index, 0) + self._fills.get(name, 0)
            if verify.to_hex(sent) != verify.to_hex(digests[name]):
                wrong.append(name)
        if wrong:
            raise PushAborted(
                f"{len(wrong)} of {len(digests)} targets differ from what was sent: {', '.join(wrong[:5])}"
            )

    def conclude(self, version: int, deadline: Deadline) -> None:
        """Say that this rank holds the version, and hear whether all do.

        Raises PushAborted when not, TransportError at a silence.
        """
        self._channel.send({"received": version}, deadline)
        word = self._channel.receive(deadline)
        if "commit" not in word:
            raise PushAborted(f"the trainer gave up: {word['abort']}")

    def tell(self, message: dict[str, Any]) -> None:
        """A word that the trainer may no longer hear."""
        _tell(self._channel, message)

    def cut(self) -> str:
        """End the trainer's access. Returns why it may not have ended; empty when it has."""
        self._agent.close()
        self._channel.close()
        if self._said_all or only_network_transport() == "tcp":
            return ""
        return (
            "a trainer fell silent in the middle of a round, and only over tcp is its access known to end with our agent: end it, "
            "and restart this engine"
        )


def _tell(channel: Channel, message: dict[str, Any]) -> None:
    try:
        channel.send(message, Deadline(TELL_S))
    except TransportError as error:
        logger.warning("%s; it would have been told %s", error, message)


def _loaded_sources(vllm_config: Any) -> dict[str, SourceTensor]:
    """The checkpoint that this engine has loaded, by name. Raises ConfigError where there is none to prove the layout with."""
    path, load_format = vllm_config.model_config.model, vllm_config.load_config.load_format
    if not Path(path).is_dir() or load_format == "dummy":
        raise ConfigError(
            f"backend weightsync: model {path!r} with load format {load_format!r}: loaded weights prove that no kernel repacked "
            "them; serve a folder with safetensors files, and load it"
        )
    return {source.name: source for source in checkpoint_sources(path)}


def _measure(params: Mapping[str, torch.Tensor]) -> dict[str, int]:
    _synchronize()
    return {name: verify.digest_tensor(name, tensor) for name, tensor in params.items()}


def _measure_fills(layout: TargetLayout, params: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Digests of what the loader filled and no trainer writes (vocabulary padding), by target."""
    totals: dict[str, int] = {}
    for fill in layout.fills:
        flat = params[fill.target].reshape(-1)[fill.offset : fill.offset + fill.numel]
        totals[fill.target] = totals.get(fill.target, 0) + verify.digest_range(fill.target, fill.offset, flat)
    return totals


def _synchronize() -> None:
    """Kernels of the last step may still read, and bytes that were written may not yet be visible."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _refuse_torn_steps() -> None:
    """Have this process's worker end its engine rather than compute with torn weights, whoever resumed it."""
    from vllm.v1.worker.gpu_worker import Worker

    run = Worker.execute_model
    if hasattr(run, "refuses_torn_weights"):
        return

    @functools.wraps(run)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        torn = getattr(self.weight_transfer_engine, "torn", "")
        if torn:
            raise WeightSyncError(f"this engine ends rather than serve torn weights: {torn}")
        return run(self, *args, **kwargs)

    execute_model.refuses_torn_weights = True  # type: ignore[attr-defined]
    Worker.execute_model = execute_model

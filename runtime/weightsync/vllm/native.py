"""What trainer and engines of a native transfer tell each other: the infos that vLLM carries, and an engine's description.

The names of `WeightSyncTrainerInitInfo` are those of vLLM's NCCL backend, so that a framework changes the class alone. Imports
vLLM's base classes and the records, not torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo

from weightsync.layout.records import SourceTensor
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.vllm.plugin import BACKEND

EPOCH = 1
"""A native transfer has no ledger that counts trainers: one that comes anew goes on at the engines' versions."""


@dataclasses.dataclass
class WeightSyncTrainerInitInfo(TrainerInitInfo):
    """What a trainer is started with; `rank` 0 sends."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    """Where this trainer listens for engines: an address of this host that they can reach."""
    master_port: int
    """0 takes any free port."""
    world_size: int
    """The sender and every engine rank, as for NCCL: 1 + engines x their tensor and pipeline parallel sizes."""
    timeout_s: float = 120.0
    """Of the rendezvous and of each round."""


@dataclasses.dataclass
class WeightSyncInitInfo(WeightTransferInitInfo):
    """What the trainer sends to `init_weight_transfer_engine`."""

    address: str
    port: int
    token: str
    session: str
    sources: list[list[Any]]
    """[name, shape] of every tensor that the trainer sends, in the names that the model's own loader takes."""
    timeout_s: float


@dataclasses.dataclass
class WeightSyncUpdateInfo(WeightTransferUpdateInfo):
    """What the trainer sends to `update_weights`: the round's `PushRecord` as JSON, and the seconds that it may take."""

    record: str
    timeout_s: float


def source_tensors(sources: list[list[Any]]) -> list[SourceTensor]:
    """What the infos list, in the checkpoint's dtype."""
    return [SourceTensor(name, tuple(shape), "bfloat16") for name, shape in sources]


def encode_descriptor(descriptor: EngineDescriptor, version: int, started: bool) -> dict[str, Any]:
    """An engine rank's first message: how it is written to, the version that it holds, and whether an update is unfinished."""
    return {"engine": descriptor.to_fields(), "version": version, "started": started}


def decode_descriptor(message: dict[str, Any]) -> EngineDescriptor:
    """The engine of such a message."""
    return EngineDescriptor.from_fields(message["engine"])

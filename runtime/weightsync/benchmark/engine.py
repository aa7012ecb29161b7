"""The process that is written into: offers memory as an engine rank does, looks for what arrives, measures it when it is asked.

It offers the same memory once for each size of writes, under an agent and a layout of its own. Imports the transport, not vLLM.
"""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from typing import Any

import torch

from weightsync import verify
from weightsync.channel import Channel
from weightsync.errors import DeadlineExceeded
from weightsync.layout.records import Copy, SourceTensor, Target, TargetLayout
from weightsync.meter import TensorMeter
from weightsync.reception import NOTIFICATION_POLL_S
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.transport import Agent
from weightsync.waiting import Deadline, wait_until

SOURCE = "w"
TARGET = "parameter"
ANSWER_S = 30.0
_NEVER_WRITTEN = 0xFF


def layout_of(payload_bytes: int, write_bytes: int) -> TargetLayout:
    """One bf16 parameter of that size, which takes its source in pieces of `write_bytes` from the last to the first.

    No two of them can be merged into one write. `payload_bytes` is a multiple of `write_bytes`, and both are even.
    """
    numel, piece = payload_bytes // 2, write_bytes // 2
    return TargetLayout(
        targets=(Target(TARGET, (numel,), "bfloat16"),),
        sources=(SourceTensor(SOURCE, (numel,), "bfloat16"),),
        copies=tuple(
            Copy(SOURCE, at, (1,), TARGET, numel - piece - at, (1,), (piece,)) for at in range(0, numel, piece)
        ),
    )


def serve(channel: Channel, device: str, limit_bytes: int) -> None:
    """Be written into until the other side has had enough. Raises TransportError when it is gone."""
    asked = channel.receive(Deadline(ANSWER_S))
    payload_bytes, sizes = asked["payload_bytes"], asked["sizes"]
    if payload_bytes > limit_bytes:
        channel.send({"refused": f"this side gives {limit_bytes} bytes at most, see --payload"}, Deadline(ANSWER_S))
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    memory = torch.empty(payload_bytes, dtype=torch.uint8, device=device)
    with ExitStack() as stack:
        agents = {size: stack.enter_context(Agent(f"bench-engine/{size}/{uuid.uuid4().hex}")) for size in sizes}
        engines = [_offer(agents[size], size, memory).to_fields() for size in sizes]
        channel.send({"engines": engines, "device": device_name(device)}, Deadline(ANSWER_S))
        _Looking(channel, agents, memory).run()


def device_name(device: str) -> str:
    """What a report calls it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


class _Looking:
    """Makes progress, as a receiver with an open push does, between the other side's words."""

    def __init__(self, channel: Channel, agents: dict[int, Agent], memory: torch.Tensor) -> None:
        self._channel, self._agents, self._memory = channel, agents, memory
        self._meter = TensorMeter({TARGET: memory.view(torch.bfloat16)})
        self._last: dict[int, Notification] = {}

    def run(self) -> None:
        pause_s = NOTIFICATION_POLL_S
        while True:
            self._look()
            if self._channel.said_something():
                match self._channel.receive(Deadline(ANSWER_S)):
                    case {"pause_s": told}:
                        pause_s = told
                        self._answer()
                    case {"clear": _}:
                        self._memory.fill_(_NEVER_WRITTEN)
                        self._answer()
                    case {"check": size, "push_id": push_id}:
                        self._answer(fault=self._fault(size, push_id))
                    case _:
                        return
            time.sleep(pause_s)

    def _look(self) -> None:
        for size, agent in self._agents.items():
            for _, payload in agent.notifications():
                self._last[size] = Notification.decode(payload)

    def _answer(self, **words: Any) -> None:
        if self._memory.is_cuda:
            torch.cuda.synchronize()
        self._channel.send(words, Deadline(ANSWER_S))

    def _fault(self, size: int, push_id: str) -> str:
        """What is wrong with what a push in writes of `size` left here; empty when it is what the writer says that it sent."""

        def told() -> Notification | None:
            self._look()
            note = self._last.get(size)
            return note if note is not None and note.push_id == push_id else None

        try:
            note = wait_until(told, deadline=Deadline(ANSWER_S / 2), what=f"the last word of push {push_id}")
        except DeadlineExceeded as error:
            return str(error)
        found, sent = self._meter.measure()[TARGET], note.partial_digests.get(0, 0)
        if (found, note.bytes_written) == (sent, self._memory.nbytes):
            return ""
        return (
            f"{note.bytes_written} bytes with digest {verify.to_hex(sent)} were sent, {self._memory.nbytes} with digest "
            f"{verify.to_hex(found)} are there"
        )


def _offer(agent: Agent, size: int, memory: torch.Tensor) -> EngineDescriptor:
    agent.register([memory])
    tensor = RemoteTensor(
        name=TARGET,
        address=memory.data_ptr(),
        length_bytes=memory.nbytes,
        device_id=max(memory.get_device(), 0),
        dtype="bfloat16",
    )
    return EngineDescriptor(
        replica=str(size),
        incarnation="bench",
        rank=0,
        agent_name=agent.name,
        metadata=agent.metadata(),
        tensors={TARGET: tensor},
        layout=layout_of(memory.nbytes, size).to_bytes(),
    )

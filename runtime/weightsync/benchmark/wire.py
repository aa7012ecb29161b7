"""The process that writes: pushes by `Writer` in writes of several sizes, between plain streams into the same memory.

Imports the transport and the writer, never vLLM.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weightsync.benchmark.engine import ANSWER_S, SOURCE, TARGET
from weightsync.benchmark.streams import PLAIN, Manner, plain_stream, take_turns
from weightsync.channel import Channel
from weightsync.errors import ConfigError, TransportError
from weightsync.layout.records import SourceTensor
from weightsync.layout.shards import LocalPiece, LocalSources
from weightsync.reception import NOTIFICATION_POLL_S
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.telemetry import Transports
from weightsync.transport import Agent, Region
from weightsync.transport.agent import transports_in_use
from weightsync.waiting import Deadline
from weightsync.writer import Writer


def bench_record(push_id: str, plan_digests: Mapping[str, str], members: Mapping[str, str]) -> PushRecord:
    """A push of one writer that no ledger knows."""
    return PushRecord(
        push_id=push_id,
        session="bench",
        epoch=1,
        version=1,
        attempt=1,
        step=0,
        catch_up=False,
        deadline_at=0.0,
        writers=1,
        plan_digests=dict(plan_digests),
        members=dict(members),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wire:
    """What moved the payload how fast; median seconds of one payload."""

    plain: Mapping[str, float]
    """By the manner's name."""
    pushes: Mapping[int, float]
    """By bytes of a write."""
    transports: Transports
    engine_device: str


def measure_wire(
    channel: Channel, *, payload_bytes: int, sizes: Sequence[int], device: str, turns: int, deadline: Deadline
) -> Wire:
    """Write one payload again and again into the process behind `channel`, and have its bytes checked there.

    Raises TransportError when a transfer fails or leaves other bytes than were sent, ConfigError when the other side refuses.
    """
    channel.send({"payload_bytes": payload_bytes, "sizes": list(sizes)}, Deadline(ANSWER_S))
    answer = channel.receive(Deadline(ANSWER_S))
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    engines = [EngineDescriptor.from_fields(fields) for fields in answer["engines"]]
    with Agent(f"bench-trainer/{uuid.uuid4().hex}") as agent:
        trainer = _Trainer(agent, engines, payload_bytes, device)
        pushes = {_name(size): trainer.push(size) for size in sizes}
        plain = {name: trainer.stream(manner) for name, manner in PLAIN.items()}

        def have_paused(name: str) -> None:
            pause_s = PLAIN[name].pause_s or 0.0 if name in PLAIN else NOTIFICATION_POLL_S
            _ask(channel, {"pause_s": pause_s})

        seconds = take_turns({**plain, **pushes}, turns=turns, deadline=deadline, before=have_paused)
        for size in sizes:
            _ask(channel, {"clear": True})
            pushes[_name(size)]()
            _check(channel, agent, size)
        trainer.close()
        channel.send({"end": True}, Deadline(ANSWER_S))
        return Wire(
            plain={name: seconds[name] for name in plain},
            pushes={size: seconds[_name(size)] for size in sizes},
            transports=transports_in_use(),
            engine_device=answer["device"],
        )


def _check(channel: Channel, agent: Agent, size: int) -> None:
    """Have the last push measured where it arrived. Its last word may still be on its way: this side makes progress too."""
    deadline = Deadline(ANSWER_S)
    channel.send({"check": size, "push_id": _push_id(size)}, deadline)
    while not channel.said_something() and not deadline.passed:
        agent.notifications()
        time.sleep(NOTIFICATION_POLL_S)
    fault = channel.receive(deadline)["fault"]
    if fault:
        raise TransportError(f"a push in writes of {size} bytes left other bytes than it sent: {fault}")


def _ask(channel: Channel, words: dict[str, Any]) -> dict[str, Any]:
    channel.send(words, Deadline(ANSWER_S))
    return channel.receive(Deadline(ANSWER_S))


def _name(size: int) -> str:
    return f"writes of {size}"


def _push_id(size: int) -> str:
    return f"bench.{size}"


class _Trainer:
    """One trainer rank that has learnt every engine; its arena is converted and measured once."""

    def __init__(self, agent: Agent, engines: Sequence[EngineDescriptor], payload_bytes: int, device: str) -> None:
        self._agent = agent
        self._engines = {int(engine.replica): engine for engine in engines}
        weight = torch.randn(payload_bytes // 2, dtype=torch.bfloat16, device=device)
        local = LocalSources(
            (SourceTensor(SOURCE, tuple(weight.shape), "bfloat16"),),
            (LocalPiece(SOURCE, 0, weight.numel(), 0, weight, 0),),
        )
        self._slots = SlotArena(rank=0, local=local, layouts=[local.layout(0)], format_="auto")
        self._writer = Writer(rank=0, agent=agent, slots=self._slots, rendezvous=self)
        members = {engine.replica: replica_incarnation([engine.incarnation]) for engine in engines}
        self._plans = self._writer.learn(members, Deadline(ANSWER_S), catch_up=False)
        self._members = members
        self._writer.fill()

    def fetch(self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None) -> EngineDescriptor:
        """The writer's directory."""
        return self._engines[int(replica)]

    def push(self, size: int) -> Callable[[], object]:
        """Writes the arena into the engine that takes it in writes of `size`."""
        replica = str(size)
        record = bench_record(_push_id(size), self._plans, self._members)
        self._writer.measure(record)

        def write() -> None:
            written = self._writer.write(record, {replica}, Deadline(ANSWER_S), frozenset)
            if written.failed:
                raise TransportError(written.failed[replica])

        return write

    def stream(self, manner: Manner) -> Callable[[], None]:
        """A plain stream of the same payload into the same memory."""
        engine = next(iter(self._engines.values()))
        arena, there = self._slots.buffer, engine.tensors[TARGET]
        local = Region(address=arena.data_ptr(), length_bytes=there.length_bytes, device_id=max(arena.get_device(), 0))
        remote = Region(address=there.address, length_bytes=there.length_bytes, device_id=there.device_id)
        return plain_stream(self._agent, engine.agent_name, local, remote, manner, ANSWER_S)

    def close(self) -> None:
        self._writer.close()

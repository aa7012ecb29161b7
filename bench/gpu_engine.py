"""An engine rank of `bench.gpu_push`: memory that is written into, and checked there against a conversion of its own."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.gpu_case import DISTINCT, UCX_TLS, Case, Row, naive_fp8, row_of, wall
from bench.shapes import Engine, trainer_parameters
from weightsync.layout.families import QWEN_MOE
from weightsync.layout.forms import FP8, SCALE_SUFFIX
from weightsync.layout.records import TargetLayout
from weightsync.layout.shards import sources_of
from weightsync.meter import TensorMeter
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.transport import Agent


class _EngineProcess:
    """Live parameters of one engine rank, registered, and what an engine does with a push."""

    def __init__(self, engine: Engine, number: int, case: Case, copy_gbps: float) -> None:
        self._engine, self._device, self._copy_gbps = engine, torch.device("cuda", case.engine_device), copy_gbps
        self._writers = case.trainers
        torch.cuda.set_device(self._device)
        self._layout = engine.layout()
        self._live = _parameters(self._layout, self._device)
        self._staging = _parameters(self._layout, self._device) if case.staged else {}
        self._meter = TensorMeter(self._live)
        self._agent = Agent(f"engine-{number}")
        self._agent.register(list(self._live.values()))
        self.descriptor = _descriptor(self._layout, self._live, self._agent, number, case.engine_device)
        self._notes: dict[int, Notification] = {}

    def serve(self, pipe: Any) -> None:
        pipe.send(self.descriptor)
        while True:
            while not pipe.poll(0.0):
                self._hear_writers(pipe)
            match pipe.recv():
                case ("check",):
                    pipe.send(self._check())
                case ("rows",):
                    pipe.send(self._rows())
                case _:
                    self._agent.close()
                    return

    def _hear_writers(self, pipe: Any) -> None:
        """Also makes progress, as a receiver with an open push does."""
        for _, payload in self._agent.notifications():
            note = Notification.decode(payload)
            self._notes[note.writer_rank] = note
            if [each.version for each in self._notes.values()] == [note.version] * self._writers:
                pipe.send(note.version)

    def _check(self) -> Row:
        torch.cuda.synchronize()
        measured = self._meter.measure()
        sent = dict.fromkeys(measured, 0)
        for note in self._notes.values():
            for name, digest in zip(sorted(sent), _by_index(note, len(sent)), strict=True):
                sent[name] = (sent[name] + digest) % (1 << 64)
        return {
            "digests": sent == measured,
            "bytes": equal_to_own_conversion(self._layout, self._live, self._engine.layers),
        }

    def _rows(self) -> list[Row]:
        payload = sum(tensor.nbytes for tensor in self._live.values())
        measured = wall(self._meter.measure)
        rows = [row_of("receiver's digest of live memory", payload, measured, 0.0)]
        if self._staging:
            live, staged = list(self._live.values()), list(self._staging.values())
            copy_s = wall(lambda: torch._foreach_copy_(live, staged))  # pyright: ignore[reportPrivateImportUsage]
            rows.append(row_of("staged commit: copy", payload, copy_s, self._copy_gbps))
            row = row_of("staged commit: copy, and digest of live memory", payload, copy_s + measured, self._copy_gbps)
            rows.append(row)
        return rows


def _by_index(note: Notification, count: int) -> list[int]:
    return [note.partial_digests.get(index, 0) for index in range(count)]


def run_engine(pipe: Any, engine: Engine, number: int, case: Case, copy_gbps: float) -> None:
    os.environ["UCX_TLS"] = UCX_TLS
    _EngineProcess(engine, number, case, copy_gbps).serve(pipe)


def _parameters(layout: TargetLayout, device: torch.device) -> dict[str, torch.Tensor]:
    """Filled with 0xff, so that what nobody writes is seen."""
    return {
        target.name: torch.full(
            (target.numel * _dtype(target.dtype).itemsize,), 255, dtype=torch.uint8, device=device
        ).view(_dtype(target.dtype))
        for target in layout.targets
    }


def _descriptor(
    layout: TargetLayout, live: dict[str, torch.Tensor], agent: Agent, number: int, device: int
) -> EngineDescriptor:
    tensors = {
        name: RemoteTensor(name=name, address=t.data_ptr(), length_bytes=t.nbytes, device_id=device, dtype=str(t.dtype))
        for name, t in live.items()
    }
    return EngineDescriptor(
        replica="r",
        incarnation=str(number),
        rank=number,
        agent_name=agent.name,
        metadata=agent.metadata(),
        tensors=tensors,
        layout=layout.to_bytes(),
    )


def equal_to_own_conversion(layout: TargetLayout, live: dict[str, torch.Tensor], layers: int) -> bool:
    """Whether memory holds, byte for byte, what the torch reference makes of the same weights here, in the loader's places."""
    device = next(iter(live.values())).device
    parameters = trainer_parameters(layers, device, distinct=DISTINCT)
    pieces = {piece.name: piece for piece in sources_of(parameters.items(), QWEN_MOE).pieces}
    kinds = {source.name: source for source in layout.sources}
    made: dict[str, torch.Tensor] = {}
    for copy in layout.copies:
        if copy.source not in made:
            made.clear()
            name = copy.source.removesuffix(SCALE_SUFFIX)
            flat = pieces[name].flat()
            if kinds[name].dtype == FP8:
                values, scales = naive_fp8(flat.view(kinds[name].shape))
                made |= {name: values.view(torch.uint8), name + SCALE_SUFFIX: scales}
            else:
                made[name] = flat
        whole = made[copy.source]
        want = whole.as_strided(copy.shape, copy.source_strides, whole.storage_offset() + copy.source_offset)
        memory = live[copy.target]
        memory = memory.view(torch.uint8) if memory.dtype == torch.float8_e4m3fn else memory
        if not torch.equal(memory.as_strided(copy.shape, copy.target_strides, copy.target_offset), want):
            return False
    return True


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)

"""Pushes between processes on one or two GPUs through the product's writer, arena, plan and digests; bytes checked there.

One process a trainer rank and one an engine rank, NIXL between them. The rendezvous is a pipe: what is measured is the data path.
`bench.gpu` calls `pushes`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.gpu_case import DISTINCT, RUNS, TIMEOUT_S, UCX_TLS, Case, Row, ask, hear, naive_fp8, row_of, wall
from bench.gpu_engine import run_engine
from bench.shapes import trainer_parameters
from weightsync.layout.families import QWEN_MOE
from weightsync.layout.shards import LocalPiece, LocalSources, sources_of
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.transport import Agent, Region, Transfer
from weightsync.waiting import Deadline
from weightsync.writer import Writer, _pairs

NAIVE_WRITE_BYTES = 1 << 20
NAIVE_WINDOW = 100
"""Handles that the naive way keeps in flight before it drains them."""


def pushes(case: Case, *, copy_gbps: float, group_bytes: int) -> list[Row]:
    """All rows of one fleet. copy_gbps: payload of a plain copy between the same devices.

    Processes of its own: UCX keeps what it mapped of another process, and so that one's memory, until its own process ends.
    """
    context = mp.get_context("spawn")
    engines = [
        _spawn(context, run_engine, engine, number, case, copy_gbps) for number, engine in enumerate(case.engines)
    ]
    descriptors = [hear(pipe) for pipe, _ in engines]
    trainers = [_spawn(context, _trainer, case, rank, group_bytes, descriptors) for rank in range(case.trainers)]
    try:
        fleet = _Fleet(case, [pipe for pipe, _ in trainers], [pipe for pipe, _ in engines])
        return [row | {"fleet": case.what} for row in fleet.rows(copy_gbps)]
    finally:
        for pipe, process in (*trainers, *engines):
            pipe.send(("end",))
            process.join(TIMEOUT_S)


def _spawn(context: Any, target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    return ours, process


class _Fleet:
    """What the coordinator is: tells trainers to push, and hears engines say that they have everything."""

    def __init__(self, case: Case, trainers: list[Any], engines: list[Any]) -> None:
        self._case, self._trainers, self._engines = case, trainers, engines
        self._version = 0
        joined = [hear(pipe) for pipe in trainers]
        self._plans = joined[0]["plans"]
        assert all(each["plans"] == self._plans for each in joined)
        self._base = {key: [each[key] for each in joined] for key in ("bytes", "groups", "learn_seconds")}

    def rows(self, copy_gbps: float) -> list[Row]:
        payload = sum(self._base["bytes"])
        convert_s, measure_s = [max(self._all(word)) for word in ("convert", "measure")]
        wire_s, both_s = self._push("write"), self._push("convert_and_write")
        equal = self._check()  # before pushes whose last words have no digests
        unmeasured_s = self._push("convert_and_write", verify="off")
        floor = [] if self._case.zero_copy else self._floor(payload, copy_gbps)  # hundreds of small copies are no floor
        over = {"over_the_floor": both_s / floor[0]["seconds"]} if floor else {}
        return [
            row_of("wire alone, prepared transfers", payload, wire_s, copy_gbps) | self._base | equal,
            row_of("convert alone", payload, convert_s, copy_gbps),
            row_of("writer's digests alone", payload, measure_s, copy_gbps),
            row_of("convert, digest and wire, group by group", payload, both_s, copy_gbps)
            | {"over_the_longest": both_s / max(convert_s, wire_s)}
            | over,
            row_of("the same without digests (verify: off)", payload, unmeasured_s, copy_gbps)
            | {"over_the_longest": unmeasured_s / max(convert_s, wire_s)},
            *floor,
            *([] if self._case.trainers > 1 else [self._naive(payload, copy_gbps)]),
            *(row for pipe in self._engines for row in ask(pipe, "rows")),
            {"what": "memory of a trainer", "seconds": 0.0, "gbps": 0.0, **self._all("memory")[0]},
        ]

    def _floor(self, payload: int, copy_gbps: float) -> list[Row]:
        seconds = max(self._all("floor"))
        return [row_of("floor: the same kernels beside plain copies, no transport", payload, seconds, copy_gbps)]

    def _all(self, *words: Any) -> list[Any]:
        for pipe in self._trainers:
            pipe.send(words)
        return [hear(pipe) for pipe in self._trainers]

    def _push(self, how: str, verify: str = "full") -> float:
        """Median of pushes, each until every engine has heard the last word of every writer; the first one is not counted."""
        times = []
        for _ in range(RUNS + 1):
            record = self._record(verify)
            started = time.perf_counter()
            self._all(how, record)
            for pipe in self._engines:
                assert hear(pipe) == record.version
            times.append(time.perf_counter() - started)
        return sorted(times[1:])[RUNS // 2]

    def _record(self, verify: str) -> PushRecord:
        self._version += 1
        return PushRecord(
            push_id=f"1.{self._version}.1",
            session="bench",
            epoch=1,
            version=self._version,
            attempt=1,
            step=0,
            catch_up=False,
            deadline_at=0.0,
            writers=self._case.trainers,
            plan_digests=self._plans,
            members={"r": _word(self._case)},
            verify=verify,
        )

    def _check(self) -> Row:
        """Engines compare digests with the writers' and bytes with their own conversion of the same weights."""
        found = [ask(pipe, "check") for pipe in self._engines]
        return {"digests_equal": all(f["digests"] for f in found), "bytes_equal": all(f["bytes"] for f in found)}

    def _naive(self, payload: int, copy_gbps: float) -> Row:
        (found,) = self._all("naive")
        row = row_of("the naive way: convert all, one handle a MiB", payload, found["seconds"], copy_gbps)
        return row | {"convert_seconds": found["convert_seconds"]}


def _word(case: Case) -> str:
    return "+".join(str(rank) for rank in range(len(case.engines)))


class _PipeRendezvous:
    """What ModelExpress gives a writer: the descriptors that engines published."""

    def __init__(self, descriptors: dict[int, EngineDescriptor]) -> None:
        self._descriptors = descriptors

    def fetch(self, replica: str, incarnation: str, rank: int, *, deadline: float) -> EngineDescriptor:
        return self._descriptors[rank]


class _TrainerProcess:
    """One trainer rank, and its writer."""

    def __init__(self, case: Case, rank: int, group_bytes: int, descriptors: list[EngineDescriptor]) -> None:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        self._engine_device = case.engine_device
        parameters = trainer_parameters(case.engines[0].layers, device, distinct=DISTINCT)
        held = [shards(parameters, each, case.trainers) for each in range(case.trainers)]
        self._slots = SlotArena(
            rank=rank,
            local=held[rank],
            layouts=[local.layout(each) for each, local in enumerate(held)],
            format_="auto",
            group_bytes=group_bytes,
            zero_copy=case.zero_copy,
        )
        self._agent = Agent(f"trainer-{rank}")
        rendezvous: Any = _PipeRendezvous(dict(enumerate(descriptors)))
        self._writer = Writer(rank=rank, agent=self._agent, slots=self._slots, rendezvous=rendezvous)
        started = time.perf_counter()
        plans = self._writer.learn({"r": _word(case)}, Deadline(TIMEOUT_S), catch_up=False)
        self.joined = {
            "plans": plans,
            "bytes": sum(peer.length_bytes for peer in self._writer._peers.values()),
            "groups": len(self._slots.groups),
            "learn_seconds": time.perf_counter() - started,
        }
        torch.cuda.reset_peak_memory_stats()

    def serve(self, pipe: Any) -> None:
        pipe.send(self.joined)
        while True:
            match hear(pipe):
                case ("convert",):
                    pipe.send(wall(self._slots.fill))
                case ("measure",):
                    pipe.send(wall(self._measure))
                case ("write", record):
                    self._measure_for(record)
                    pipe.send(self._writer.write(record, record.members.keys(), Deadline(TIMEOUT_S), frozenset).bytes)
                case ("convert_and_write", record):
                    everyone = record.members.keys()
                    self._writer.begin()
                    pipe.send(self._writer.convert_and_write(record, everyone, Deadline(TIMEOUT_S), frozenset).bytes)
                case ("floor",):
                    pipe.send(self._floor())
                case ("naive",):
                    pipe.send(self._naive())
                case ("memory",):
                    peak = torch.cuda.max_memory_allocated()
                    pipe.send({"arena_bytes": self._slots.buffer.nbytes, "peak_bytes": peak})
                case _:
                    self._writer.close()
                    self._agent.close()
                    return

    def _measure(self) -> None:
        for planned in self._writer._planned.values():
            for meter in planned.meters:
                meter.launch()
            planned.partials()

    def _floor(self) -> float:
        """What a push of this rank takes at least here: its conversions and digests, each group copied beside the next one's."""
        groups, arena = self._slots.groups, self._slots.buffer
        starts = [0, *(group.stop_bytes for group in groups)]
        room = max(stop - start for start, stop in itertools.pairwise(starts))
        there = torch.empty(room, dtype=torch.uint8, device=torch.device("cuda", self._engine_device))
        beside = torch.cuda.Stream()

        def run() -> None:
            self._slots.begin()
            for number, (start, stop) in enumerate(itertools.pairwise(starts)):
                self._slots.fill_group(number)
                for planned in self._writer._planned.values():
                    planned.meters[number].launch()
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    there[: stop - start].copy_(arena[start:stop], non_blocking=True)

        return wall(run)

    def _measure_for(self, record: PushRecord) -> None:
        """The arena is the same for all pushes that are timed: its digests are taken before the first."""
        self._writer.measure(record)

    def _naive(self) -> Row:
        """Convert tensor by tensor with torch, all of them; then one handle a write of at most a MiB, drained by 100."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for slot in self._slots._mine.slots:
            if slot.scales is not None:
                naive_fp8(self._slots._source(slot))
        torch.cuda.synchronize()
        converted = time.perf_counter()
        window: list[Transfer] = []
        for peer, local, there in self._regions():
            for offset in range(0, local.length_bytes, NAIVE_WRITE_BYTES):
                length = min(NAIVE_WRITE_BYTES, local.length_bytes - offset)
                parts = [
                    dataclasses.replace(region, address=region.address + offset, length_bytes=length)
                    for region in (local, there)
                ]
                window.append(self._agent.prepare(peer, parts[:1], parts[1:]))
                window[-1].post()
                if len(window) == NAIVE_WINDOW:
                    _drain(window)
        _drain(window)
        return {"seconds": time.perf_counter() - started, "convert_seconds": converted - started}

    def _regions(self) -> list[tuple[str, Region, Region]]:
        """(agent, local, remote) of every write, as the writer prepared them."""
        regions = []
        for key, peer in self._writer._peers.items():
            planned, met = self._writer._planned[peer.layout_digest], self._writer._met[key]
            for parts in planned.parts:
                pairs = _pairs(planned.plan, parts, met.descriptor)
                regions += [(peer.agent_name, local, remote) for local, remote in pairs]
        return regions


def _trainer(pipe: Any, case: Case, rank: int, group_bytes: int, descriptors: list[EngineDescriptor]) -> None:
    os.environ["UCX_TLS"] = UCX_TLS
    _TrainerProcess(case, rank, group_bytes, descriptors).serve(pipe)


def shards(parameters: dict[str, torch.Tensor], rank: int, ranks: int) -> LocalSources:
    """What one of `ranks` FSDP2 ranks holds: rows as torch.chunk gives them, experts whole."""
    whole = sources_of(((name, value.to("meta")) for name, value in parameters.items()), QWEN_MOE)
    pieces, used = [], 0
    for name, value in parameters.items():
        width = value[0].numel() if value.dim() > 1 else 1
        chunk = -(-len(value) // ranks)
        low, high = min(rank * chunk, len(value)), min((rank + 1) * chunk, len(value))
        local = value[low:high]
        for part, shape, at in QWEN_MOE.parts(name, tuple(value.shape)):
            start, stop = max(low * width, at), min(high * width, at + math.prod(shape))
            if start < stop:
                pieces.append(LocalPiece(part, start - at, stop - at, used, local, start - low * width))
                used += stop - start
    return LocalSources(whole.tensors, tuple(pieces))


def _drain(window: list[Transfer]) -> None:
    for transfer in window:
        while transfer.in_flight:
            pass
        transfer.release()
    window.clear()

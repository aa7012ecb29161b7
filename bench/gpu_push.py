"""Pushes between processes on one or two GPUs through the product's writer, arena, plan and digests; bytes checked there.

One process a trainer rank and one an engine rank, NIXL between them. The rendezvous is a pipe: what is measured is the data path.
`bench.gpu` calls `pushes`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.shapes import Engine, trainer_parameters
from weightsync.conversion import fp8
from weightsync.layout.families import QWEN_MOE
from weightsync.layout.forms import FP8, SCALE_SUFFIX
from weightsync.layout.records import TargetLayout
from weightsync.layout.shards import LocalPiece, LocalSources, sources_of
from weightsync.meter import TensorMeter
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.transport import Agent, Region, Transfer
from weightsync.waiting import Deadline
from weightsync.writer import Writer

RUNS = 7
TIMEOUT_S = 120.0
NAIVE_WRITE_BYTES = 1 << 20
NAIVE_WINDOW = 100
"""Handles that the naive way keeps in flight before it drains them."""
UCX_TLS = "cuda_ipc,cuda_copy,sm,tcp,self"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One fleet to push to."""

    what: str
    engines: tuple[Engine, ...]
    trainers: int = 1
    """Ranks that share the model's rows, as FSDP does."""
    engine_device: int = 0
    staged: bool = False
    """Whether the engine also commits from staging memory, which takes that much memory more."""


def pushes(case: Case, *, copy_gbps: float, group_bytes: int) -> list[Row]:
    """All rows of one fleet. copy_gbps: payload of a plain copy between the same devices.

    Processes of its own: UCX keeps what it mapped of another process, and so that one's memory, until its own process ends.
    """
    context = mp.get_context("spawn")
    engines = [_spawn(context, _engine, engine, number, case, copy_gbps) for number, engine in enumerate(case.engines)]
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
        equal = self._check()
        return [
            _row("wire alone, prepared transfers", payload, wire_s, copy_gbps) | self._base | equal,
            _row("convert alone", payload, convert_s, copy_gbps),
            _row("writer's digests alone", payload, measure_s, copy_gbps),
            _row("convert, digest and wire, group by group", payload, both_s, copy_gbps)
            | {"over_the_longest": both_s / max(convert_s, wire_s)},
            *([] if self._case.trainers > 1 else [self._naive(payload, copy_gbps)]),
            *(row for pipe in self._engines for row in ask(pipe, "rows")),
            {"what": "memory of a trainer", "seconds": 0.0, "gbps": 0.0, **self._all("memory")[0]},
        ]

    def _all(self, *words: Any) -> list[Any]:
        for pipe in self._trainers:
            pipe.send(words)
        return [hear(pipe) for pipe in self._trainers]

    def _push(self, how: str) -> float:
        """Median of pushes, each until every engine has heard the last word of every writer; the first one is not counted."""
        times = []
        for _ in range(RUNS + 1):
            record = self._record()
            started = time.perf_counter()
            self._all(how, record)
            for pipe in self._engines:
                assert hear(pipe) == record.version
            times.append(time.perf_counter() - started)
        return sorted(times[1:])[RUNS // 2]

    def _record(self) -> PushRecord:
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
        )

    def _check(self) -> Row:
        """Engines compare digests with the writers' and bytes with their own conversion of the same weights."""
        found = [ask(pipe, "check") for pipe in self._engines]
        return {"digests_equal": all(f["digests"] for f in found), "bytes_equal": all(f["bytes"] for f in found)}

    def _naive(self, payload: int, copy_gbps: float) -> Row:
        (found,) = self._all("naive")
        row = _row("the naive way: convert all, one handle a MiB", payload, found["seconds"], copy_gbps)
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
        parameters = trainer_parameters(case.engines[0].layers, device, distinct=DISTINCT)
        held = [shards(parameters, each, case.trainers) for each in range(case.trainers)]
        self._slots = SlotArena(
            rank=rank,
            local=held[rank],
            layouts=[local.layout(each) for each, local in enumerate(held)],
            format_="auto",
            agree=_alone,
            group_bytes=group_bytes,
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
            for writes in planned.writes:
                pairs = self._writer._pairs(planned.plan, writes, met.descriptor)
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
        rows = [_row("receiver's digest of live memory", payload, measured, 0.0)]
        if self._staging:
            live, staged = list(self._live.values()), list(self._staging.values())
            copy_s = wall(lambda: torch._foreach_copy_(live, staged))  # pyright: ignore[reportPrivateImportUsage]
            rows.append(_row("staged commit: copy", payload, copy_s, self._copy_gbps))
            row = _row("staged commit: copy, and digest of live memory", payload, copy_s + measured, self._copy_gbps)
            rows.append(row)
        return rows


def _by_index(note: Notification, count: int) -> list[int]:
    return [note.partial_digests.get(index, 0) for index in range(count)]


def _engine(pipe: Any, engine: Engine, number: int, case: Case, copy_gbps: float) -> None:
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


DISTINCT = 4
"""Layers with weights of their own; the others share them."""


def naive_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As one writes it with torch: the reference, tensor by tensor."""
    scales = fp8.scales_of(fp8.block_amax(rows))
    return fp8.quantize(rows, scales), scales


def wall(run: Callable[[], object]) -> float:
    """Median wall time, the device idle before and after."""
    times = []
    for _ in range(RUNS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[RUNS // 2]


def ask(pipe: Any, *words: str) -> Any:
    pipe.send(words)
    return hear(pipe)


def hear(pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"an engine said nothing for {TIMEOUT_S:.0f} s")
    return pipe.recv()


def _drain(window: list[Transfer]) -> None:
    for transfer in window:
        while transfer.in_flight:
            pass
        transfer.release()
    window.clear()


def _row(what: str, payload: int, seconds: float, limit: float) -> Row:
    rate = payload / seconds / 1e9
    return {"what": what, "seconds": seconds, "gbps": rate} | ({"share_of_copy": rate / limit} if limit else {})


def _alone(amax: torch.Tensor) -> torch.Tensor:
    return amax


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)

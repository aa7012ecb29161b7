"""One engine rank and one trainer in this process, with real NIXL agents and a real ledger; ModelExpress is a dictionary."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("UCX_TLS", "tcp,self")  # read by UCX when the first agent is made

import torch

from tests.dataplane.slot_makers import engine, shard
from tests.fixtures.fleet import until
from weightsync import verify
from weightsync.config import (
    Contract,
    EndpointSection,
    FabricSection,
    ModelExpressSection,
    ModelSection,
    PodFacts,
    RedisSection,
    TransferSection,
)
from weightsync.layout.records import Fill, SourceTensor, Target, TargetLayout
from weightsync.receiver import Receiver
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.rendezvous.records import PushRecord, WriterReport
from weightsync.replay import Count, require_complete, target_of, with_replayed
from weightsync.slots import SlotArena
from weightsync.staging import StagingArena
from weightsync.transport import Agent
from weightsync.waiting import Deadline
from weightsync.wire import Decision
from weightsync.writer import Writer, Written

REPLICA = "engine-0"
SHAPES = {"a": (96, 40), "b": (7, 33), "c": (300, 2), "vocab": (10, 16)}
PAD_ROWS = 2
PADDING = 7.0


def layout_with_padding() -> TargetLayout:
    """An engine that wants each tensor as it is, and keeps PAD_ROWS rows more of the vocabulary, which its loader filled."""
    plain = engine([SourceTensor(name, shape, "bfloat16") for name, shape in SHAPES.items()])
    rows, width = SHAPES["vocab"]
    targets = tuple(
        Target(t.name, (rows + PAD_ROWS, width), t.dtype) if t.name == "p.vocab" else t for t in plain.targets
    )
    bits = int(torch.tensor([PADDING], dtype=torch.bfloat16).view(torch.int16))
    fill = Fill("p.vocab", rows * width, (1,), (PAD_ROWS * width,), bits)
    return dataclasses.replace(plain, targets=targets, fills=(fill,))


def without(layout: TargetLayout, name: str) -> TargetLayout:
    """The layout less one target."""
    targets = tuple(target for target in layout.targets if target.name != name)
    copies = tuple(copy for copy in layout.copies if copy.target != name)
    used = {copy.source for copy in copies}
    sources = tuple(source for source in layout.sources if source.name in used)
    return dataclasses.replace(layout, targets=targets, copies=copies, sources=sources)


def weights_of(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


class FlippingReplay:
    """A `Replay` of one tensor, whose kernel wants the rows in reverse, of which a loader may lose the last ones."""

    def __init__(self, source: SourceTensor) -> None:
        self._room = {target_of(source.name): torch.zeros(source.shape, dtype=torch.bfloat16)}
        self._arena = StagingArena(self._room, place="device", budget_bytes=None)
        self._made = torch.zeros(source.shape, dtype=torch.bfloat16)
        self.live = torch.zeros(source.shape, dtype=torch.bfloat16)
        self.lost_rows = 0

    @property
    def staged(self) -> Mapping[str, torch.Tensor]:
        return self._arena.tensors

    @property
    def memory(self) -> torch.Tensor:
        return self._arena.buffer

    def prepare(self, wanted: Callable[[], bool]) -> None:
        (staged,) = self.staged.values()
        if self.lost_rows:
            have, width = staged.numel() - self.lost_rows * staged.shape[1], staged.numel()
            require_complete(Count({"live": width}, {}), Count({"live": have}, {}), "layer")
        self._made.copy_(staged.flip(0))

    def apply(self) -> Mapping[str, int]:
        self.live.copy_(self._made)
        return {"live": verify.digest_tensor("live", self._made)}

    def measure(self) -> Mapping[str, int]:
        return {"live": verify.digest_tensor("live", self.live)}

    def retire(self) -> None:
        self._arena = self._arena.retire(self._room)


class Book:
    """What ModelExpress would know."""

    def __init__(self) -> None:
        self.sources: dict[str, EngineDescriptor] = {}

    def renew(self, source: EngineDescriptor, *, deadline: float | None = None) -> None:
        self.sources[source.worker_id] = source

    def fetch(self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None) -> EngineDescriptor:
        return until("the engine is published", lambda: self.sources.get(f"{replica}/{incarnation}/{rank}"), 10)


class Bench:
    """A session of one engine rank and the trainers that push into it."""

    def __init__(
        self, open_ledger: Callable[..., Ledger], *, revocation: str = "agent", replayed: str = "", **transfer: Any
    ) -> None:
        """`replayed` names a tensor that the engine takes in load format only."""
        self._open_ledger = open_ledger
        self._replayed = replayed
        self.ledger = open_ledger()
        self.book: Any = Book()
        self.contract = Contract(
            session="s1",
            name="test",
            model=ModelSection(path="/none"),
            redis=RedisSection(host="127.0.0.1"),
            model_express=ModelExpressSection(address="none:1"),
            endpoint=EndpointSection(token_file="/none"),
            fabric=FabricSection(profile="emulated", transports=("tcp",), revocation=revocation),  # type: ignore[arg-type]
            transfer=TransferSection(**{"timeout_seconds": 20.0, **transfer}),
        )
        self.epoch = self.ledger.open_epoch()
        self.replay: FlippingReplay | None = None
        self.refreshed = 0
        self.params, self.receiver = self.make_receiver(REPLICA)
        self._trainers: list[Pusher] = []

    def make_receiver(
        self, name: str, more: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], Receiver]:
        """Another engine rank of the session, with its live parameters, and `more` that are no targets."""
        layout, self.replay = layout_with_padding(), None
        if replayed := self._replayed:
            source = SourceTensor(replayed, SHAPES[replayed], "bfloat16")
            layout, self.replay = with_replayed(without(layout, f"p.{replayed}"), [source]), FlippingReplay(source)
        written = [target for target in layout.targets if target.name.startswith("p.")]
        params = {t.name: torch.full(t.shape, PADDING, dtype=torch.bfloat16) for t in written}
        staging = None
        if self.contract.transfer.staging != "none":
            staging = StagingArena(params, place=self.contract.transfer.staging, budget_bytes=None)
        receiver = Receiver(
            contract=self.contract,
            facts=PodFacts(name=name, uid=f"uid-{name}", ip="127.0.0.1", epoch=None),
            replica=name,
            rank=0,
            params=params | dict(more or {}),
            layout=layout,
            ledger=self._open_ledger(),
            rendezvous=self.book,
            staging=staging,
            refresh=self._refresh,
            replay=self.replay,
        )
        return params, receiver

    def _refresh(self) -> None:
        self.refreshed += 1

    def trainer(
        self, *, ranks: int = 1, rank: int = 0, budget_bytes: int | None = None, zero_copy: bool = False
    ) -> Pusher:
        """A trainer rank out of `ranks`, each of which holds some rows; `budget_bytes` is of its arena."""
        self._trainers.append(Pusher(self, ranks, rank, budget_bytes, zero_copy))
        return self._trainers[-1]

    def begin(self, trainer: Pusher, *, writers: int = 1, timeout_s: float = 20.0, **changes: Any) -> PushRecord:
        """Open a push in the ledger for the engine as it is now."""
        members = {REPLICA: replica_incarnation([self.receiver.incarnation])}
        plans = trainer.writer.learn(members, Deadline(10), catch_up=bool(changes.get("catch_up")))
        return self.ledger.begin_push(
            epoch=self.epoch,
            sequence=1,
            step=0,
            timeout_s=timeout_s,
            writers=writers,
            members=members,
            plan_digests=plans,
            verify=self.contract.transfer.verify,
            **changes,
        )

    def deliver(self, trainer: Pusher, version: int, **changes: Any) -> PushRecord:
        """A push of `weights_of(version)` up to the engine's vote."""
        record = self.begin(trainer, **changes)
        trainer.fill(version)
        trainer.writer.measure(record)
        self.receiver.open(record)
        trainer.write(record)
        self.voted(record)
        return record

    def voted(self, record: PushRecord) -> None:
        """Wait for the engine's vote."""
        until("the engine has voted", lambda: self.ledger.votes(record.push_id), 15)

    def push(self, trainer: Pusher, version: int, **changes: Any) -> PushRecord:
        """A push that is committed."""
        record = self.deliver(trainer, version, **changes)
        assert self.ledger.decide(record.push_id, Decision.COMMIT).decision is Decision.COMMIT
        self.receiver.commit(record.push_id)
        return record

    def holds(self, version: int) -> bool:
        """Whether live memory is that version, padding untouched."""
        weights = weights_of(version)
        if self.replay is not None and not torch.equal(self.replay.live, weights.pop(self._replayed).flip(0)):
            return False
        rows = SHAPES["vocab"][0]
        return bool((self.params["p.vocab"][rows:] == PADDING).all()) and all(
            torch.equal(self.params[f"p.{name}"].reshape(-1)[: value.numel()], value.reshape(-1))
            for name, value in weights.items()
        )

    def close(self) -> None:
        for trainer in self._trainers:
            trainer.writer.close()
            trainer.agent.close()
        self.receiver.close()


class Pusher:
    """One trainer rank."""

    def __init__(
        self, bench: Bench, ranks: int, rank: int, budget_bytes: int | None = None, zero_copy: bool = False
    ) -> None:
        self._bench = bench
        self._ranks, self._rank = ranks, rank
        self._held = {name: torch.zeros(*shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
        locals_ = shard(self._held, ranks)
        self._local = locals_[rank]
        slots = SlotArena(
            rank=rank,
            local=self._local,
            layouts=[local.layout(i) for i, local in enumerate(locals_)],
            format_="auto",
            budget_bytes=budget_bytes,
            zero_copy=zero_copy,
        )
        self.slots = slots
        self.agent = Agent(f"trainer/{rank}/{time.time_ns()}")
        self.writer = Writer(rank=rank, agent=self.agent, slots=slots, rendezvous=bench.book)

    def fill(self, version: int) -> None:
        """Convert `weights_of(version)` into the arena."""
        self._change(version)
        self.writer.fill()

    def _change(self, version: int) -> None:
        mine = shard(weights_of(version), self._ranks)[self._rank]
        for piece, new in zip(self._local.pieces, mine.pieces, strict=True):
            piece.flat().copy_(new.flat())

    def convert_and_write(self, record: PushRecord, version: int) -> Written:
        """As `fill` and `write`, group by group."""
        self._change(version)
        self.writer.begin()
        return self._tell(record, self.writer.convert_and_write(record, *self._to_all(record, frozenset())))

    def write(self, record: PushRecord, *, lost: frozenset[str] = frozenset()) -> Written:
        """Write into the engine and tell the ledger."""
        return self._tell(record, self.writer.write(record, *self._to_all(record, lost)))

    def _to_all(
        self, record: PushRecord, lost: frozenset[str]
    ) -> tuple[frozenset[str], Deadline, Callable[[], frozenset[str]]]:
        deadline = Deadline.at(self._bench.ledger.deadline_to_monotonic(record.deadline_at))
        return frozenset(record.members), deadline, lambda: lost

    def _tell(self, record: PushRecord, written: Written) -> Written:
        report = WriterReport(rank=self._rank, ok=True, failed=written.failed, in_flight=written.in_flight)
        self._bench.ledger.report_writer(record.push_id, report)
        return written

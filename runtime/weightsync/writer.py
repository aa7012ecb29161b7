"""A trainer rank's hands: learns the engines of a push, prepares a transfer for each of them and group, writes, and says so.

The coordinator decides when; this module knows how. Peers and prepared transfers are kept between pushes by incarnation, so
that a push to an unchanged fleet plans, connects and prepares nothing. Imports torch and the transport, never vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import numpy as np
import torch

from weightsync import collector, pipeline, verify
from weightsync.errors import DeadlineExceeded, FencedOut, PlanError, TransportError
from weightsync.layout.held import Held
from weightsync.layout.records import ITEM_BYTES, TargetLayout
from weightsync.meter import WritesMeter
from weightsync.plan import Plan, make_plan
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.incarnation import RankKey, replica_ranks
from weightsync.rendezvous.modelexpress import EngineDescriptor
from weightsync.rendezvous.records import PushRecord
from weightsync.scale_exchange import Agree, alone
from weightsync.slots import Part, SlotArena
from weightsync.telemetry import Span
from weightsync.transport import Agent, Region, Transfer, TransferState
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

TRANSFER_POLL_S = 0.0005
GRACE_S = 1.5
"""After the deadline a transfer gets so long to become terminal; then only the end of this process stops it. Whoever waits for
another rank's word on a push gives it as much: no wait outlives the deadline by 2 s."""


class Directory(Protocol):
    """Where a writer learns how an engine rank is written to: `rendezvous.modelexpress.Rendezvous` in a session."""

    def fetch(
        self, replica: str, incarnation: str, rank: int, *, deadline: float | None = None
    ) -> EngineDescriptor: ...


@dataclasses.dataclass(frozen=True)
class _Met:
    """What an engine rank published."""

    layout_digest: str
    descriptor: EngineDescriptor


@dataclasses.dataclass(frozen=True)
class _Peer:
    """One engine rank as this writer reaches it."""

    agent_name: str
    layout_digest: str
    transfers: tuple[Transfer | None, ...]
    """By group of the arena; None where this rank has nothing to write there. It notifies all the same."""

    @property
    def length_bytes(self) -> int:
        return sum(transfer.length_bytes for transfer in self.prepared)

    @property
    def prepared(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if transfer is not None]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What this rank writes into the engines of one layout."""

    plan: Plan
    parts: tuple[Sequence[Part], ...]
    """By group of the arena."""
    meters: tuple[WritesMeter, ...]

    def partials(self) -> dict[int, int]:
        """This rank's share of each target's digest, by target index."""
        return WritesMeter.read(self.meters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """How this rank's writes of one push ended."""

    bytes: int
    """Payload of those that went well."""
    failed: dict[str, str]
    """Why, for each replica that did not get all its bytes."""
    in_flight: tuple[str, ...]
    """Those of them towards which bytes may still move."""


class Writer:
    """Writes this rank's slots into engines; registers their memory with `agent` whenever it is laid out anew."""

    def __init__(self, *, rank: int, agent: Agent, slots: SlotArena, rendezvous: Directory) -> None:
        self._rank = rank
        self._agent = agent
        self._slots = slots
        self._rendezvous = rendezvous
        self._met: dict[RankKey, _Met] = {}
        self._layouts: dict[str, TargetLayout] = {}
        self._held = Held(())
        self._planned: dict[str, _Planned] = {}
        self._peers: dict[RankKey, _Peer] = {}
        self._partials: dict[str, dict[int, int]] = {}
        self._polling = threading.Lock()
        """Two threads wait for handles while groups are converted; one looks at a handle at a time."""
        self._stuck: list[tuple[_Peer, Deadline]] = []
        """Peers that were lost while bytes were on their way, and the deadline of that push."""
        self._registered: list[int] = []

    @property
    def keeps_versions(self) -> bool:
        """Whether the arenas of all ranks hold a whole version after its push, for engines that are late."""
        return self._slots.whole

    def learn(self, members: Mapping[str, str], deadline: Deadline, *, catch_up: bool) -> dict[str, str]:
        """Plan for, connect to and prepare writes into every rank of `members` (replica -> incarnation).

        Returns the plan's digest by layout digest. A catch-up takes the arena as it is: the model may have changed since. Raises
        RendezvousUnavailable when ModelExpress does not know a member, CoverageError or PlanError when trainer and engine do not
        fit, or a catch-up needs what the arena does not carry.
        """
        keys = [key for replica, word in members.items() for key in replica_ranks(replica, word)]
        for key in keys:
            if key not in self._met:
                self._forget_predecessors(key)
                self._met[key] = self._meet(key, deadline)
        self._lay_out({self._met[key].layout_digest for key in keys}, catch_up)
        for key in keys:
            if key not in self._peers:
                self._peers[key] = self._connect(self._met[key])
        return {digest: self._planned[digest].plan.digest for digest in {self._met[key].layout_digest for key in keys}}

    def fill(self, agree: Agree = alone) -> None:
        """Convert the model as it is now into the arena. Raises ConversionError naming a tensor.

        Waits first for transfers to peers that were lost in an earlier push: they read the arena.
        """
        self._wait_stuck()
        self._partials.clear()
        self._slots.fill(agree)

    def measure(self, record: PushRecord) -> None:
        """Digest what the arena brings to each layout of a push, unless that was done since it was filled."""
        for digest in record.plan_digests:
            if record.verify != "off" and digest not in self._partials:
                planned = self._planned[digest]
                for meter in planned.meters:
                    meter.launch()
                self._partials[digest] = planned.partials()

    def write(
        self, record: PushRecord, replicas: Set[str], deadline: Deadline, lost: Callable[[], Set[str]]
    ) -> Written:
        """Write what the arena holds into every rank of `replicas`, and notify each when all writes to it are done.

        Peers that fail are told in the result, and so are those of `lost()` replicas that bytes are still on their way to. A
        handle that is in flight GRACE_S after the deadline ends this process: nothing else can stop it (design section 8).
        """
        peers = self._peers_of(record, replicas)
        try:
            for number in range(len(self._slots.groups)):
                _post(peers.values(), number)
            return self._finish(record, peers, deadline, lost)
        except BaseException:  # who reports an error reports that nothing is in flight
            self._wait_terminal([t for peer in peers.values() for t in peer.prepared], deadline, record.push_id)
            raise

    def begin(self, agree: Agree = alone) -> None:
        """Before `convert_and_write`, and before any engine is opened: agree with the other ranks on FP8 blocks that straddle them.

        Waits for them as long as `agree` does; writes nothing to the arena.
        """
        self._slots.begin(agree)

    def convert_and_write(
        self, record: PushRecord, replicas: Set[str], deadline: Deadline, lost: Callable[[], Set[str]]
    ) -> Written:
        """As `fill`, `measure` and `write`, each group on the wire while the next one is converted; after `begin`.

        Bytes leave before all are known to be finite: only for engines that do not serve what arrives until it is committed.
        Raises ConversionError naming a tensor, with every handle terminal.
        """
        self._wait_stuck()
        peers = self._peers_of(record, replicas)
        layouts = {digest: self._planned[digest] for digest in record.plan_digests if record.verify != "off"}
        self._partials.clear()
        transfers = [transfer for peer in peers.values() for transfer in peer.prepared]

        def convert(number: int) -> Callable[[], bool]:
            ready = self._slots.fill_group(number)
            for planned in layouts.values():
                planned.meters[number].launch()
            return ready

        try:
            pipeline.run(
                len(self._slots.groups),
                convert,
                lambda number: self._post_elsewhere(peers.values(), number),
                lambda: self._poll(transfers),
                after=self._slots.ring.after,
                await_left=lambda numbers: self._await_left(peers.values(), numbers, deadline, record.push_id),
            )
            self._slots.check()
            self._partials.update({digest: planned.partials() for digest, planned in layouts.items()})
            return self._finish(record, peers, deadline, lost)
        except BaseException:
            self._wait_terminal(transfers, deadline, record.push_id)
            raise

    def _poll(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        with self._polling:
            return _in_flight(transfers)

    def _await_left(self, peers: Iterable[_Peer], groups: Set[int], deadline: Deadline, push_id: str) -> None:
        """Until nothing reads these groups any more, which have been posted. Raises DeadlineExceeded naming who still does."""
        readers = [t for peer in peers for number in groups if (t := peer.transfers[number]) is not None]
        while left := self._poll(readers):
            if deadline.passed:
                slow = ", ".join(sorted({transfer.peer for transfer in left})[:5])
                raise DeadlineExceeded(
                    f"push {push_id}: the arena is full of groups that are on their way to {len(left)} peers, {slow}"
                )
            time.sleep(TRANSFER_POLL_S)

    def _post_elsewhere(self, peers: Iterable[_Peer], number: int) -> None:
        """`_post` from a thread that has not chosen a device: UCX copies by the calling thread's."""
        with torch.cuda.device_of(self._slots.buffer):
            _post(peers, number)

    def delivering(self) -> AbstractContextManager[None]:
        """Around the wait for what engines make of a push: the last words to them are sent on until they are heard."""
        return self._agent.sending_on()

    def settle(self) -> None:
        """Until nothing reads the model's own memory, so that its owner may change it. At once where everything is copied.

        Lost peers are waited for, up to GRACE_S after their push's deadline, when this process ends: nothing else stops a transfer.
        """
        if self._slots.live_memory:
            self._wait_stuck()

    def close(self) -> None:
        """Release every handle; all are terminal between pushes, or end this process."""
        self._wait_stuck()
        for peer in self._peers.values():
            for transfer in peer.prepared:
                transfer.release()
        self._peers.clear()

    def wire_spans(self, record: PushRecord, replicas: Set[str]) -> list[Span]:
        """The wire to each peer of a push that was just written, as NIXL measured it; peers that failed are left out."""
        spans = []
        for key in self._keys_of(record, replicas) & self._peers.keys():
            peer = self._peers[key]
            measured = [times for transfer in peer.prepared if (times := transfer.measured()) is not None]
            if measured:
                began = min(at for at, _ in measured)
                ended = max(at + seconds for at, seconds in measured)
                spans.append(Span("wire", began, ended - began, peer.agent_name, peer.length_bytes))
        return spans

    @staticmethod
    def _keys_of(record: PushRecord, replicas: Set[str]) -> set[RankKey]:
        return {key for name in replicas for key in replica_ranks(name, record.members[name])}

    def _peers_of(self, record: PushRecord, replicas: Set[str]) -> dict[RankKey, _Peer]:
        return {key: self._peers[key] for key in self._keys_of(record, replicas)}

    def _finish(
        self, record: PushRecord, peers: Mapping[RankKey, _Peer], deadline: Deadline, lost: Callable[[], Set[str]]
    ) -> Written:
        """Tell each peer as soon as all that was posted to it is done; wait for all but the lost."""
        written, failed, pending = 0, {}, dict(peers)
        one_of_each = {peer.layout_digest: peer for peer in peers.values()}
        last_words = {digest: self._last_word(record, peer).encode() for digest, peer in one_of_each.items()}
        while pending:
            for key, peer in list(pending.items()):
                if _in_flight(peer.prepared):
                    continue
                del pending[key]
                try:
                    written += self._conclude(peer, last_words[peer.layout_digest])
                except TransportError as error:
                    self._drop(key)
                    failed[key[0]] = f"rank {self._rank} to {peer.agent_name}: {error}"
            if pending and {key[0] for key in pending} <= lost():
                break
            if pending:
                self._check_grace(list(pending.values()), deadline, record.push_id)
                time.sleep(TRANSFER_POLL_S)
        for key in pending:
            failed[key[0]] = f"was lost while rank {self._rank} wrote"
            self._stuck.append((self._peers.pop(key), deadline))
        return Written(bytes=written, failed=failed, in_flight=tuple(sorted({key[0] for key in pending})))

    def _conclude(self, peer: _Peer, last_word: bytes) -> int:
        """The bytes of a peer's transfers, all of them ended, told to it. Raises TransportError when one did not end well."""
        broken = [transfer for transfer in peer.prepared if transfer.poll() is TransferState.FAILED]
        if broken:
            raise TransportError(f"{len(broken)} of {len(peer.prepared)} transfers failed: {broken[0].failure}")
        self._agent.notify(peer.agent_name, last_word)
        return peer.length_bytes

    def _wait_stuck(self) -> None:
        """Until nothing reads the arena on behalf of an earlier push."""
        while self._stuck:
            peer, deadline = self._stuck[-1]  # it stays known until nothing of it is in flight, whatever ends this wait
            self._wait_terminal(peer.prepared, deadline, "that lost this peer")
            self._stuck.pop()
            self._release(peer)

    def _meet(self, key: RankKey, deadline: Deadline) -> _Met:
        replica, rank, incarnation = key
        descriptor = self._rendezvous.fetch(replica, incarnation, rank, deadline=deadline.moment)
        layout = TargetLayout.from_bytes(descriptor.layout)
        self._layouts[layout.digest()] = layout
        return _Met(layout.digest(), descriptor)

    def _lay_out(self, digests: Set[str], catch_up: bool) -> None:
        """Make the arena fit the engines of this push; what was prepared from another arena leads nowhere."""
        engines = {digest: self._layouts[digest] for digest in digests}
        if catch_up:
            if not self._slots.whole:
                raise PlanError("the arenas hold no whole version: peers catch up, or the next push")
            if not self._slots.carries(engines):
                raise PlanError(
                    "the engines to catch up want other formats than the last push had: the next push brings them"
                )
            return
        self._wait_stuck()
        if not self._slots.lay_out(engines):
            return
        self._held = Held(self._slots.layouts)
        for key in list(self._peers):
            self._drop(key)
        self._planned.clear()
        self._partials.clear()
        while self._registered:
            self._agent.deregister(self._registered.pop())
        try:
            self._register(engines)
        except BaseException:
            self._slots.forget()  # or the next attempt would believe that all is registered
            raise

    def _register(self, engines: Mapping[str, TargetLayout]) -> None:
        """The arena, and the model's memory where slots are read there; that is copied where the transport does not take it."""
        if self._slots.live_memory:
            try:
                self._registered.append(self._agent.register(self._slots.live_memory))
            except TransportError as error:
                logger.warning("transfer.zeroCopy: weights are copied after all: %s", error)
                self._slots.copy_all()
                self._slots.lay_out(engines)
                self._held = Held(self._slots.layouts)
        self._registered.append(self._agent.register([self._slots.buffer]))

    def _connect(self, met: _Met) -> _Peer:
        digest = met.layout_digest
        if digest not in self._planned:
            started = time.monotonic()
            self._planned[digest] = self._plan(digest)
            n_writes = sum(len(writes) for parts in self._planned[digest].parts for _, writes in parts)
            took_s = time.monotonic() - started
            logger.info("planned layout %s: %d writes in %.2f s", digest, n_writes, took_s)
        agent_name = self._agent.connect(met.descriptor.metadata)
        planned = self._planned[digest]
        transfers = [
            self._prepare(agent_name, planned.plan, parts, met.descriptor) if parts else None for parts in planned.parts
        ]
        return _Peer(agent_name, digest, tuple(transfers))

    @collector.paused()
    def _plan(self, digest: str) -> _Planned:
        plan = make_plan(self._held, self._slots.wants(digest))
        writes = plan.writes(self._rank)
        item_bytes = np.array([ITEM_BYTES[target.dtype] for target in plan.targets], dtype=np.int64)
        by_group = self._slots.parts(writes, item_bytes)
        meters = tuple(WritesMeter(parts, plan.targets) for parts in by_group)
        return _Planned(plan, by_group, meters)

    def _prepare(self, agent_name: str, plan: Plan, parts: Sequence[Part], descriptor: EngineDescriptor) -> Transfer:
        local, remote = zip(*_pairs(plan, parts, descriptor), strict=True)
        return self._agent.prepare(agent_name, local, remote)

    def _last_word(self, record: PushRecord, peer: _Peer) -> Notification:
        """What a peer is told, and every other one of its layout: a fleet has few, and each model many targets."""
        return Notification(
            session=record.session,
            push_id=record.push_id,
            epoch=record.epoch,
            version=record.version,
            plan_digest=record.plan_digests[peer.layout_digest],
            writer_rank=self._rank,
            bytes_written=peer.length_bytes,
            partial_digests=self._chosen_partials(record, peer.layout_digest),
        )

    def _chosen_partials(self, record: PushRecord, digest: str) -> dict[int, int]:
        """This rank's share of the targets that the push measures, by target index."""
        if record.verify != "sampled":
            return {} if record.verify == "off" else self._partials[digest]
        targets = self._planned[digest].plan.targets
        names = verify.chosen_names((t.name for t in targets), mode=record.verify, push_id=record.push_id)
        return {index: part for index, part in self._partials[digest].items() if targets[index].name in names}

    def _wait_terminal(self, transfers: Sequence[Transfer], deadline: Deadline, push_id: str) -> None:
        while _in_flight(transfers):
            self._check_grace(transfers, deadline, push_id)
            time.sleep(TRANSFER_POLL_S)

    def _check_grace(self, waited_for: Sequence[_Peer] | Sequence[Transfer], deadline: Deadline, push_id: str) -> None:
        """End this process once bytes are on their way GRACE_S after the deadline: nothing else stops them."""
        if deadline.left_s >= -GRACE_S:
            return
        peers = sorted({each.agent_name if isinstance(each, _Peer) else each.peer for each in waited_for})
        logger.critical(
            "push %s: transfers to %d peers in flight %.1f s after the deadline, %s; ending this process: nothing else stops them",
            push_id,
            len(peers),
            GRACE_S,
            ", ".join(peers[:5]),
        )
        sys.stderr.flush()
        os._exit(70)

    def _forget_predecessors(self, key: RankKey) -> None:
        """A replica that restarted has another incarnation; what was prepared for the last one leads nowhere."""
        for other in [other for other in self._met if other[:2] == key[:2]]:
            del self._met[other]
            if other in self._peers:
                self._drop(other)

    def _drop(self, key: RankKey) -> None:
        """Forget a peer; a connection that failed once is made anew, also towards the same incarnation."""
        self._release(self._peers.pop(key))

    def _release(self, peer: _Peer) -> None:
        for transfer in peer.prepared:
            transfer.release()
        with suppress(TransportError):  # NIXL itself forgets a peer whose connection broke
            self._agent.disconnect(peer.agent_name)


def _pairs(plan: Plan, parts: Sequence[Part], descriptor: EngineDescriptor) -> Iterator[tuple[Region, Region]]:
    """(local, remote) of each write."""
    remote = [(descriptor.tensors[target.name], ITEM_BYTES[target.dtype]) for target in plan.targets]
    for memory, writes in parts:
        address, device_id = memory.data_ptr(), max(memory.get_device(), 0)
        for slot, index, offset, length in writes.tolist():
            tensor, item_bytes = remote[index]
            here, there, length_bytes = (count * item_bytes for count in (slot, offset, length))
            yield (
                Region(address=address + here, length_bytes=length_bytes, device_id=device_id),
                Region(address=tensor.address + there, length_bytes=length_bytes, device_id=tensor.device_id),
            )


def _in_flight(transfers: Sequence[Transfer]) -> list[Transfer]:
    """Those that have not ended. Each is polled, which is what moves it on."""
    return [transfer for transfer in transfers if transfer.in_flight]


def _post(peers: Iterable[_Peer], number: int) -> None:
    """Start one group's writes into every peer."""
    for peer in peers:
        transfer = peer.transfers[number]
        if transfer is not None:
            transfer.post()


def check_plans(record: PushRecord, mine: Mapping[str, str]) -> None:
    """Raise FencedOut unless this rank planned what the coordinator did, for every layout."""
    for layout_digest, plan_digest in record.plan_digests.items():
        if mine.get(layout_digest) != plan_digest:
            raise FencedOut(
                f"push {record.push_id}: the coordinator's plan of layout {layout_digest} is {plan_digest}, this rank's is "
                f"{mine.get(layout_digest)}: do all ranks run the same version of weightsync on the same model?"
            )

"""A trainer rank's hands: learns the engines of a push, prepares a transfer for each of them and group, writes, and says so.

The coordinator decides when; this module knows how. Peers and prepared transfers are kept between pushes by incarnation, so
that a push to an unchanged fleet plans, connects and prepares nothing. Imports the transport, never vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import numpy as np

from weightsync import pipeline
from weightsync.errors import FencedOut, PlanError, TransportError
from weightsync.layout.held import Held
from weightsync.layout.records import ITEM_BYTES, TargetLayout
from weightsync.meter import WritesMeter
from weightsync.plan import Plan, make_plan
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.incarnation import RankKey, replica_ranks
from weightsync.rendezvous.modelexpress import EngineDescriptor, Rendezvous
from weightsync.rendezvous.records import PushRecord
from weightsync.slots import SlotArena
from weightsync.transport import Agent, Region, Transfer, TransferState
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

TRANSFER_POLL_S = 0.0005
GRACE_S = 10.0
"""After the deadline a transfer gets so long to become terminal; then only the end of this process stops it."""


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
    writes: tuple[np.ndarray, ...]
    """By group of the arena; dtype `plan.WRITE`."""
    meters: tuple[WritesMeter, ...]

    def partials(self) -> dict[int, int]:
        """This rank's share of each target's digest, by target index."""
        return WritesMeter.read(self.meters)


class Writer:
    """Writes this rank's slot arena into engines; registers it with `agent` whenever it is laid out anew."""

    def __init__(self, *, rank: int, agent: Agent, slots: SlotArena, rendezvous: Rendezvous) -> None:
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

    def fill(self) -> None:
        """Convert the model as it is now into the arena. Raises ConversionError naming a tensor."""
        self._partials.clear()
        self._slots.fill()

    def measure(self, record: PushRecord) -> None:
        """Digest what the arena brings to each layout of a push, unless that was done since it was filled."""
        for digest in record.plan_digests:
            if digest not in self._partials:
                planned = self._planned[digest]
                for meter in planned.meters:
                    meter.launch()
                self._partials[digest] = planned.partials()

    def write(self, record: PushRecord, deadline: Deadline) -> int:
        """Write what the arena holds into every rank of every member, and notify each when all writes to all of them are done.

        Returns the bytes written. Raises TransportError naming the peers that failed, with every handle terminal. A handle that
        is still in flight GRACE_S after the deadline ends this process: nothing else can stop it (design section 8).
        """
        peers = self._peers_of(record)
        for number in range(len(self._slots.groups)):
            _post(peers, number)
        return self._finish(record, peers, deadline)

    def convert_and_write(self, record: PushRecord, deadline: Deadline) -> int:
        """As `fill`, `measure` and `write`, each group on the wire while the next one is converted.

        Bytes leave before all are known to be finite: only for engines that do not serve what arrives until it is committed.
        Raises as `write` does, and ConversionError naming a tensor, with every handle terminal.
        """
        peers, layouts = self._peers_of(record), [self._planned[digest] for digest in record.plan_digests]
        self._partials.clear()
        transfers = [transfer for peer in peers for transfer in peer.prepared]

        def convert(number: int) -> Callable[[], bool]:
            ready = self._slots.fill_group(number)
            for planned in layouts:
                planned.meters[number].launch()
            return ready

        self._slots.begin()
        try:
            pipeline.run(
                len(self._slots.groups),
                convert,
                lambda number: _post(peers, number),
                lambda: any(transfer.in_flight for transfer in transfers),
            )
            self._slots.check()
        except BaseException:
            self._wait_terminal(transfers, deadline, record.push_id)
            raise
        for digest in record.plan_digests:
            self._partials[digest] = self._planned[digest].partials()
        return self._finish(record, peers, deadline)

    def close(self) -> None:
        """Release every handle; all are terminal between pushes."""
        for peer in self._peers.values():
            for transfer in peer.prepared:
                transfer.release()
        self._peers.clear()

    def _peers_of(self, record: PushRecord) -> list[_Peer]:
        return [self._peers[key] for replica, word in record.members.items() for key in replica_ranks(replica, word)]

    def _finish(self, record: PushRecord, peers: Sequence[_Peer], deadline: Deadline) -> int:
        """Wait for what was posted, and tell every peer. Returns the bytes written."""
        transfers = [transfer for peer in peers for transfer in peer.prepared]
        self._wait_terminal(transfers, deadline, record.push_id)
        failed = [transfer for transfer in transfers if transfer.poll() is TransferState.FAILED]
        if failed:
            self._forget(failed)
            told = "; ".join(f"{transfer.peer}: {transfer.failure}" for transfer in failed[:3])
            raise TransportError(f"{len(failed)} of {len(transfers)} transfers of rank {self._rank} failed: {told}")
        for peer in peers:
            self._agent.notify(peer.agent_name, self._last_word(record, peer).encode())
        return sum(peer.length_bytes for peer in peers)

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
            if not self._slots.carries(engines):
                raise PlanError(
                    "the engines to catch up want other formats than the last push had: the next push brings them"
                )
            return
        old = self._slots.buffer
        if not self._slots.lay_out(engines):
            return
        self._held = Held(self._slots.layouts)
        for key in list(self._peers):
            self._drop(key)
        self._planned.clear()
        self._partials.clear()
        if old.numel():
            self._agent.deregister(old)
        self._agent.register([self._slots.buffer])

    def _connect(self, met: _Met) -> _Peer:
        digest = met.layout_digest
        if digest not in self._planned:
            started = time.monotonic()
            self._planned[digest] = self._plan(digest)
            n_writes, took_s = sum(map(len, self._planned[digest].writes)), time.monotonic() - started
            logger.info("planned layout %s: %d writes in %.2f s", digest, n_writes, took_s)
        agent_name = self._agent.connect(met.descriptor.metadata)
        planned = self._planned[digest]
        transfers = [
            self._prepare(agent_name, planned.plan, writes, met.descriptor) if len(writes) else None
            for writes in planned.writes
        ]
        return _Peer(agent_name, digest, tuple(transfers))

    def _plan(self, digest: str) -> _Planned:
        plan = make_plan(self._held, self._slots.wants(digest))
        writes = plan.writes(self._rank)
        item_bytes = np.array([ITEM_BYTES[target.dtype] for target in plan.targets], dtype=np.int64)
        first_byte = writes["slot_offset"] * item_bytes[writes["target_index"]]
        ends = [group.stop_bytes for group in self._slots.groups]
        group_of = np.searchsorted(ends, first_byte, side="right")
        by_group = tuple(writes[group_of == number] for number in range(len(ends)))
        meters = tuple(WritesMeter(self._slots.buffer, mine, plan.targets) for mine in by_group)
        return _Planned(plan, by_group, meters)

    def _prepare(self, agent_name: str, plan: Plan, writes: np.ndarray, descriptor: EngineDescriptor) -> Transfer:
        local, remote = zip(*self._pairs(plan, writes, descriptor), strict=True)
        return self._agent.prepare(agent_name, local, remote)

    def _pairs(self, plan: Plan, writes: np.ndarray, descriptor: EngineDescriptor) -> Iterator[tuple[Region, Region]]:
        """(local, remote) of each write."""
        arena = self._slots.buffer
        device_id = max(arena.get_device(), 0)
        remote = [(descriptor.tensors[target.name], ITEM_BYTES[target.dtype]) for target in plan.targets]
        for slot, index, offset, length in writes.tolist():
            tensor, item_bytes = remote[index]
            here, there, length_bytes = (count * item_bytes for count in (slot, offset, length))
            yield (
                Region(address=arena.data_ptr() + here, length_bytes=length_bytes, device_id=device_id),
                Region(address=tensor.address + there, length_bytes=length_bytes, device_id=tensor.device_id),
            )

    def _last_word(self, record: PushRecord, peer: _Peer) -> Notification:
        return Notification(
            session=record.session,
            push_id=record.push_id,
            epoch=record.epoch,
            version=record.version,
            plan_digest=record.plan_digests[peer.layout_digest],
            writer_rank=self._rank,
            bytes_written=peer.length_bytes,
            partial_digests=self._partials[peer.layout_digest],
        )

    def _wait_terminal(self, transfers: Sequence[Transfer], deadline: Deadline, push_id: str) -> None:
        while any(transfer.in_flight for transfer in transfers):
            if deadline.left_s < -GRACE_S:
                self._end_process([transfer for transfer in transfers if transfer.in_flight], push_id)
            time.sleep(TRANSFER_POLL_S)

    def _end_process(self, stuck: Sequence[Transfer], push_id: str) -> None:
        peers = ", ".join(transfer.peer for transfer in stuck[:5])
        logger.critical(
            "push %s: %d transfers in flight %.0f s after the deadline, to %s; ending this process: nothing else stops them",
            push_id,
            len(stuck),
            GRACE_S,
            peers,
        )
        sys.stderr.flush()
        os._exit(70)

    def _forget_predecessors(self, key: RankKey) -> None:
        """A replica that restarted has another incarnation; what was prepared for the last one leads nowhere."""
        for other in [other for other in self._met if other[:2] == key[:2]]:
            del self._met[other]
            if other in self._peers:
                self._drop(other)

    def _forget(self, failed: Sequence[Transfer]) -> None:
        """A connection that failed once is made anew, also towards the same incarnation."""
        for key in [key for key, peer in self._peers.items() if any(each in failed for each in peer.prepared)]:
            self._drop(key)

    def _drop(self, key: RankKey) -> None:
        peer = self._peers.pop(key)
        for transfer in peer.prepared:
            transfer.release()
        self._agent.disconnect(peer.agent_name)


def _post(peers: Sequence[_Peer], number: int) -> None:
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

"""A trainer rank's hands: learns the engines of a push, prepares one transfer for each, writes, and says so to them.

The coordinator decides when; this module knows how. Peers and prepared transfers are kept between pushes by incarnation, so
that a push to an unchanged fleet plans, connects and prepares nothing. Imports the transport, never vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set

import numpy as np

from weightsync import verify
from weightsync.errors import FencedOut, PlanError, TransportError
from weightsync.layout.records import ITEM_BYTES, TargetLayout
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
    transfer: Transfer | None
    """None when this rank has nothing to write there; it notifies all the same."""


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
    """Writes this rank's slot arena into engines; registers it with `agent` whenever it is laid out anew."""

    def __init__(self, *, rank: int, agent: Agent, slots: SlotArena, rendezvous: Rendezvous) -> None:
        self._rank = rank
        self._agent = agent
        self._slots = slots
        self._rendezvous = rendezvous
        self._met: dict[RankKey, _Met] = {}
        self._layouts: dict[str, TargetLayout] = {}
        self._plans: dict[str, Plan] = {}
        self._writes: dict[str, np.ndarray] = {}
        self._peers: dict[RankKey, _Peer] = {}
        self._partials: dict[tuple[str, str], dict[int, int]] = {}
        """By layout digest, and by push where that decides what is measured."""
        self._stuck: list[tuple[_Peer, Deadline]] = []
        """Peers that were lost while bytes were on their way, and when these must have ended."""

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
        return {self._met[key].layout_digest: self._plans[self._met[key].layout_digest].digest for key in keys}

    def fill(self) -> None:
        """Convert the model as it is now into the arena. Raises ConversionError naming a tensor.

        Waits first for transfers to peers that were lost in an earlier push: they read the arena.
        """
        self._wait_stuck()
        self._partials.clear()
        self._slots.fill()

    def measure(self, record: PushRecord) -> None:
        """Digest what the arena brings to each layout of a push, unless that was done since it was filled."""
        for digest in record.plan_digests:
            if self._measured_as(record, digest) not in self._partials:
                plan, writes = self._plans[digest], self._writes[digest]
                names = verify.chosen_names((t.name for t in plan.targets), mode=record.verify, push_id=record.push_id)
                chosen = [index for index, target in enumerate(plan.targets) if target.name in names]
                writes = writes[np.isin(writes["target_index"], chosen)]
                partials = verify.digest_writes(self._slots.buffer, writes, plan.targets)
                self._partials[self._measured_as(record, digest)] = partials

    def write(
        self, record: PushRecord, replicas: Set[str], deadline: Deadline, lost: Callable[[], Set[str]]
    ) -> Written:
        """Write into every rank of `replicas`, and notify each when all writes to it are done.

        Peers that fail are told in the result, and so are those of `lost()` replicas that bytes are still on their way to. A
        handle that is in flight GRACE_S after the deadline ends this process: nothing else can stop it (design section 8).
        """
        pending = {key: self._peers[key] for name in replicas for key in replica_ranks(name, record.members[name])}
        for peer in pending.values():
            if peer.transfer is not None:
                peer.transfer.post()
        written, failed = 0, {}
        while pending:
            for key, peer in list(pending.items()):
                if peer.transfer is not None and peer.transfer.in_flight:
                    continue
                del pending[key]
                try:
                    written += self._finish(record, peer)
                except TransportError as error:
                    self._drop(key)
                    failed[key[0]] = f"rank {self._rank} to {peer.agent_name}: {error}"
            if pending and {key[0] for key in pending} <= lost():
                break
            if pending and deadline.left_s < -GRACE_S:
                self._end_process(list(pending.values()), record.push_id)
            time.sleep(TRANSFER_POLL_S if pending else 0.0)
        for key in pending:
            failed[key[0]] = f"was lost while rank {self._rank} wrote"
            self._stuck.append((self._peers.pop(key), deadline))
        return Written(bytes=written, failed=failed, in_flight=tuple(sorted({key[0] for key in pending})))

    def close(self) -> None:
        """Release every handle; all are terminal between pushes, or end this process."""
        self._wait_stuck()
        for peer in self._peers.values():
            if peer.transfer is not None:
                peer.transfer.release()
        self._peers.clear()

    @staticmethod
    def _measured_as(record: PushRecord, layout_digest: str) -> tuple[str, str]:
        """Where `_partials` has what this push wants measured: a sample is chosen anew each push."""
        return layout_digest, record.push_id if record.verify == "sampled" else record.verify

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
        self._wait_stuck()
        if not self._slots.lay_out(engines):
            return
        for key in list(self._peers):
            self._drop(key)
        self._plans.clear()
        self._writes.clear()
        self._partials.clear()
        if old.numel():
            self._agent.deregister(old)
        self._agent.register([self._slots.buffer])

    def _connect(self, met: _Met) -> _Peer:
        digest = met.layout_digest
        if digest not in self._plans:
            started = time.monotonic()
            self._plans[digest] = make_plan(self._slots.layouts, self._layouts[digest])
            self._writes[digest] = self._plans[digest].writes(self._rank)
            logger.info(
                "planned layout %s: %d writes in %.2f s", digest, len(self._writes[digest]), time.monotonic() - started
            )
        agent_name = self._agent.connect(met.descriptor.metadata)
        return _Peer(agent_name, digest, self._prepare(agent_name, digest, met.descriptor))

    def _prepare(self, agent_name: str, digest: str, descriptor: EngineDescriptor) -> Transfer | None:
        writes, targets, arena = self._writes[digest], self._plans[digest].targets, self._slots.buffer
        if len(writes) == 0:
            return None
        device_id = max(arena.get_device(), 0)
        remote = [(descriptor.tensors[target.name], ITEM_BYTES[target.dtype]) for target in targets]
        local_regions, remote_regions = [], []
        for slot, index, offset, length in writes.tolist():
            tensor, item_bytes = remote[index]
            address = arena.data_ptr() + slot * item_bytes
            local_regions.append(Region(address=address, length_bytes=length * item_bytes, device_id=device_id))
            address = tensor.address + offset * item_bytes
            remote_regions.append(Region(address=address, length_bytes=length * item_bytes, device_id=tensor.device_id))
        return self._agent.prepare(agent_name, local_regions, remote_regions)

    def _last_word(self, record: PushRecord, peer: _Peer) -> Notification:
        return Notification(
            session=record.session,
            push_id=record.push_id,
            epoch=record.epoch,
            version=record.version,
            plan_digest=record.plan_digests[peer.layout_digest],
            writer_rank=self._rank,
            bytes_written=0 if peer.transfer is None else peer.transfer.length_bytes,
            partial_digests=self._partials[self._measured_as(record, peer.layout_digest)],
        )

    def _finish(self, record: PushRecord, peer: _Peer) -> int:
        """The bytes of a transfer that ended, told to the peer. Raises TransportError when it did not end well."""
        if peer.transfer is not None and peer.transfer.poll() is TransferState.FAILED:
            raise TransportError(peer.transfer.failure)
        self._agent.notify(peer.agent_name, self._last_word(record, peer).encode())
        return 0 if peer.transfer is None else peer.transfer.length_bytes

    def _wait_stuck(self) -> None:
        """Until nothing reads the arena on behalf of an earlier push."""
        while self._stuck:
            peer, deadline = self._stuck[-1]
            if peer.transfer is not None and peer.transfer.in_flight:
                if deadline.left_s < -GRACE_S:
                    self._end_process([peer], "that was lost")
                time.sleep(TRANSFER_POLL_S)
                continue
            self._stuck.pop()
            self._release(peer)

    def _end_process(self, stuck: Sequence[_Peer], push_id: str) -> None:
        peers = ", ".join(peer.agent_name for peer in stuck[:5])
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

    def _drop(self, key: RankKey) -> None:
        """Forget a peer; a connection that failed once is made anew, also towards the same incarnation."""
        self._release(self._peers.pop(key))

    def _release(self, peer: _Peer) -> None:
        if peer.transfer is not None:
            peer.transfer.release()
        self._agent.disconnect(peer.agent_name)


def check_plans(record: PushRecord, mine: Mapping[str, str]) -> None:
    """Raise FencedOut unless this rank planned what the coordinator did, for every layout."""
    for layout_digest, plan_digest in record.plan_digests.items():
        if mine.get(layout_digest) != plan_digest:
            raise FencedOut(
                f"push {record.push_id}: the coordinator's plan of layout {layout_digest} is {plan_digest}, this rank's is "
                f"{mine.get(layout_digest)}: do all ranks run the same version of weightsync on the same model?"
            )

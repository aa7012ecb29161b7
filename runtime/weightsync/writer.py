"""A trainer rank's hands: learns the engines of a push, prepares one transfer for each, writes, and says so to them.

The coordinator decides when; this module knows how. Peers and prepared transfers are kept between pushes by incarnation, so
that a push to an unchanged fleet plans, connects and prepares nothing. Imports torch and the transport, never vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from weightsync import verify
from weightsync.errors import FencedOut, TransportError
from weightsync.layout.records import SourceLayout, TargetLayout
from weightsync.plan import Plan, make_plan
from weightsync.rendezvous.fencing import Notification
from weightsync.rendezvous.incarnation import RankKey, replica_ranks
from weightsync.rendezvous.modelexpress import EngineDescriptor, Rendezvous
from weightsync.rendezvous.records import PushRecord
from weightsync.transport import Agent, Region, Transfer, TransferState
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

TRANSFER_POLL_S = 0.0005
GRACE_S = 10.0
"""After the deadline a transfer gets so long to become terminal; then only the end of this process stops it."""


@dataclasses.dataclass(frozen=True)
class _Peer:
    """One engine rank as this writer reaches it."""

    agent_name: str
    layout_digest: str
    transfer: Transfer | None
    """None when this rank has nothing to write there; it notifies all the same."""


class Writer:
    """Writes this rank's slot arena into engines.

    arena: [n] bf16, contiguous, registered with `agent`; holds the converted bytes of one version at a time.
    layouts: what every trainer rank holds, this one's included.
    """

    def __init__(
        self,
        *,
        rank: int,
        agent: Agent,
        arena: torch.Tensor,
        layouts: Sequence[SourceLayout],
        rendezvous: Rendezvous,
    ) -> None:
        self._rank = rank
        self._agent = agent
        self._arena = arena
        self._layouts = layouts
        self._rendezvous = rendezvous
        self._plans: dict[str, Plan] = {}
        self._writes: dict[str, np.ndarray] = {}
        self._peers: dict[RankKey, _Peer] = {}
        self._partials: dict[str, dict[int, int]] = {}

    def arena_changed(self) -> None:
        """Forget the digests of what the arena held before."""
        self._partials.clear()

    def learn(self, members: Mapping[str, str], deadline: Deadline) -> dict[str, str]:
        """Plan for, connect to and prepare writes into every rank of `members` (replica -> incarnation).

        Returns the plan's digest by layout digest. Raises RendezvousUnavailable when ModelExpress does not know a member, and
        CoverageError or PlanError when trainer and engine do not fit.
        """
        keys = [key for replica, word in members.items() for key in replica_ranks(replica, word)]
        for key in keys:
            if key not in self._peers:
                self._forget_predecessors(key)
                self._peers[key] = self._meet(key, deadline)
        for digest in {self._peers[key].layout_digest for key in keys}:
            if digest not in self._partials:
                self._partials[digest] = self._digest_writes(digest)
        return {self._peers[key].layout_digest: self._plans[self._peers[key].layout_digest].digest for key in keys}

    def write(self, record: PushRecord, deadline: Deadline) -> int:
        """Write into every rank of every member, and notify each when all writes to all of them are done.

        Returns the bytes written. Raises TransportError naming the peers that failed, with every handle terminal. A handle that
        is still in flight GRACE_S after the deadline ends this process: nothing else can stop it (design section 8).
        """
        peers = [self._peers[key] for replica, word in record.members.items() for key in replica_ranks(replica, word)]
        transfers = [peer.transfer for peer in peers if peer.transfer is not None]
        for transfer in transfers:
            transfer.post()
        self._wait_terminal(transfers, deadline, record.push_id)
        failed = [transfer for transfer in transfers if transfer.poll() is TransferState.FAILED]
        if failed:
            self._forget(failed)
            told = "; ".join(f"{transfer.peer}: {transfer.failure}" for transfer in failed[:3])
            raise TransportError(f"{len(failed)} of {len(transfers)} transfers of rank {self._rank} failed: {told}")
        for peer in peers:
            self._agent.notify(peer.agent_name, self._last_word(record, peer).encode())
        return sum(transfer.length_bytes for transfer in transfers)

    def close(self) -> None:
        """Release every handle; all are terminal between pushes."""
        for peer in self._peers.values():
            if peer.transfer is not None:
                peer.transfer.release()
        self._peers.clear()

    def _meet(self, key: RankKey, deadline: Deadline) -> _Peer:
        replica, rank, incarnation = key
        descriptor = self._rendezvous.fetch(replica, incarnation, rank, deadline=deadline.moment)
        layout = TargetLayout.from_bytes(descriptor.layout)
        digest = layout.digest()
        if digest not in self._plans:
            started = time.monotonic()
            self._plans[digest] = make_plan(self._layouts, layout)
            self._writes[digest] = self._plans[digest].writes(self._rank)
            logger.info(
                "planned layout %s: %d writes in %.2f s", digest, len(self._writes[digest]), time.monotonic() - started
            )
        agent_name = self._agent.connect(descriptor.metadata)
        return _Peer(agent_name, digest, self._prepare(agent_name, digest, descriptor))

    def _prepare(self, agent_name: str, digest: str, descriptor: EngineDescriptor) -> Transfer | None:
        writes, targets = self._writes[digest], self._plans[digest].targets
        if len(writes) == 0:
            return None
        item_bytes = self._arena.element_size()
        device_id = max(self._arena.get_device(), 0)
        remote = [descriptor.tensors[name] for name in targets]
        local_regions, remote_regions = [], []
        for slot, index, offset, length in writes.tolist():
            address = self._arena.data_ptr() + slot * item_bytes
            local_regions.append(Region(address=address, length_bytes=length * item_bytes, device_id=device_id))
            tensor = remote[index]
            address = tensor.address + offset * item_bytes
            remote_regions.append(Region(address=address, length_bytes=length * item_bytes, device_id=tensor.device_id))
        return self._agent.prepare(agent_name, local_regions, remote_regions)

    def _digest_writes(self, digest: str) -> dict[int, int]:
        """This rank's share of each target's digest, by target index."""
        targets = self._plans[digest].targets
        by_name = verify.digest_writes(self._arena, self._writes[digest], targets)
        return {index: by_name[name] for index, name in enumerate(targets) if name in by_name}

    def _last_word(self, record: PushRecord, peer: _Peer) -> Notification:
        return Notification(
            session=record.session,
            push_id=record.push_id,
            epoch=record.epoch,
            version=record.version,
            plan_digest=record.plan_digests[peer.layout_digest],
            writer_rank=self._rank,
            bytes_written=0 if peer.transfer is None else peer.transfer.length_bytes,
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
        for other in [other for other in self._peers if other[:2] == key[:2]]:
            self._drop(other)

    def _forget(self, failed: Sequence[Transfer]) -> None:
        """A connection that failed once is made anew, also towards the same incarnation."""
        for key in [key for key, peer in self._peers.items() if peer.transfer in failed]:
            self._drop(key)

    def _drop(self, key: RankKey) -> None:
        peer = self._peers.pop(key)
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

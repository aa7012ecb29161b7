"""An engine rank's side of a push: offers memory, has checked what arrived, and holds the verdict.

One `Receiver` lives in each vLLM worker process; `weightsync.vllm.worker` makes it and `weightsync.vllm.replica` drives it by
RPC. The RPCs only open, commit or abort; waiting, verifying and voting run on the thread of a `Reception`. States and fencing
are those of design section 8: CLEAN(v) -> OPEN(v+1) -> VERIFIED(v+1) -> CLEAN(v+1). In place, live memory is what is offered,
and an abort may leave it torn: DIRTY. Staged, a second buffer is, and live memory changes in `commit` only. Imports torch and
NIXL (by the transport), never vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from weightsync import verify
from weightsync.config import Contract, PodFacts
from weightsync.errors import FencedOut, LedgerUnavailable, WeightSyncError
from weightsync.layout.records import TargetLayout
from weightsync.meter import TensorMeter
from weightsync.reception import Reception
from weightsync.rendezvous.fencing import Fence
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.incarnation import replica_ranks
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor, Rendezvous, source_heartbeat
from weightsync.rendezvous.records import PushRecord
from weightsync.staging import StagingArena, copy_all
from weightsync.transport import Agent
from weightsync.wire import ReplicaState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A version whose bytes were measured in live memory."""

    epoch: int
    version: int
    digests: Mapping[str, int]
    """Digest by name of each target that was measured: all of them, or those that the push chose."""

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.version)

    @property
    def digest(self) -> str:
        return verify.to_hex(sum(self.digests.values()))


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the receiver tells the replica it belongs to; picklable, since it crosses vLLM's RPC."""

    rank: int
    incarnation: str
    layout_digest: str
    state: str
    epoch: int
    version: int
    seen_epoch: int
    digest: str
    reason: str
    torn: bool
    """Whether live memory is not what any version was, also while a push is open that repairs it."""
    push_id: str
    """The push that was opened last; empty before any."""
    copy_seconds: float
    """What the last staged commit took to copy, wait for the device included; 0 in place."""
    received_bytes: int = 0
    """Payload that writers brought and this rank verified, since it began."""


class Receiver:
    """The live parameters of one engine rank as the target of pushes.

    params: contiguous tensors by name, in the engine's own layout; written in place, never replaced.
    layout: where their elements come from, as traced from the engine's loader; its targets are a subset of `params`.
    staging: where pushes land with `commit: staged`; None in place. It has a copy of every target.
    refresh: computes anew what the engine derives from its parameters, in place; called while it is paused.
    """

    def __init__(
        self,
        *,
        contract: Contract,
        facts: PodFacts,
        replica: str,
        rank: int,
        params: Mapping[str, torch.Tensor],
        layout: TargetLayout,
        ledger: Ledger,
        rendezvous: Rendezvous,
        staging: StagingArena | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._contract = contract
        self._replica = replica
        self._rank = rank
        self._params = {target.name: params[target.name] for target in layout.targets}
        self._layout = layout
        self._ledger = ledger
        self._rendezvous = rendezvous
        self._staging = staging
        self._refresh = refresh
        self._lock = threading.RLock()
        self._process = f"{facts.uid}-{time.time_ns() // 1_000_000:x}"
        self._generation = 0
        self._meter = TensorMeter(self._params)
        self._fills = self._measure_fills()
        self._state = ReplicaState.CLEAN
        self._reason = ""
        self._torn = False
        self._copy_seconds = 0.0
        self._held = Held(epoch=0, version=0, digests=self._meter.measure())
        self._seen_epoch = 0
        self._last_push = ""
        self._received_bytes = 0
        self._reception: Reception | None = None
        self._unsettled: tuple[PushRecord, frozenset[int]] | None = None
        self._heartbeat: Heartbeat
        self._agent = self._new_agent()

    @property
    def incarnation(self) -> str:
        """Changes with the process and with each agent: a descriptor of an older one leads nowhere."""
        return f"{self._process}.{self._generation}"

    def describe(self) -> Description:
        """State of this rank; safe from any thread."""
        with self._lock:
            return Description(
                rank=self._rank,
                incarnation=self.incarnation,
                layout_digest=self._layout.digest(),
                state=self._state,
                epoch=self._held.epoch,
                version=self._held.version,
                seen_epoch=self._seen_epoch,
                digest=self._held.digest,
                reason=self._reason,
                torn=self._torn,
                push_id=self._last_push,
                copy_seconds=self._copy_seconds,
                received_bytes=self._received_bytes,
            )

    def open(self, record: PushRecord) -> Description:
        """Let the writers of `record` write: into staging, or into live memory; then generation must be paused and the device idle.

        Raises FencedOut for another session, an older (epoch, version), another incarnation or plan, and while a lost writer
        of an earlier push may still write.
        """
        with self._lock:
            self._check_fence(record)
            self._check_settled(record)
            self._seen_epoch = max(self._seen_epoch, record.epoch)
            reception = Reception(
                record=record,
                fence=Fence.of(record, self._layout.digest()),
                agent=self._agent,
                ledger=self._ledger,
                replica=self._replica,
                rank=self._rank,
                landing=self._landing_meter,
                names=self._params,
                fills=self._fills,
                payload_bytes=self._layout.wanted_bytes,
                on_checked=self._checked,
            )
            self._state, self._last_push, self._reception = ReplicaState.OPEN, record.push_id, reception
            reception.start()
            return self.describe()

    def commit(self, push_id: str) -> Description:
        """The ledger says COMMIT: what was verified is what this rank holds from now on. Repeating it changes nothing.

        Staged: copies it into live memory, which must be idle, and measures there again; DIRTY when something got lost on the way.
        """
        with self._lock:
            reception = self._reception
            if reception is None or reception.record.push_id != push_id:
                return self.describe()
            if self._state is not ReplicaState.VERIFIED:
                raise WeightSyncError(
                    f"push {push_id} is committed but this rank is {self._state}: {self._reason or 'not verified'}"
                )
            wrong = self._apply(reception)
            self._refresh()
            self._reception, self._torn = None, bool(wrong)
            if wrong:
                self._state = ReplicaState.DIRTY
                self._reason = f"{_names(wrong)} of push {push_id} came out of the copy changed"
            else:
                record = reception.record
                self._held = Held(epoch=record.epoch, version=record.version, digests=reception.digests)
                self._state, self._reason = ReplicaState.CLEAN, ""
            return self.describe()

    def abort(self, push_id: str, reason: str) -> Description:
        """The push ends without a commit here. In place, CLEAN again only if nobody can reach us and the bytes are the old ones."""
        reception = self._reception
        if reception is None or reception.record.push_id != push_id:
            return self.describe()
        reception.stop()  # without the lock: its thread may be waiting for it
        with self._lock:
            self._reception = None
            self._settle(reception.record)
            if self._staging is None:
                self._torn = not self._untouched()
            self._state = ReplicaState.DIRTY if self._torn else ReplicaState.CLEAN
            self._reason = (
                f"push {push_id} of version {reception.record.version} aborted: {reason}" if self._torn else ""
            )
            return self.describe()

    def verify(self) -> Description:
        """Measure live memory again and compare with what this rank holds; DIRTY when they differ. Only while CLEAN."""
        with self._lock:
            if self._state is ReplicaState.CLEAN and (wrong := self._differing(self._held.digests)):
                self._state, self._torn = ReplicaState.DIRTY, True
                self._reason = f"{_names(wrong)} differ from version {self._held.version}"
            return self.describe()

    def close(self) -> None:
        """Stop receiving and destroy the agent."""
        if self._reception is not None:
            self._reception.stop()
        with self._lock:
            self._heartbeat.close()
            self._agent.close()

    @property
    def _landing(self) -> Mapping[str, torch.Tensor]:
        """Where writers write, by target name."""
        if self._staging is None:
            return self._params
        return {name: self._staging.tensors[name] for name in self._params}

    def _checked(self, faults: str, received_bytes: int) -> bool:
        """On the reception's thread. False when the push has ended meanwhile."""
        with self._lock:
            reception = self._reception
            if reception is None or reception.stopped:
                return False
            self._reason = faults or (self._reason if self._torn else "")
            if not faults:
                self._state = ReplicaState.VERIFIED
                self._received_bytes += received_bytes
            return True

    def _apply(self, reception: Reception) -> list[str]:
        """Staged: copy what was verified into live memory; returns the targets that are not the same there."""
        if self._staging is None:
            return []
        started = time.monotonic()
        copy_all(self._landing, self._params)
        self._copy_seconds = time.monotonic() - started
        return self._differing(reception.digests)

    def _differing(self, digests: Mapping[str, int]) -> list[str]:
        """Which of these targets live memory holds otherwise."""
        measured = self._meter.measure(digests)
        return sorted(name for name, digest in digests.items() if measured[name] != digest)

    def _untouched(self) -> bool:
        """Whether live memory is proved to be what it was before a push that was aborted."""
        whole = self._held.digests.keys() == self._params.keys()
        return whole and self._unsettled is None and not self._differing(self._held.digests)

    def _check_fence(self, record: PushRecord) -> None:
        Fence.of(record, self._layout.digest()).require_admissible(
            session=self._contract.session,
            seen_epoch=self._seen_epoch,
            held=self._held.order,
            repairs=self._torn or record.catch_up,
        )
        if self._reception is not None:
            raise FencedOut(f"push {record.push_id} came while {self._reception.record.push_id} is open")
        expected = record.members.get(self._replica, "")
        if (self._replica, self._rank, self.incarnation) not in replica_ranks(self._replica, expected):
            raise FencedOut(
                f"push {record.push_id} was planned for incarnation {expected}, this engine is {self.incarnation}"
            )

    def _check_settled(self, record: PushRecord) -> None:
        """Refuse to offer memory that a lost writer may still write (only where its death is the sole proof)."""
        if self._unsettled is None:
            return
        aborted, writers = self._unsettled
        if record.epoch > aborted.epoch:  # the operator opens an epoch only when the pods of the last are gone
            self._unsettled = None
            return
        silent = writers - self._acknowledged(aborted)
        if silent:
            raise FencedOut(
                f"writers {sorted(silent)} of push {aborted.push_id} have not said that their transfers ended; "
                f"over {self._contract.fabric.profile} only their death proves it: restart the trainer"
            )
        self._unsettled = None

    def _settle(self, record: PushRecord) -> None:
        """End the access of every writer that has not acknowledged that its transfers are terminal."""
        silent = frozenset(range(record.writers)) - self._acknowledged(record)
        if not silent:
            return
        retirable = self._staging is not None and self._staging.retirable
        if self._contract.fabric.revocation == "process" and not retirable:
            self._unsettled = (record, silent)
            return
        logger.warning(
            "push %s: writers %s are silent, destroying agent %s", record.push_id, sorted(silent), self.incarnation
        )
        self._heartbeat.close(
            timeout_s=0
        )  # a beat under way may hang with the server, and its source leads nowhere now
        self._agent.close()
        if self._staging is not None and retirable:
            self._staging = self._staging.retire(self._params)
        self._agent = self._new_agent()

    def _acknowledged(self, record: PushRecord) -> frozenset[int]:
        """Writers of whose bytes to this replica none can be under way any more."""
        try:
            reports = self._ledger.until(time.monotonic()).writer_reports(record.push_id)  # one try
        except LedgerUnavailable:
            return frozenset()
        return frozenset(rank for rank, report in reports.items() if self._replica not in report.in_flight)

    @property
    def _landing_meter(self) -> TensorMeter:
        """Of the memory that writers write."""
        return self._meter if self._staging is None else self._staged_meter

    def _new_agent(self) -> Agent:
        """Make the agent of the next generation, register what is offered, and have it published; parameters stay as they are."""
        self._generation += 1
        if self._staging is not None:
            self._staged_meter = TensorMeter(self._landing)
        agent = Agent(f"{self._replica}/{self._rank}/{self.incarnation}")
        agent.register(list(self._params.values()) if self._staging is None else [self._staging.buffer])
        self._heartbeat = source_heartbeat(self._rendezvous, [self._descriptor(agent)]).start()
        return agent

    def _descriptor(self, agent: Agent) -> EngineDescriptor:
        tensors = [
            RemoteTensor(
                name=name,
                address=tensor.data_ptr(),
                length_bytes=tensor.numel() * tensor.element_size(),
                device_id=max(tensor.get_device(), 0),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )
            for name, tensor in self._landing.items()
        ]
        return EngineDescriptor(
            replica=self._replica,
            incarnation=self.incarnation,
            rank=self._rank,
            agent_name=agent.name,
            metadata=agent.metadata(),
            tensors={tensor.name: tensor for tensor in tensors},
            layout=self._layout.to_bytes(),
        )

    def _measure_fills(self) -> dict[str, int]:
        """Digests of the elements that the loader filled and no writer touches, by target; they never change."""
        totals: dict[str, int] = {}
        for fill in self._layout.fills:
            flat = self._params[fill.target].reshape(-1)[fill.offset : fill.offset + fill.numel].cpu()
            totals[fill.target] = totals.get(fill.target, 0) + verify.digest_range(fill.target, fill.offset, flat)
        return totals


def _names(wrong: list[str]) -> str:
    return f"{len(wrong)} targets ({', '.join(wrong[:5])})"

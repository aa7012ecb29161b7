"""An engine rank's side of a push: offers its live parameters, checks in place what arrived, votes, and holds the verdict.

One `Receiver` lives in each vLLM worker process; `weightsync.vllm.worker` makes it and `weightsync.vllm.replica` drives it by
RPC. The RPCs only open, commit or abort; waiting, verifying and voting run on a thread of the receiver's own. States and
fencing are those of design section 8: CLEAN(v) -> OPEN(v+1) -> VERIFIED(v+1) -> CLEAN(v+1), and DIRTY after an abort that may
have left bytes. Imports torch and NIXL (by the transport), never vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weightsync import verify
from weightsync.config import Contract, PodFacts
from weightsync.errors import FencedOut, LedgerUnavailable, WeightSyncError
from weightsync.layout.records import TargetLayout
from weightsync.meter import TensorMeter
from weightsync.rendezvous.fencing import Fence, Notification
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.incarnation import replica_ranks
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor, Rendezvous, source_heartbeat
from weightsync.rendezvous.records import PushRecord, Vote
from weightsync.transport import Agent
from weightsync.waiting import Deadline
from weightsync.wire import ReplicaState

logger = logging.getLogger(__name__)

NOTIFICATION_POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Held:
    """A version whose bytes were measured in live memory."""

    epoch: int
    version: int
    digests: Mapping[str, int]
    """Digest of each target by name."""

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


class Receiver:
    """The live parameters of one engine rank as the target of pushes.

    params: contiguous tensors by name, in the engine's own layout; written in place by peers, never replaced.
    layout: where their elements come from, as traced from the engine's loader; its targets are a subset of `params`.
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
    ) -> None:
        self._contract = contract
        self._replica = replica
        self._rank = rank
        self._params = {target.name: params[target.name] for target in layout.targets}
        self._layout = layout
        self._ledger = ledger
        self._rendezvous = rendezvous
        self._lock = threading.RLock()
        self._process = f"{facts.uid}-{time.time_ns() // 1_000_000:x}"
        self._generation = 0
        self._meter = TensorMeter(self._params)
        self._fills = self._measure_fills()
        self._state = ReplicaState.CLEAN
        self._reason = ""
        self._held = Held(epoch=0, version=0, digests=self._measure())
        self._seen_epoch = 0
        self._reception: _Reception | None = None
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
            )

    def open(self, record: PushRecord) -> Description:
        """Let the writers of `record` write into the live parameters; generation must be paused and the device idle.

        Raises FencedOut for another session, an older (epoch, version), another incarnation or plan, and while a lost writer
        of an earlier push may still write.
        """
        with self._lock:
            self._check_fence(record)
            self._check_settled(record)
            self._seen_epoch = max(self._seen_epoch, record.epoch)
            self._state, self._reason = ReplicaState.OPEN, ""
            self._reception = _Reception(self, record)
            self._reception.start()
            return self.describe()

    def commit(self, push_id: str) -> Description:
        """The ledger says COMMIT: what was verified is what this rank holds from now on. Repeating it changes nothing."""
        with self._lock:
            reception = self._reception
            if reception is None or reception.record.push_id != push_id:
                return self.describe()
            if self._state is not ReplicaState.VERIFIED:
                raise WeightSyncError(
                    f"push {push_id} is committed but this rank is {self._state}: {self._reason or 'not verified'}"
                )
            record = reception.record
            self._held = Held(epoch=record.epoch, version=record.version, digests=reception.digests)
            self._state, self._reason, self._reception = ReplicaState.CLEAN, "", None
            return self.describe()

    def abort(self, push_id: str, reason: str) -> Description:
        """The push ends without a commit. CLEAN again if no writer can reach us and the bytes are still the old ones."""
        with self._lock:
            reception = self._reception
            if reception is None or reception.record.push_id != push_id:
                return self.describe()
            reception.stop()
            self._reception = None
            self._settle(reception.record)
            untouched = self._unsettled is None and self._measure() == self._held.digests
            self._state = ReplicaState.CLEAN if untouched else ReplicaState.DIRTY
            self._reason = (
                "" if untouched else f"push {push_id} of version {reception.record.version} aborted: {reason}"
            )
            return self.describe()

    def verify(self) -> Description:
        """Measure live memory again and compare with what this rank holds; DIRTY when they differ. Only while CLEAN."""
        with self._lock:
            if self._state is ReplicaState.CLEAN:
                measured = self._measure()
                wrong = sorted(name for name, digest in measured.items() if digest != self._held.digests[name])
                if wrong:
                    self._state = ReplicaState.DIRTY
                    names = ", ".join(wrong[:5])
                    self._reason = (
                        f"{len(wrong)} of {len(measured)} targets differ from version {self._held.version}: {names}"
                    )
            return self.describe()

    def close(self) -> None:
        """Stop receiving and destroy the agent."""
        with self._lock:
            if self._reception is not None:
                self._reception.stop()
            self._heartbeat.close()
            self._agent.close()

    def _check_fence(self, record: PushRecord) -> None:
        Fence.of(record, self._layout.digest()).require_admissible(
            session=self._contract.session,
            seen_epoch=self._seen_epoch,
            held=self._held.order,
            repairs=self._state is ReplicaState.DIRTY,
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
        if self._contract.fabric.revocation == "agent":
            logger.warning(
                "push %s: writers %s are silent, destroying agent %s", record.push_id, sorted(silent), self.incarnation
            )
            self._heartbeat.close()
            self._agent.close()
            self._agent = self._new_agent()
        else:
            self._unsettled = (record, silent)

    def _acknowledged(self, record: PushRecord) -> frozenset[int]:
        try:
            return frozenset(self._ledger.until(time.monotonic() + 1.0).writer_reports(record.push_id))
        except LedgerUnavailable:
            return frozenset()

    def _new_agent(self) -> Agent:
        """Make and register the agent of the next generation, and have it published; the parameters stay where they are."""
        self._generation += 1
        agent = Agent(f"{self._replica}/{self._rank}/{self.incarnation}")
        agent.register(list(self._params.values()))
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
            for name, tensor in self._params.items()
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

    def _measure(self) -> dict[str, int]:
        """Digest of each target as live memory holds it now."""
        if any(tensor.is_cuda for tensor in self._params.values()):
            torch.cuda.synchronize()  # what a writer's completion made visible to the host must be so to our kernels
        return self._meter.measure()


class _Reception:
    """The thread that takes one push in: collects the writers' final notifications, checks the bytes, votes."""

    def __init__(self, receiver: Receiver, record: PushRecord) -> None:
        self.record = record
        self.digests: dict[str, int] = {}
        self._receiver = receiver
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"receive-{record.push_id}", daemon=True)
        self._fence = Fence.of(record, receiver._layout.digest())
        self._deadline = Deadline.at(receiver._ledger.deadline_to_monotonic(record.deadline_at))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; whatever it was about to vote does not count any more, the decision has fallen."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        receiver, record = self._receiver, self.record
        try:
            notes = self._collect()
            if notes is None:
                return
            started = time.monotonic()
            faults = self._check(notes)
            vote = Vote(
                replica=receiver._replica,
                rank=receiver._rank,
                ok=not faults,
                reason=faults,
                digest=verify.to_hex(sum(self.digests.values())),
                bytes=0 if faults else sum(t.numel() * t.element_size() for t in receiver._params.values()),
                seconds_by_phase={"verify": time.monotonic() - started},
            )
            with receiver._lock:
                if self._stopped.is_set():
                    return
                receiver._reason = faults
                if not faults:
                    receiver._state = ReplicaState.VERIFIED
            receiver._ledger.vote(record.push_id, vote)
        except WeightSyncError as error:
            # The push ends by its deadline: the coordinator misses this vote, and the ledger's decision comes by RPC.
            logger.error(
                "push %s: rank %d of %s cannot vote: %s", record.push_id, receiver._rank, receiver._replica, error
            )

    def _collect(self) -> dict[int, Notification] | None:
        """The final notification of every writer, or None when stopped or past the deadline."""
        notes: dict[int, Notification] = {}
        while len(notes) < self.record.writers:
            for peer, payload in self._receiver._agent.notifications():
                note = self._accept(peer, payload)
                if note is not None:
                    notes[note.writer_rank] = note
            if self._stopped.is_set() or self._deadline.passed:
                return None
            if len(notes) < self.record.writers:
                time.sleep(NOTIFICATION_POLL_S)
        return notes

    def _accept(self, peer: str, payload: bytes) -> Notification | None:
        """The message, if it belongs to this push; anything else is fenced."""
        try:
            note = Notification.decode(payload)
            note.require(self._fence)
        except FencedOut as error:
            logger.warning("fenced a message of agent %s: %s", peer, error)
            return None
        return note

    def _check(self, notes: Mapping[int, Notification]) -> str:
        """Compare live memory with the sum of the writers' digests; returns what is wrong, in words, or nothing."""
        receiver = self._receiver
        self.digests = receiver._measure()
        wrong = []
        for index, name in enumerate(sorted(receiver._params)):
            sent = sum(note.partial_digests.get(index, 0) for note in notes.values()) + receiver._fills.get(name, 0)
            if verify.to_hex(sent) != verify.to_hex(self.digests[name]):
                wrong.append(name)
        if not wrong:
            return ""
        return f"{len(wrong)} of {len(self.digests)} targets differ from what was sent: {', '.join(wrong[:5])}"

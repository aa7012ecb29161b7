"""An engine rank's side of a push: offers memory, has checked what arrived, and holds the verdict.

One `Receiver` lives in each vLLM worker process; `weightsync.vllm.worker` makes it and `weightsync.vllm.replica` drives it by
RPC. The RPCs only open, commit or abort; waiting, verifying and voting are a `Reception`, on a thread. States and fencing
are those of design section 8: CLEAN(v) -> OPEN(v+1) -> VERIFIED(v+1) -> CLEAN(v+1). In place, live memory is what is offered,
and an abort may leave it torn: DIRTY. Staged, a second buffer is, and live memory changes in `commit` only. Imports torch and
NIXL (by the transport), never vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import torch

from weightsync import verify
from weightsync.config import Contract, PodFacts
from weightsync.errors import FencedOut, WeightSyncError
from weightsync.layout.records import TargetLayout
from weightsync.lender import Lender
from weightsync.meter import TensorMeter
from weightsync.quarantine import Quarantine
from weightsync.rank_state import Description, Held
from weightsync.reception import Reception
from weightsync.rendezvous.fencing import Fence
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.incarnation import process_word, replica_ranks
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import EngineDescriptor, RemoteTensor, Rendezvous, source_heartbeat
from weightsync.rendezvous.records import PushRecord
from weightsync.replay import Replay
from weightsync.staging import StagingArena, copy_all
from weightsync.threads import KeptThreads
from weightsync.transport import Agent
from weightsync.wire import ReplicaState

logger = logging.getLogger(__name__)


class Receiver:
    """The live parameters of one engine rank as the target of pushes.

    params: contiguous tensors by name, in the engine's own layout; written in place, never replaced.
    layout: where their elements come from, as traced from the engine's loader; its targets are a subset of `params`.
    staging: where pushes land with `commit: staged`; None in place. It has a copy of every target.
    refresh: computes anew what the engine derives from its parameters, in place; called while it is paused.
    replay: the modules that are loaded anew from targets of their own; None when every target is a parameter.
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
        replay: Replay | None = None,
    ) -> None:
        self._contract = contract
        self._replica = replica
        self._rank = rank
        self._replay = replay
        staged = {} if replay is None else replay.staged
        self._params = {t.name: params[t.name] for t in layout.targets if t.name not in staged}
        self._replayed_bytes = sum(tensor.nbytes for tensor in staged.values())
        self._layout = layout
        self._ledger = ledger
        self._rendezvous = rendezvous
        self._staging = staging
        self._refresh = refresh
        self._lock = threading.RLock()
        self._process = process_word(facts.uid)
        self._generation = 0
        self._meter = TensorMeter(self._params)
        self._fills = self._measure_fills()
        self._state = ReplicaState.CLEAN
        self._reason = ""
        self._torn = False
        self._copy_seconds = 0.0
        self._held = Held(
            epoch=0,
            version=0,
            digests={**self._meter.measure(), **TensorMeter(staged).measure()},
            replayed={} if replay is None else replay.measure(),
        )
        self._seen_epoch = 0
        self._last_push = ""
        self._received_bytes = 0
        self._reception: Reception | None = None
        self._threads = KeptThreads("weightsync-receive")
        self._quarantine = Quarantine(replica=replica, rank=rank, ledger=ledger, profile=contract.fabric.profile)
        self._lender = Lender(
            rank=rank,
            params=self._params,
            covers=replay is None and params.keys() == self._params.keys(),
            layout_digest=layout.digest(),
            ledger=ledger,
            rendezvous=rendezvous,
        )
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
                lends=self._lender.able,
                direct_bytes=self._layout.wanted_bytes - self._replayed_bytes,
                replayed_bytes=self._replayed_bytes,
            )

    def open(self, record: PushRecord) -> Description:
        """Let the writers of `record` write: into staging, or into live memory; then generation must be paused and the device idle.

        Raises FencedOut for another session, an older (epoch, version), another incarnation or plan, and while a lost writer
        of an earlier push may still write.
        """
        with self._lock:
            self._check_fence(record)
            self._quarantine.check(record)
            self._seen_epoch = max(self._seen_epoch, record.epoch)
            if self._staging is None:
                self._lender.memory_changes()
            reception = Reception(
                record=record,
                fence=Fence.of(record, self._layout.digest()),
                agent=self._agent,
                ledger=self._ledger,
                threads=self._threads,
                replica=self._replica,
                rank=self._rank,
                landing=self._landing_meter,
                names=self._landing,
                fills={} if record.source else self._fills,
                payload_bytes=self._whole_bytes if record.source else self._layout.wanted_bytes,
                on_checked=self._checked,
                prepare=self._prepared,
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
            self._torn = True  # whatever raises from here on leaves a mixture
            wrong, replayed = self._apply(reception)
            self._refresh()
            self._reception, self._torn = None, bool(wrong)
            if wrong:
                self._state = ReplicaState.DIRTY
                self._reason = f"{_names(wrong)} of push {push_id} came out of the copy changed"
            else:
                record = reception.record
                self._held = Held(
                    epoch=record.epoch, version=record.version, digests=reception.digests, replayed=replayed
                )
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

    def lend(self, record: PushRecord) -> Description:
        """Write live memory into the replica that `record` repairs, on a thread; it tells the ledger how that ended, or why not.

        This rank goes on serving and taking pushes meanwhile: one that changes live memory ends the loan.
        """
        with self._lock:
            whole = self._held.digests.keys() == self._params.keys()
            self._lender.lend(record, self._held.digests if whole else None, why_not=self._unfit_to_lend(record))
            return self.describe()

    def verify(self) -> Description:
        """Measure live memory again and compare with what this rank holds; DIRTY when they differ. Only while CLEAN."""
        with self._lock:
            if self._state is ReplicaState.CLEAN and (wrong := self._changed()):
                self._state, self._torn = ReplicaState.DIRTY, True
                self._reason = f"{_names(wrong)} differ from version {self._held.version}"
            return self.describe()

    def close(self) -> None:
        """Stop receiving and destroy the agent."""
        if self._reception is not None:
            self._reception.stop()
        self._threads.close()
        self._lender.close()
        with self._lock:
            self._heartbeat.close()
            self._agent.close()

    @property
    def _landing(self) -> Mapping[str, torch.Tensor]:
        """Where writers write, by target name."""
        staged = {} if self._replay is None else self._replay.staged
        if self._staging is None:
            return {**self._params, **staged}
        return {**{name: self._staging.tensors[name] for name in self._params}, **staged}

    def _prepared(self, wanted: Callable[[], bool]) -> str:
        """On the reception's thread: make what is replayed of what was sent. Returns why that is impossible, or nothing."""
        if self._replay is None:
            return ""
        try:
            self._replay.prepare(wanted)
        except WeightSyncError as error:
            return str(error)
        except Exception as error:  # of the engine's own loader: the push must hear why, not wait for a vote
            logger.exception("a replay failed")
            return f"the replay failed: {type(error).__name__}: {error}"
        return ""

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

    def _apply(self, reception: Reception) -> tuple[list[str], Mapping[str, int]]:
        """Copy what was verified, and what was made of it, into live memory.

        Returns the targets and tensors that are not the same there, and the digests of what was replayed.
        """
        if self._staging is not None:
            self._lender.memory_changes()
        started = time.monotonic()
        replayed = {} if self._replay is None else self._replay.apply()
        if self._staging is not None:
            copy_all(self._landing, self._params)
        if self._staging is not None or replayed:
            self._copy_seconds = time.monotonic() - started
        wrong = [] if self._staging is None else self._differing(reception.digests)
        return wrong + self._differing_replayed(replayed), replayed

    def _changed(self) -> list[str]:
        """What live memory holds otherwise than this rank's version."""
        return self._differing(self._held.digests) + self._differing_replayed(self._held.replayed)

    def _differing(self, digests: Mapping[str, int]) -> list[str]:
        """Which of these targets live memory holds otherwise; those in load format are not there."""
        measured = self._meter.measure(digests)
        return sorted(name for name in measured if measured[name] != digests[name])

    def _differing_replayed(self, digests: Mapping[str, int]) -> list[str]:
        if self._replay is None:
            return []
        measured = self._replay.measure()
        return sorted(name for name, digest in digests.items() if measured[name] != digest)

    def _untouched(self) -> bool:
        """Whether live memory is proved to be what it was before a push that was aborted."""
        whole = self._held.digests.keys() == self._landing.keys()
        return whole and self._quarantine.empty and not self._changed()

    def _check_fence(self, record: PushRecord) -> None:
        newest = 0 if record.source else self._seen_epoch  # an epoch that has committed nothing hinders no repair
        Fence.of(record, self._layout.digest()).require_admissible(
            session=self._contract.session,
            seen_epoch=newest,
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

    def _unfit_to_lend(self, record: PushRecord) -> str:
        """Why live memory is not what `record` is to bring; empty when it is."""
        if (self._replica, self._rank, self.incarnation) not in replica_ranks(record.source, record.source_incarnation):
            return f"{record.source} {record.source_incarnation} is asked, this engine is {self.incarnation}"
        if self._torn or self._held.order != record.order:
            return f"it holds {'a torn ' if self._torn else ''}{self._held.order}, {record.order} is asked for"
        if self._reception is not None and self._staging is None:
            return f"push {self._reception.record.push_id} is open on it"
        return ""

    def _settle(self, record: PushRecord) -> None:
        """End the access of every writer that has not acknowledged that its transfers are terminal."""
        silent = self._quarantine.silent_writers(record)
        if not silent:
            return
        retirable = self._staging is not None and self._staging.retirable
        if self._contract.fabric.revocation == "process" and not retirable:
            self._quarantine.hold(record, silent)
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
            if self._replay is not None:
                self._replay.retire()
        self._agent = self._new_agent()

    @property
    def _whole_bytes(self) -> int:
        """Of all targets, the elements included that no trainer writes: a peer sends them as they are."""
        return sum(tensor.nbytes for tensor in self._params.values())

    def _new_agent(self) -> Agent:
        """Make the agent of the next generation, register what is offered, and have it published; parameters stay as they are."""
        self._generation += 1
        lands_live = self._staging is None and self._replay is None
        self._landing_meter = self._meter if lands_live else TensorMeter(self._landing)
        memory = list(self._params.values()) if self._staging is None else [self._staging.buffer]
        agent = Agent(f"{self._replica}/{self._rank}/{self.incarnation}")
        agent.register(memory if self._replay is None else [*memory, self._replay.memory])
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

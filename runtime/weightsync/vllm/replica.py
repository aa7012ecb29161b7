"""One engine replica as a member of its session: joins the ledger, takes pushes to their end, knows whether it may serve.

Lives in vLLM's API server process, on its event loop. It reaches the workers by RPC and keeps no state that they or the ledger
do not hold: `view` is what it last heard from them, so that a probe or a request costs no RPC. Whatever happens to the trainer,
every push that was opened here ends here, by the ledger's decision or at the push's own deadline.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from typing import Any, Protocol

from weightsync.config import Contract, PodFacts
from weightsync.errors import DeadlineExceeded, FencedOut, LedgerUnavailable, WeightSyncError
from weightsync.metrics import ReplicaMetrics
from weightsync.receiver import Description
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Member, PushRecord, Verdict
from weightsync.telemetry import Stopwatch
from weightsync.waiting import Deadline
from weightsync.wire import Decision, ReplicaState, ReplicaStatus

logger = logging.getLogger(__name__)

LEASE_S = 9.0
"""A replica that is not heard of for so long is no member of the next push; renewed each third of it."""
DECISION_POLL_S = 0.01


class Engine(Protocol):
    """The part of vLLM's EngineClient that a replica needs."""

    async def pause_generation(self, *, mode: Any, clear_cache: bool) -> None: ...
    async def resume_generation(self) -> None: ...
    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]: ...
    async def check_health(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What the replica last knew of its workers and of the ledger."""

    ranks: tuple[Description, ...] = ()
    """By rank; empty until the workers have offered their memory."""
    committed: int | None = None
    """The session's committed version; None until the ledger was read once."""
    fault: str = ""
    """Why the replica could not start, so far."""

    @property
    def state(self) -> ReplicaState:
        """The worst state of any rank: a replica commits, and is dirty, as a whole."""
        states = {ReplicaState(rank.state) for rank in self.ranks}
        for state in (ReplicaState.DIRTY, ReplicaState.OPEN, ReplicaState.VERIFIED):
            if state in states:
                return state
        return ReplicaState.CLEAN

    @property
    def version(self) -> int:
        return min((rank.version for rank in self.ranks), default=0)

    @property
    def epoch(self) -> int:
        return min((rank.epoch for rank in self.ranks), default=0)

    @property
    def digest(self) -> str:
        return "+".join(rank.digest for rank in self.ranks)

    def refusal(self, max_skew: int) -> str:
        """Why the replica must not serve; empty when it may. A planned pause does not count: requests wait in the engine."""
        if not self.ranks:
            return self.fault or "starting: the engine's memory is not offered yet"
        if self.committed is None:
            return self.fault or "starting: the ledger was not read yet"
        if self.state is ReplicaState.DIRTY:
            return "; ".join(rank.reason for rank in self.ranks if rank.reason) or "weights are torn"
        if self.committed - self.version > max_skew:
            return f"holds version {self.version}, version {self.committed} is committed"
        return ""


class Replica:
    """Drives one engine through joins and pushes; `start` once, then `open` for each push."""

    def __init__(self, *, engine: Engine, contract: Contract, facts: PodFacts, ledger: Ledger) -> None:
        self._engine = engine
        self._contract = contract
        self._facts = facts
        self._ledger = ledger
        self._busy = asyncio.Lock()
        self._current: PushRecord | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat = Heartbeat("replica", self._beat, interval_s=LEASE_S / 3)
        self._joined_at = 0.0
        self._metrics = ReplicaMetrics()
        self.view = View()

    @property
    def name(self) -> str:
        return self._facts.name

    def refusal(self) -> str:
        """Why this replica must not serve now, in words; empty when it may."""
        return self.view.refusal(self._contract.transfer.max_version_skew)

    def metrics(self) -> bytes:
        """The text for a Prometheus scrape."""
        view = self.view
        return self._metrics.render(
            state=view.state,
            version=view.version,
            committed=view.committed,
            serving=not self.refusal(),
            received_bytes=sum(rank.received_bytes for rank in view.ranks),
        )

    def start(self) -> None:
        """Offer the engine's memory and join the session, in the background: the API server must come up meanwhile."""
        self._spawn(self._join(), "weightsync-join")

    async def open(self, record: PushRecord) -> dict[str, Any]:
        """Pause, offer memory to the writers of `record`, and see the push to its end in the background.

        Raises FencedOut when the push is not (or no longer) one to take, DeadlineExceeded when the engine would not pause.
        """
        started = time.monotonic()
        deadline = Deadline.at(await asyncio.to_thread(self._ledger.deadline_to_monotonic, record.deadline_at))
        await self._supersede(record)
        await _within(self._busy.acquire(), deadline, "an earlier push is not over")
        try:
            watch = Stopwatch()
            with watch.phase("pause"):
                await self._pause(self._contract.transfer.pause_mode, deadline)
            with watch.phase("open"):
                await self._rpc("weightsync_open", record.to_json())
        except BaseException as error:
            await self._abort(record, f"not opened: {error}")  # some ranks may have opened
            self._busy.release()
            raise
        self._current = record
        self._spawn(self._conclude(record, deadline, started, watch), f"weightsync-{record.push_id}")
        return {"replica": self.name, "state": self.view.state}

    async def verify(self) -> None:
        """Measure live memory again between pushes; a difference makes the replica DIRTY."""
        async with self._busy:
            await self._rpc("weightsync_verify")
            if self.view.state is ReplicaState.DIRTY:
                await self._stop_serving()

    async def _supersede(self, record: PushRecord) -> None:
        """A newer epoch does not wait for the deadline of a push whose trainer is gone."""
        current = self._current
        if current is not None and current.epoch < record.epoch:
            reason = f"superseded by epoch {record.epoch}"
            await asyncio.to_thread(self._ledger.decide, current.push_id, Decision.ABORT, reason)

    async def _conclude(self, record: PushRecord, deadline: Deadline, started: float, watch: Stopwatch) -> None:
        try:
            verdict = await self._await_verdict(record, deadline)
            if verdict.decision is Decision.COMMIT:
                await self._commit(record, started, watch)
            else:
                await self._abort(record, verdict.reason)
                self._metrics.aborted()
        finally:
            self._current = None
            self._busy.release()
            self._heartbeat.poke()

    async def _await_verdict(self, record: PushRecord, deadline: Deadline) -> Verdict:
        """The ledger's decision. At the deadline this replica asks for ABORT itself; without a ledger it assumes it."""
        ledger = self._ledger.until(deadline.moment)
        while True:
            try:
                if deadline.passed:
                    reason = f"{self.name}: no decision within {deadline.timeout_s:.1f} s"
                    return await asyncio.to_thread(ledger.decide, record.push_id, Decision.ABORT, reason)
                verdict = await asyncio.to_thread(ledger.await_decision, record.push_id, deadline.left_s)
                if verdict is None:
                    reason = f"{self.name}: the ledger lost push {record.push_id}"
                    return await asyncio.to_thread(ledger.decide, record.push_id, Decision.ABORT, reason)
                if verdict.decision is not Decision.OPEN:
                    return verdict
            except LedgerUnavailable as error:
                if deadline.passed:
                    return Verdict(decision=Decision.ABORT, reason=f"ledger lost: {error}")
            await asyncio.sleep(DECISION_POLL_S)

    async def _commit(self, record: PushRecord, started: float, watch: Stopwatch) -> None:
        with watch.phase("apply"):
            await self._rpc("weightsync_commit", record.push_id)
        committed = max(self.view.committed or 0, record.version)
        self.view = dataclasses.replace(self.view, committed=committed)
        with watch.phase("resume"):
            await self._engine.resume_generation()
        applied = Applied(
            replica=self.name,
            digest=self.view.digest,
            pause_seconds=time.monotonic() - started,
            spans=watch.told(self._ledger.clock_of),
        )
        self._metrics.applied(applied)
        await asyncio.to_thread(self._report_applied, record.push_id, applied)

    def _report_applied(self, push_id: str, applied: Applied) -> None:
        try:
            self._ledger.report_applied(push_id, applied)
        except LedgerUnavailable as error:
            logger.warning("push %s is applied, but its pause cannot be reported: %s", push_id, error)

    async def _abort(self, record: PushRecord, reason: str) -> None:
        await self._rpc("weightsync_abort", record.push_id, reason)
        if self.view.state is ReplicaState.DIRTY:
            await self._stop_serving()
        else:
            await self._engine.resume_generation()

    async def _stop_serving(self) -> None:
        """Until the next push repairs it: nothing runs, and what was queued for a new version is answered as aborted."""
        logger.error("torn weights, serving nothing until repaired: %s", self.refusal())
        await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def _pause(self, mode: str, deadline: Deadline) -> None:
        """Wait until the engine is idle: the awaited pause synchronizes the device (vllm/v1/engine/core.py)."""
        pausing = self._engine.pause_generation(mode=mode, clear_cache=True)
        await _within(pausing, deadline, f"requests in flight did not end (pauseMode {mode})")

    async def _join(self) -> None:
        while not self.view.ranks:
            try:
                await self._rpc("weightsync_start", self.name)
            except WeightSyncError as error:
                logger.error("cannot offer the engine's memory, trying again: %s", error)
                self.view = dataclasses.replace(self.view, fault=f"starting: {error}")
                await asyncio.sleep(LEASE_S / 3)
        self._heartbeat.start()

    def _beat(self) -> None:
        """Renew the membership, learn the committed version, tell the operator. On the heartbeat's thread."""
        ledger = self._ledger.until(time.monotonic() + LEASE_S / 3)
        self._joined_at = ledger.join(self._member(), LEASE_S).joined_at
        self.view = dataclasses.replace(self.view, committed=ledger.head().version)
        refusal = self.refusal()
        ledger.publish_replica_status(
            ReplicaStatus(
                name=self.name,
                version=self.view.version,
                epoch=self.view.epoch,
                state=self.view.state,
                serving=not refusal,
                reason=refusal,
                digest=self.view.digest,
            )
        )

    def _member(self) -> Member:
        view = self.view
        return Member(
            replica=self.name,
            url=f"http://{self._facts.ip}:{self._contract.endpoint.port}",
            ranks=len(view.ranks),
            incarnation=replica_incarnation([rank.incarnation for rank in view.ranks]),
            layout_digests=tuple(rank.layout_digest for rank in view.ranks),
            version=view.version,
            epoch=view.epoch,
            seen_epoch=max(rank.seen_epoch for rank in view.ranks),
            state=view.state,
            digest=view.digest,
            joined_at=self._joined_at,
        )

    async def _rpc(self, method: str, *args: str) -> None:
        """Call all ranks and take over what they say. Raises what a rank refused."""
        answers = [json.loads(answer) for answer in await self._engine.collective_rpc(method, args=args)]
        refused = [answer for answer in answers if "error" in answer]
        if refused:
            kind = FencedOut if refused[0]["error"] == FencedOut.__name__ else WeightSyncError
            raise kind(refused[0]["message"])
        self.view = dataclasses.replace(self.view, ranks=tuple(Description(**answer) for answer in answers))

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)


async def _within(work: Any, deadline: Deadline, what: str) -> Any:
    try:
        return await asyncio.wait_for(work, max(deadline.left_s, 0.001))
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} within {deadline.timeout_s:.1f} s") from error

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
import threading
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
        """The worst state of any rank: a replica commits, and is dirty, as a whole; ranks of two versions are dirty together."""
        states = {ReplicaState(rank.state) for rank in self.ranks}
        if len({(rank.epoch, rank.version) for rank in self.ranks}) > 1:
            return ReplicaState.DIRTY
        for state in (ReplicaState.DIRTY, ReplicaState.OPEN, ReplicaState.VERIFIED):
            if state in states:
                return state
        return ReplicaState.CLEAN

    @property
    def torn(self) -> bool:
        """Whether the engine must not answer from what it holds, whatever push is under way."""
        return self.state is ReplicaState.DIRTY or any(rank.torn for rank in self.ranks)

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
        if self.torn:
            return "; ".join(rank.reason for rank in self.ranks if rank.reason) or "weights are torn"
        about_to_switch = (
            self.state is ReplicaState.VERIFIED
        )  # paused for the committed version: requests wait in the engine
        if self.committed - self.version > max_skew and not about_to_switch:
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
        self._paused = False
        self._view_lock = threading.Lock()
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
        """Offer memory to the writers of `record`, paused unless they write into staging; then see the push to its end.

        Raises FencedOut when the push is not (or no longer) one to take, DeadlineExceeded when the engine would not pause.
        """
        started = time.monotonic()
        deadline = Deadline.at(await asyncio.to_thread(self._ledger.deadline_to_monotonic, record.deadline_at))
        await self._supersede(record)
        await _within(self._busy.acquire(), deadline, "an earlier push is not over")
        try:
            watch = Stopwatch()
            if not self._staged:
                with watch.phase("pause"):
                    await self._pause(deadline)
            with watch.phase("open"):
                await self._rpc("weightsync_open", record.to_json())
        except BaseException as error:
            try:
                await self._abort(record, f"not opened: {error}")  # some ranks may have opened
            finally:
                self._busy.release()
            raise
        self._current = record
        self._spawn(self._conclude(record, deadline, started, watch), f"weightsync-{record.push_id}")
        return {"replica": self.name, "state": self.view.state}

    async def verify(self) -> None:
        """Measure live memory again between pushes; a difference makes the replica DIRTY."""
        async with self._busy:
            await self._rpc("weightsync_verify")
            if self.view.torn:
                await self._stop_serving()

    @property
    def _staged(self) -> bool:
        return self._contract.transfer.commit == "staged"

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
                await self._commit(record, deadline, started, watch)
            else:
                await self._abort(record, verdict.reason)
                self._metrics.aborted()
        finally:
            self._current = None
            self._busy.release()
            self._heartbeat.poke()

    async def _await_verdict(self, record: PushRecord, deadline: Deadline) -> Verdict:
        """The ledger's decision. At the deadline this replica asks for ABORT itself.

        Without a ledger a paused engine must assume it; one that serves from memory that nobody writes goes on asking.
        """
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
                if deadline.passed and not self._staged:
                    return Verdict(decision=Decision.ABORT, reason=f"ledger lost: {error}")
            await asyncio.sleep(DECISION_POLL_S)

    async def _commit(self, record: PushRecord, deadline: Deadline, started: float, watch: Stopwatch) -> None:
        """All ranks of this replica hold the version from here on, or none does: a quorum may have gone on without it."""
        await self._rpc("weightsync_describe")
        if not all(rank.state == ReplicaState.VERIFIED for rank in self.view.ranks):
            told = "; ".join(f"rank {rank.rank} is {rank.state} {rank.reason}".strip() for rank in self.view.ranks)
            await self._abort(record, f"it was committed without {self.name}: {told}")
            return
        if self._staged:
            started = time.monotonic()
            with watch.phase("pause"):
                await self._pause_anyway(deadline)
        try:
            with watch.phase("apply"):
                await self._rpc("weightsync_commit", record.push_id)
        except WeightSyncError as error:  # ranks of two versions are DIRTY together
            await self._abort(record, str(error))
            return
        committed = max(self.view.committed or 0, record.version)
        self._note(committed=committed)
        if self.view.torn:
            await self._stop_serving()
            return
        with watch.phase("resume"):
            await self._resume()
        applied = Applied(
            replica=self.name,
            digest=self.view.digest,
            pause_seconds=time.monotonic() - started,
            copy_seconds=max(rank.copy_seconds for rank in self.view.ranks),
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
        if self.view.torn:
            await self._stop_serving()
        else:
            await self._resume()

    async def _stop_serving(self) -> None:
        """Until the next push repairs it: nothing runs, and what was queued for a new version is answered as aborted."""
        logger.error("torn weights, serving nothing until repaired: %s", self.refusal())
        self._paused = True
        await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def _pause(self, deadline: Deadline) -> None:
        """Wait until the engine is idle: the awaited pause synchronizes the device (vllm/v1/engine/core.py)."""
        mode = self._contract.transfer.pause_mode
        self._paused = True
        pausing = self._engine.pause_generation(mode=mode, clear_cache=self._drops_cache)
        await _within(pausing, deadline, f"requests in flight did not end (pauseMode {mode})")

    async def _pause_anyway(self, deadline: Deadline) -> None:
        """Pause for a version that is committed already: requests that outlast the push's deadline are aborted."""
        try:
            await self._pause(deadline)
        except DeadlineExceeded as error:
            logger.warning("aborting them: %s", error)
            await self._engine.pause_generation(mode="abort", clear_cache=self._drops_cache)

    async def _resume(self) -> None:
        """Go on, if a push has paused the engine and left it whole."""
        if self._paused and not self.view.torn:
            self._paused = False
            await self._engine.resume_generation()

    @property
    def _drops_cache(self) -> bool:
        """What was computed by weights that were torn is never kept."""
        return self._contract.transfer.prefix_cache == "reset" or self.view.torn

    async def _join(self) -> None:
        while not self.view.ranks:
            try:
                await self._rpc("weightsync_start", self.name)
            except WeightSyncError as error:
                logger.error("cannot offer the engine's memory, trying again: %s", error)
                self._note(fault=f"starting: {error}")
                await asyncio.sleep(LEASE_S / 3)
        self._heartbeat.start()

    def _beat(self) -> None:
        """Renew the membership, learn the committed version, tell the operator. On the heartbeat's thread."""
        ledger = self._ledger.until(time.monotonic() + LEASE_S / 3)
        self._joined_at = ledger.join(self._member(), LEASE_S).joined_at
        self._note(committed=ledger.head().version)
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
        self._note(ranks=tuple(Description(**answer) for answer in answers))

    def _note(self, **changes: Any) -> None:
        """Change the view, from the event loop or the heartbeat's thread: neither may put back what the other replaced."""
        with self._view_lock:
            self.view = dataclasses.replace(self.view, **changes)

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

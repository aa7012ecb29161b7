"""One engine replica as a member of its session: joins the ledger, takes pushes to their end, knows whether it may serve.

Lives in vLLM's API server process, on its event loop. It reaches the workers by RPC and keeps no state that they or the ledger
do not hold: `view` is what it last heard from them, so that a probe or a request costs no RPC. Whatever happens to the trainer,
every push that was opened here ends here, by the ledger's decision or at the push's own deadline.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from typing import Any, Protocol

from weightsync.config import Contract, PodFacts
from weightsync.errors import ConfigError, DeadlineExceeded, FencedOut, LedgerUnavailable, WeightSyncError
from weightsync.metrics import ReplicaMetrics
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.heartbeat import Heartbeat
from weightsync.rendezvous.incarnation import replica_incarnation
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Member, PushRecord, Verdict
from weightsync.repair import Repairer
from weightsync.telemetry import Stopwatch
from weightsync.vllm.calls import Callee, Calls
from weightsync.vllm.pauses import Pausable, Pauses, within
from weightsync.vllm.ranks import require_every_rank
from weightsync.vllm.view import View
from weightsync.waiting import Deadline
from weightsync.wire import Decision, ReplicaState, ReplicaStatus

logger = logging.getLogger(__name__)

LEASE_S = 9.0
"""A replica that is not heard of for so long is no member of the next push; renewed each third of it."""
LEAVE_S = LEASE_S / 3
"""How long an engine that ends tries to say so before it ends all the same."""
DECISION_POLL_S = 0.01
GIVE_UP_S = 1.0
"""How long the answer to a push that was not opened waits for its abort; requests that hold a pause up may take longer."""


class Engine(Pausable, Callee, Protocol):
    """The part of vLLM's EngineClient that a replica needs."""

    async def check_health(self) -> None: ...


class Replica:
    """Drives one engine through joins and pushes; `start` once, then `open` for each push."""

    def __init__(
        self,
        *,
        engine: Engine,
        contract: Contract,
        facts: PodFacts,
        ledger: Ledger,
        together: bool = False,
    ) -> None:
        """engine: its `collective_rpc` returns what the workers of all engine cores say. together: these go on by consensus."""
        self._calls = Calls(engine, lambda: self.view.largest_rank_bytes)
        self._pauses = Pauses(engine, together=together)
        self._contract = contract
        self._facts = facts
        self._ledger = ledger
        self._busy = asyncio.Lock()
        self._current: PushRecord | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat = Heartbeat("replica", self._beat, interval_s=LEASE_S / 3)
        self._joined_at = 0.0
        self._leaving = False
        self._view_lock = threading.Lock()
        self._metrics = ReplicaMetrics()
        self._repairer = Repairer(patient=self, contract=contract, ledger=ledger, on_ended=self._metrics.repair_ended)
        self.view = View()

    @property
    def name(self) -> str:
        return self._facts.name

    def refusal(self) -> str:
        """Why this replica must not serve now, in words; empty when it may."""
        if self._leaving:
            return "ending: it has left its session"
        return self.view.refusal(self._contract.transfer.max_version_skew) or self.stuck

    @property
    def stuck(self) -> str:
        """Why the engine computes nothing though it should: a rank of it has not gone on, or stands still; empty otherwise."""
        return self._pauses.stuck or self._calls.stuck

    def metrics(self) -> bytes:
        """The text for a Prometheus scrape."""
        view = self.view
        return self._metrics.render(
            state=view.state,
            version=view.version,
            committed=view.committed,
            serving=not self.refusal(),
            received_bytes=sum(rank.received_bytes for rank in view.ranks),
            target_bytes={"direct": view.direct_bytes, "replayed": view.replayed_bytes},
        )

    def start(self) -> None:
        """Offer the engine's memory and join the session, in the background: the API server must come up meanwhile."""
        self._spawn(self._join(), "weightsync-join")

    def leave(self) -> None:
        """End this membership and refuse requests from here on: no push that begins later waits for an engine that ends.

        Not on the event loop's thread if that must go on: it waits for the ledger, LEAVE_S and a last try at most. Again: nothing.
        """
        deadline = Deadline(LEAVE_S)
        with self._view_lock:
            if self._leaving:
                return
            self._leaving = True
        self._heartbeat.close(deadline.left_s)
        if not self.view.ranks:
            return
        try:
            self._ledger.until(deadline.moment).leave(self.name, self.member().incarnation)
        except LedgerUnavailable as error:
            logger.warning("%s ends and cannot say so; its lease runs out in %.0f s: %s", self.name, LEASE_S, error)

    async def open(self, record: PushRecord) -> dict[str, Any]:
        """Offer memory to the writers of `record`, paused unless they write into staging; then see the push to its end.

        Raises FencedOut when the push is not (or no longer) one to take, DeadlineExceeded when the engine would not pause.
        """
        started = time.monotonic()
        self._require_offered()
        deadline = await self._deadline(record)
        if record.source and self._busy.locked():  # queued, it would stand before the next push
            raise FencedOut(f"repair {record.push_id}: a push is open on {self.name}")
        await self._supersede(record)
        await within(self._busy.acquire(), deadline, "an earlier push is not over")
        try:
            watch = Stopwatch()
            if not self._staged:
                with watch.phase("pause"):
                    await self._pause(deadline)
            with watch.phase("open"):
                await self._rpc("weightsync_open", record.to_json())
        except BaseException as error:
            giving_up = self._spawn(
                self._give_up(record, f"not opened: {error}"), f"weightsync-{record.push_id}-gives-up"
            )
            await asyncio.wait({giving_up}, timeout=GIVE_UP_S)
            raise
        self._current = record
        self._spawn(self._conclude(record, deadline, started, watch), f"weightsync-{record.push_id}")
        return {"replica": self.name, "state": self.view.state}

    async def verify(self) -> None:
        """Measure live memory again between pushes; a difference makes the replica DIRTY. Raises FencedOut while it starts."""
        self._require_offered()
        async with self._busy:
            await self._rpc("weightsync_verify")
            if self.view.torn:
                await self._stop_serving()

    @property
    def late(self) -> bool:
        """Whether a repair would help, and nothing is open that may bring the version."""
        return self.view.late and not self._busy.locked() and not self._leaving

    async def lend(self, record: PushRecord) -> dict[str, Any]:
        """Have each rank write its live memory into the replica that `record` repairs; this one serves on.

        Raises FencedOut, and then no rank writes, when this replica does not hold what is asked for.
        """
        self._require_offered()
        view = self.view
        holds = (view.epoch, view.version) == record.order and view.state is ReplicaState.CLEAN and view.lends
        if record.session != self._contract.session or record.source != self.name or not holds:
            raise FencedOut(
                f"repair {record.push_id} asks {record.source} of {record.session} for {record.order}; {self.name} is "
                f"{view.state} at {(view.epoch, view.version)}{'' if view.lends else ' and cannot lend'}"
            )
        await self._rpc("weightsync_lend", record.to_json())
        return {"replica": self.name}

    def _require_offered(self) -> None:
        if self._leaving:
            raise FencedOut(f"{self.name} is ending: it takes part in no push")
        if not self.view.ranks:
            raise FencedOut(f"{self.name} is starting: its memory is not offered yet")

    async def _deadline(self, record: PushRecord) -> Deadline:
        """Of the push, by this process's clock; a thread waits where the ledger has to be asked for its own."""
        moment = self._ledger.known_moment(record.deadline_at)
        if moment is None:
            moment = await asyncio.to_thread(self._ledger.deadline_to_monotonic, record.deadline_at)
        return Deadline.at(moment)

    @property
    def _staged(self) -> bool:
        return self._contract.transfer.commit == "staged"

    async def _supersede(self, record: PushRecord) -> None:
        """A newer epoch does not wait for the deadline of a push whose trainer is gone, and a newer version for no repair."""
        current = self._current
        if current is None:
            return
        if current.epoch < record.epoch or (current.source and current.order < record.order):
            reason = f"superseded by version {record.version} of epoch {record.epoch}"
            await asyncio.to_thread(self._ledger.decide, current.push_id, Decision.ABORT, reason)

    async def _conclude(self, record: PushRecord, deadline: Deadline, started: float, watch: Stopwatch) -> None:
        try:
            verdict = await self._await_verdict(record, deadline)
            if verdict.decision is Decision.COMMIT:
                await self._commit(record, deadline, started, watch)
            else:
                if record.source:
                    await asyncio.to_thread(self._repairer.await_writers, record, deadline)
                await self._abort(record, verdict.reason)
                self._metrics.aborted()
        finally:
            self._current = None
            self._busy.release()
            self._heartbeat.poke()

    async def _give_up(self, record: PushRecord, reason: str) -> None:
        """End a push that could not be opened, on the ranks that may have opened it; no other begins meanwhile."""
        try:
            await self._abort(record, reason)
        finally:
            self._busy.release()

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
            self._note_committed(record.version)
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
        self._note_committed(record.version)
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
        await self._pauses.stop(clear_cache=True)

    async def _pause(self, deadline: Deadline) -> None:
        await self._pauses.pause(self._contract.transfer.pause_mode, deadline, clear_cache=self._drops_cache)

    async def _pause_anyway(self, deadline: Deadline) -> None:
        """Pause for a version that is committed already: requests that outlast the push's deadline are aborted."""
        try:
            await self._pause(deadline)
        except DeadlineExceeded as error:
            logger.warning("aborting them: %s", error)
            await self._pauses.stop(clear_cache=self._drops_cache)

    async def _resume(self) -> None:
        """Go on, if a push has paused the engine and left it whole. A rank that does not is told by readiness and liveness."""
        if not self.view.torn:
            await self._pauses.resume()

    @property
    def _drops_cache(self) -> bool:
        """What was computed by weights that were torn is never kept."""
        return self._contract.transfer.prefix_cache == "reset" or self.view.torn

    async def _join(self) -> None:
        while not self.view.ranks:
            try:
                ranks = await self._calls.start(self.name)
                require_every_rank(ranks, pod_uid=self._facts.uid)
                self._note(ranks=ranks)
            except ConfigError as error:
                logger.error("this engine cannot be a replica: %s", error)
                self._note(fault=str(error))
                return
            except WeightSyncError as error:
                logger.error("cannot offer the engine's memory, trying again: %s", error)
                self._note(fault=f"starting: {error}")
                await asyncio.sleep(LEASE_S / 3)
        self._heartbeat.start()
        self._spawn(self._repairer.run(), "weightsync-repairs")

    def _beat(self) -> None:
        """Renew the membership, learn the committed version, tell the operator. On the heartbeat's thread."""
        ledger = self._ledger.until(time.monotonic() + LEASE_S / 3)
        told = self._status()
        self._joined_at = ledger.join(self.member(), LEASE_S, told).joined_at
        head, current = ledger.witness.version, self._current
        if current is None or current.version != head:  # else `_conclude` takes it up, with what the ranks hold of it
            self._note_committed(head)
        if (status := self._status()) != told:  # what was committed changes whether it may serve
            ledger.publish_replica_status(status)

    def _status(self) -> ReplicaStatus:
        """This replica as it is now, for the operator."""
        view, refusal = self.view, self.refusal()
        return ReplicaStatus(
            name=self.name,
            version=view.version,
            epoch=view.epoch,
            state=view.state,
            serving=not refusal,
            reason=refusal,
            digest=view.digest,
            lends=view.lends,
            direct_bytes=view.direct_bytes,
            replayed_bytes=view.replayed_bytes,
        )

    def member(self) -> Member:
        """This replica as it is now, for the ledger."""
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
            lends=view.lends,
            joined_at=self._joined_at,
        )

    async def _rpc(self, method: str, *args: str) -> None:
        """Call all ranks and take over what they say. Raises what a rank refused."""
        self._note(ranks=await self._calls.ask(method, *args))

    def _note_committed(self, version: int) -> None:
        """What the session has committed; requests are refused from here on if the replica is too far behind it."""
        self._note(committed=max(self.view.committed or 0, version))

    def _note(self, **changes: Any) -> None:
        """Change the view, from the event loop or the heartbeat's thread: neither may put back what the other replaced."""
        with self._view_lock:
            self.view = dataclasses.replace(self.view, **changes)

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

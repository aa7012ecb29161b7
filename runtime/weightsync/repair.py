"""A torn or late replica has itself repaired by a healthy one: the loop that finds the need, and the repair as it coordinates it.

Runs in the API server's process of the replica that is repaired, beside its event loop; what waits, waits on a thread. A repair is
opened, verified and decided like a push, and fenced by a push: the replica aborts it for whatever is newer. The replica
coordinates its own repair, so that nobody is left to be waited for when it dies. Imports the ledger, never vLLM.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from weightsync import verify
from weightsync.config import Contract
from weightsync.endpoints import Endpoints
from weightsync.errors import DeadlineExceeded, LedgerUnavailable, PushAborted, WeightSyncError
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Claim, Member, PushRecord, Vote, WriterReport
from weightsync.sources import choose_source, loans, needs_repair
from weightsync.telemetry import Stopwatch, Transports, agree_on_transports, longest_phase
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Decision, PushSummary

logger = logging.getLogger(__name__)

LOOK_S = 1.0
PATIENCE_S = 3.0
PAUSE_MAX_S = 60.0
"""Longest pause after repairs that failed one after another; each of them pauses an engine in place, and writes to the ledger."""
"""A trainer that lives comes first: its keeper looks each second, and a push that was aborted is tried again after two."""
LEASE_LOOK_S = 0.25
ASK_S = 10.0
SETTLE_S = 2.0
"""A lender that hears of an abort gets so long to say that nothing of it is in flight; then its access is ended."""
APPLY_S = 30.0
"""The account of a repair waits so long for the replica to serve; the commit does not wait for the account."""
LENDS_NOTHING = (401, 404, 409)
"""Answers of an engine that has not begun to write, and will not."""


class Patient(Protocol):
    """The replica that may need a repair: `vllm.replica.Replica`."""

    @property
    def late(self) -> bool:
        """Torn or behind, as far as it knows, and no push or repair is open on it."""
        ...

    def member(self) -> Member: ...

    async def open(self, record: PushRecord) -> Any: ...


class Repairer:
    """Repairs one replica whenever it needs it and a peer can; `on_ended` is told `repaired` or `failed` of each repair."""

    def __init__(
        self, *, patient: Patient, contract: Contract, ledger: Ledger, on_ended: Callable[[str], None]
    ) -> None:
        self._patient = patient
        self._contract = contract
        self._ledger = ledger
        self._on_ended = on_ended
        self._late_since: float | None = None
        self._failures: Counter[str] = Counter()
        """By incarnation of the source, since the last repair that went well."""
        self._not_before = 0.0

    async def run(self) -> None:
        """For as long as the replica lives."""
        while True:
            await asyncio.sleep(
                LOOK_S * random.uniform(0.8, 1.2)
            )  # a fleet that is late together does not look together
            try:
                await self._look()
            except WeightSyncError as error:
                logger.warning("no repair for now: %s", error)
            except Exception:  # a bug must not leave this replica torn for good
                logger.exception("no repair for now")

    def await_writers(self, record: PushRecord, deadline: Deadline) -> None:
        """Give the lender of a repair that was aborted SETTLE_S to say that nothing is in flight, up to the repair's deadline."""

        def fetch() -> bool | None:
            reports = self._ledger.until(time.monotonic()).writer_reports(record.push_id)
            return True if len(reports) == record.writers else None

        patience = min(deadline, Deadline(SETTLE_S), key=lambda d: d.moment)
        with suppress(WeightSyncError):
            wait_until(fetch, deadline=patience, what=f"{record.source} has not ended")

    async def _look(self) -> None:
        if not self._patient.late:
            self._late_since = None
            return
        if self._late_since is None:
            self._late_since = time.monotonic()
        if time.monotonic() < max(self._late_since + PATIENCE_S, self._not_before):
            return
        begun = await asyncio.to_thread(self._begin)
        if begun is not None:
            await self._repair(*begun)

    def _begin(self) -> tuple[PushRecord, Claim, Member] | None:
        """Claim this replica's repair from the best source there is; None when there is none, or others are at it."""
        ledger, me = self._ledger.until(time.monotonic() + LOOK_S), self._patient.member()
        head, live = ledger.head(), ledger.live_members()
        known = live.get(me.replica)
        if known is None or known.incarnation != me.incarnation or not needs_repair(me, head):
            return None
        source = choose_source(me, live, head, loans(ledger.claims(live), live), self._failures)
        if source is None:
            return None
        pushed = [push for push in ledger.pushes() if (push.epoch, push.version) == head.order]
        begun = ledger.begin_repair(
            target=me,
            source=source,
            head=head,
            timeout_s=self._contract.transfer.timeout_seconds,
            step=pushed[0].step if pushed else 0,
        )
        return None if begun is None else (*begun, source)

    async def _repair(self, record: PushRecord, claim: Claim, source: Member) -> None:
        logger.info("repair %s: version %d from %s", record.push_id, record.version, source.replica)
        watch = Stopwatch()
        try:
            with watch.phase("open"):
                await self._patient.open(record)
            summary = await asyncio.to_thread(self._carry_out, record, source, watch)
            self._on_ended("repaired")
            self._failures.clear()
            logger.info("repair %s: %d bytes in %.2f s", record.push_id, summary.bytes, summary.seconds)
        except WeightSyncError as error:
            self._on_ended("failed")
            self._failures[source.incarnation] += 1
            self._not_before = time.monotonic() + min(PAUSE_MAX_S, LOOK_S * 2.0 ** self._failures.total())
            logger.warning("repair %s from %s failed: %s", record.push_id, source.replica, error)
            with suppress(LedgerUnavailable):  # else it is aborted at its deadline
                await asyncio.to_thread(self._ledger.decide, record.push_id, Decision.ABORT, str(error))
        finally:
            with suppress(LedgerUnavailable):  # else the claim runs out by itself
                await asyncio.to_thread(self._ledger.release_claim, claim)

    def _carry_out(self, record: PushRecord, source: Member, watch: Stopwatch) -> PushSummary:
        """From the opened replica to the version that it serves. Raises what ended the repair early."""
        began = time.monotonic() - sum(watch.seconds.values())
        deadline = Deadline.at(self._ledger.deadline_to_monotonic(record.deadline_at))
        with self._ledger.bounded(deadline.moment):
            self._ask(record, source, deadline)
            votes = self._wait_votes(record, source, deadline)
            verdict = self._ledger.decide(record.push_id, Decision.COMMIT)
            if verdict.decision is not Decision.COMMIT:
                raise PushAborted(verdict.reason)
        with watch.phase("commit"):
            applied = self._wait_applied(record)
        summary = self._account(record, votes, applied, watch, time.monotonic() - began)
        with suppress(LedgerUnavailable):  # the replica serves all the same
            self._ledger.publish_push(summary)
        return summary

    def _ask(self, record: PushRecord, source: Member, deadline: Deadline) -> None:
        """Have the source begin. Where it says that it will not, its writers are known to be silent, and nothing is quarantined."""
        endpoints = Endpoints(token=self._contract.endpoint_token())
        timeout_s = max(min(deadline.left_s, ASK_S), 0.1)
        try:
            answer = endpoints.post(source.url, "/weightsync/v1/lend", record.to_json(), timeout_s=timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise PushAborted(f"{source.replica} at {source.url}: {type(error).__name__} {error}") from error
        finally:
            endpoints.close()
        if answer.ok:
            return
        if answer.status in LENDS_NOTHING:
            for rank in range(record.writers):
                self._ledger.report_writer(record.push_id, WriterReport(rank=rank, ok=False, reason=answer.message))
        raise PushAborted(f"{source.replica} does not lend: {answer.message}")

    def _wait_votes(self, record: PushRecord, source: Member, deadline: Deadline) -> list[Vote]:
        """The votes of all ranks, each for the version. Raises PushAborted as soon as they cannot come."""
        leases = Deadline(0.0)

        def fetch() -> list[Vote] | None:
            nonlocal leases
            verdict = self._ledger.decision(record.push_id)
            if verdict is None or verdict.decision is not Decision.OPEN:
                raise PushAborted(verdict.reason if verdict else f"the ledger lost {record.push_id}")
            failed = [r for r in self._ledger.writer_reports(record.push_id).values() if not r.ok]
            if failed:
                raise PushAborted(failed[0].reason)
            votes = list(self._ledger.votes(record.push_id).values())
            refused = [vote for vote in votes if not vote.ok]
            if refused:
                raise PushAborted(f"rank {refused[0].rank}: {refused[0].reason}")
            if leases.passed:
                leases = Deadline(LEASE_LOOK_S)
                if self._ledger.lost_members({source.replica: source.incarnation}):
                    raise PushAborted(f"{source.replica} is lost: its lease ran out, or it restarted")
            return votes if len(votes) == record.writers else None

        return wait_until(fetch, deadline=deadline, what=f"ranks have not all verified what {source.replica} lends")

    def _wait_applied(self, record: PushRecord) -> Applied | None:
        def fetch() -> Applied | None:
            return next(iter(self._ledger.applied(record.push_id).values()), None)

        try:
            return wait_until(fetch, deadline=Deadline(APPLY_S), what=f"repair {record.push_id} is not applied")
        except (DeadlineExceeded, LedgerUnavailable) as error:
            logger.warning("committed, but %s", error)
            return None

    def _account(
        self, record: PushRecord, votes: list[Vote], applied: Applied | None, watch: Stopwatch, seconds: float
    ) -> PushSummary:
        """What the operator shows: the repair as the last push, with whose memory it was."""
        reports = self._ledger.writer_reports(record.push_id).values()
        wire_s = longest_phase((report.spans for report in reports), "wire")
        verify_s = longest_phase((vote.spans for vote in votes), "verify")
        received = sum(vote.bytes for vote in votes)
        digest = verify.sum_hex(vote.digest for vote in votes)
        served = "" if applied is None else verify.sum_hex(applied.digest.split("+"))
        moved_by = agree_on_transports(Transports(names=r.transports, proof=r.transport_proof) for r in reports)
        return PushSummary(
            push_id=record.push_id,
            epoch=record.epoch,
            version=record.version,
            step=record.step,
            outcome=Decision.COMMIT,
            catch_up=True,
            source=record.source,
            seconds=seconds,
            bytes=received,
            gbps=received / wire_s / 1e9 if wire_s else 0.0,
            pause_seconds=0.0 if applied is None else applied.pause_seconds,
            phases={**watch.seconds, "wire": wire_s, "verify": verify_s},
            copy_seconds=0.0 if applied is None else applied.copy_seconds,
            replicas=sorted(record.members),
            digest=digest,
            digest_ok=served == digest,
            transports=moved_by.names,
            transport_proof=moved_by.proof,
            finished_at=self._ledger.now(),
        )

"""The first trainer rank's part of a push: who takes part, when writers begin, and the one decision at the end.

Reads as the protocol: members, plan, begin, convert, ready, open, go, wire, votes, decide, applied. Every wait ends at the
push's one deadline, and sooner when somebody whom it waits for has died. Never imports vLLM.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from weightsync.accounts import summarize
from weightsync.config import Contract
from weightsync.endpoints import Endpoints
from weightsync.errors import (
    ConversionError,
    DeadlineExceeded,
    LedgerUnavailable,
    PushAborted,
    TransportError,
    WeightSyncError,
)
from weightsync.participants import Participants
from weightsync.push_steps import prepare, write_and_report
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.progress import PushProgress
from weightsync.rendezvous.records import Claim, Member, PushRecord, Verdict, Vote, WriterReport, final_word
from weightsync.scale_exchange import ScaleExchange
from weightsync.telemetry import Stopwatch, trace_events, write_trace
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Decision, PushSummary, ReplicaState
from weightsync.writer import Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEARN_S = 15.0
"""ModelExpress gets so long to know a member that the ledger lists."""
APPLY_S = 5.0
"""Replicas get so long after a commit to say that they serve it; only the account waits for it, not the commit."""
ACCOUNT_S = 1.0
"""The account comes so long after the deadline at the latest: the other ranks wait GRACE_S for it."""
OPEN_WORKERS = 64
LEASE_LOOK_S = 0.25
"""Leases are looked at so often while a push waits; they are good for seconds. What is told comes without looking."""


class Coordinator:
    """Runs the pushes of one epoch on trainer rank 0."""

    def __init__(
        self,
        *,
        contract: Contract,
        epoch: int,
        world_size: int,
        ledger: Ledger,
        writer: Writer,
        exchange: ScaleExchange,
    ) -> None:
        self._contract = contract
        self._epoch = epoch
        self._world_size = world_size
        self._ledger = ledger
        self._writer = writer
        self._scales = exchange
        self.watch = Stopwatch()
        """Of the last push."""
        self._leases_seen_at = 0.0
        self._endpoints = Endpoints(token=contract.endpoint_token())
        self._pool = concurrent.futures.ThreadPoolExecutor(OPEN_WORKERS, thread_name_prefix="weightsync-open")

    def push(self, *, step: int, sequence: int, call: int) -> PushSummary:
        """Convert and push the model's present weights as the next version.

        Raises PushAborted with the reason, FencedOut when superseded, ConversionError naming a tensor of this rank.
        """
        deadline = Deadline(self._contract.transfer.timeout_seconds)
        with self._ledger.bounded(deadline.moment):
            members = self._wait_members(deadline)
            return self._run(step, sequence, members, deadline, catch_up=0, call=call)

    def catch_up(self, *, version: int, sequence: int, step: int) -> PushSummary | None:
        """Bring the replicas that are torn or behind to `version`, which the arenas still hold; None when all are current.

        Those that a peer is repairing are left to it; all are, where arenas are rings that hold no whole version.
        """
        if not self._writer.keeps_versions:
            return None
        head = self._ledger.head()
        if (head.version_epoch, head.version) != (self._epoch, version):
            return None
        late = {
            name: member
            for name, member in self._ledger.live_members().items()
            if member.state == ReplicaState.DIRTY or (member.epoch, member.version) < head.order
        }
        deadline = Deadline(self._contract.transfer.timeout_seconds)
        with self._ledger.bounded(deadline.moment), ExitStack() as claimed:
            ours = {name: member for name, member in late.items() if self._claim(name, deadline, claimed)}
            return self._run(step, sequence, ours, deadline, catch_up=version, call=0) if ours else None

    def _claim(self, replica: str, deadline: Deadline, claimed: ExitStack) -> bool:
        """Take on a replica until `claimed` closes; False when a peer has."""
        claim = self._ledger.claim_for_trainer(replica, epoch=self._epoch, timeout_s=deadline.left_s)
        if claim is not None:
            claimed.callback(self._release, claim)
        return claim is not None

    def _release(self, claim: Claim) -> None:
        with suppress(LedgerUnavailable):  # it runs out by itself
            self._ledger.release_claim(claim)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._endpoints.close()

    def _run(
        self,
        step: int,
        sequence: int,
        members: Mapping[str, Member],
        deadline: Deadline,
        *,
        catch_up: int,
        call: int,
    ) -> PushSummary:
        started = time.monotonic()
        phases = self.watch = Stopwatch()
        incarnations = {name: member.incarnation for name, member in members.items()}
        participants = Participants(members, self._quorum(catch_up > 0))
        with phases.phase("plan"):
            plans = self._writer.learn(incarnations, Deadline(min(LEARN_S, deadline.left_s)), catch_up=catch_up > 0)
            record = self._ledger.begin_push(
                epoch=self._epoch,
                sequence=sequence,
                step=step,
                timeout_s=deadline.left_s,
                writers=self._world_size,
                members=incarnations,
                plan_digests=plans,
                catch_up=catch_up > 0,
                floor_version=catch_up or max(member.version for member in members.values()),
                verify=self._contract.transfer.verify,
                call=call,
            )
        votes: dict[tuple[str, int], Vote] = {}
        progress = PushProgress(self._ledger, record.push_id)
        try:
            votes = self._carry_out(record, participants, progress, deadline, phases)
            verdict = self._ledger.decide(record.push_id, Decision.COMMIT)
        except WeightSyncError as error:  # the verdict may be COMMIT all the same, where only its answer was lost
            if isinstance(error, ConversionError):
                self._report_final(record, error)
            verdict = self._decide_abort(record, error)
            if isinstance(error, ConversionError):  # no later attempt sends these weights
                with suppress(PushAborted, ConversionError):
                    self._account(record, verdict, participants, progress, votes, phases, started, deadline)
                raise
        except Exception as error:  # a device without memory, say: the engines need not wait for the deadline
            self._decide_abort(record, error)
            raise
        return self._account(record, verdict, participants, progress, votes, phases, started, deadline)

    def _quorum(self, catch_up: bool) -> int | None:
        """Of late replicas each one counts by itself, where the fleet as a whole may lack some."""
        quorum = self._contract.transfer.quorum
        return quorum and (1 if catch_up else quorum)

    def _carry_out(
        self,
        record: PushRecord,
        participants: Participants,
        progress: PushProgress,
        deadline: Deadline,
        phases: Stopwatch,
    ) -> dict[tuple[str, int], Vote]:
        """Everything between the begin of a push and its decision; raises when it cannot be committed."""
        others = set(range(1, self._world_size))
        wait = partial(self._wait_ranks, record, participants, progress, deadline)
        with phases.phase("plan"):
            group = self._scales.group
            self._ledger.report_planned(record.push_id, 0, group)
            wait(others, lambda: progress.planned, "trainer ranks have not planned")
        with phases.phase("convert"):
            look = partial(self._look, record, participants, progress)
            agree = self._scales.within(record.push_id, deadline, {**progress.planned, 0: group}, look)
            try:
                prepare(self._writer, record, self._contract, agree)
            except TransportError:
                look()  # a rank that failed has told why before it closed its connections
                raise
            self._ledger.report_ready(record.push_id, 0)
            wait(others, lambda: progress.ready, "trainer ranks are not ready to write")
        with phases.phase("open"):
            self._open(record, participants, progress, deadline)
            opened = frozenset(participants.left)
            self._ledger.release_writers(record.push_id, opened)
        write_and_report(self._ledger, self._writer, record, self._contract, opened, 0, deadline, phases)
        with self._writer.delivering(), phases.phase("wire"):
            wait({0, *others}, lambda: progress.reports, "trainer ranks have not written")
        with self._writer.delivering(), phases.phase("verify"):
            return self._wait_votes(record, participants, progress, deadline)

    def _wait_members(self, deadline: Deadline) -> dict[str, Member]:
        needed = self._contract.transfer.quorum or 1

        def fetch() -> dict[str, Member] | None:
            members = self._ledger.live_members()
            return members if len(members) >= needed else None

        what = f"not {needed} of the session's engines are alive" if needed > 1 else "no engine has joined the session"
        try:
            return wait_until(fetch, deadline=deadline, what=what, poll_max_s=0.5)
        except DeadlineExceeded as error:
            raise PushAborted(f"{error}; is an inference replica running, and can it reach the ledger?") from error

    def _open(self, record: PushRecord, participants: Participants, progress: PushProgress, deadline: Deadline) -> None:
        """Ask all replicas at once; returns when each has opened or is dropped. Nobody is written into who has not opened."""
        answers = queue.SimpleQueue[tuple[str, concurrent.futures.Future[str | None]]]()
        waiting, opened = set(participants.left), set[str]()
        for name, member in participants.left.items():
            asked = self._pool.submit(self._open_one, record.told_to(name).to_json(), member, deadline)
            asked.add_done_callback(partial(_put, answers, name))
        patience = deadline
        next_look = Deadline(LEASE_LOOK_S)
        while len(opened) < len(participants.left):
            ended = {name: future.result() for name, future in _take_all(answers, LEASE_LOOK_S)}
            participants.drop({name: f"did not open: {why}" for name, why in ended.items() if why is not None})
            waiting -= ended.keys()
            opened |= ended.keys()
            if next_look.passed:
                progress.read_all()
                self._fail_early(record, participants, progress)
                next_look = Deadline(LEASE_LOOK_S)
            opened &= participants.left.keys()  # one that opened and was lost stands for nobody that has not
            patience = min(patience, participants.patience(len(opened), deadline), key=lambda d: d.moment)
            if patience.passed:
                participants.drop(dict.fromkeys(waiting, f"had not opened after {patience.timeout_s:.1f} s"))
                break

    def _open_one(self, body: str, member: Member, deadline: Deadline) -> str | None:
        """None when the replica has opened for the push record in `body`, else why not."""
        timeout_s = max(deadline.left_s, 0.1)
        try:
            answer = self._endpoints.post(member.url, "/weightsync/v1/push", body, timeout_s=timeout_s)
        except (OSError, http.client.HTTPException) as error:
            return f"{member.url}: {type(error).__name__} {error}"
        return None if answer.ok else answer.message

    def _wait_ranks(
        self,
        record: PushRecord,
        participants: Participants,
        progress: PushProgress,
        deadline: Deadline,
        ranks: Set[int],
        reached: Callable[[], Iterable[int]],
        what: str,
    ) -> None:
        """Until these trainer ranks have got so far."""
        missing: set[int] = set(ranks)

        def fetch() -> bool | None:
            missing.difference_update(reached())
            self._fail_early(record, participants, progress)
            return True if not missing else None

        wait_for(progress, fetch, deadline=deadline, what=what, missing=lambda: f"missing {sorted(missing)}")

    def _wait_votes(
        self, record: PushRecord, participants: Participants, progress: PushProgress, deadline: Deadline
    ) -> dict[tuple[str, int], Vote]:
        """The votes of all replicas that are left at the end, each of them for the version."""
        patience, missing = deadline, set(participants.left)

        def fetch() -> dict[tuple[str, int], Vote] | None:
            nonlocal patience, missing
            votes = progress.votes
            refused = {v.replica: f"voted no: rank {v.rank}: {v.reason}" for v in votes.values() if not v.ok}
            participants.drop(refused)
            self._fail_early(record, participants, progress)
            missing = {
                name
                for name, member in participants.left.items()
                if any((name, rank) not in votes for rank in range(member.ranks))
            }
            done = len(participants.left) - len(missing)
            patience = min(patience, participants.patience(done, deadline), key=lambda d: d.moment)
            if missing and patience.passed:
                participants.drop(dict.fromkeys(missing, f"had not voted after {patience.timeout_s:.1f} s"))
                missing = set()
            return None if missing else {key: vote for key, vote in votes.items() if key[0] in participants.left}

        return wait_for(
            progress,
            fetch,
            deadline=deadline,
            what="replicas have not voted",
            missing=lambda: f"missing {sorted(missing)}",
        )

    def _look(self, record: PushRecord, participants: Participants, progress: PushProgress) -> None:
        """`_fail_early` by what the ledger says now."""
        progress.read_all()
        self._fail_early(record, participants, progress)

    def _fail_early(self, record: PushRecord, participants: Participants, progress: PushProgress) -> None:
        """Drop who cannot take part any more; raise PushAborted as soon as the push cannot succeed, by what is known."""
        verdict, reports = progress.verdict, progress.reports.values()
        if final := final_word(reports):
            raise ConversionError(final)
        if verdict is None or verdict.decision is Decision.ABORT:
            raise PushAborted(verdict.reason if verdict else f"the ledger lost push {record.push_id}")
        failed = [report for report in reports if not report.ok]
        if failed:
            raise PushAborted(f"trainer rank {failed[0].rank}: {failed[0].reason}")
        participants.drop({name: why for report in reports for name, why in report.failed.items()})
        if time.monotonic() - self._leases_seen_at < LEASE_LOOK_S:
            return
        self._leases_seen_at = time.monotonic()
        lost = self._ledger.lost_writers(self._epoch, self._world_size)
        if lost:
            raise PushAborted(f"trainer ranks {list(lost)} are lost: their leases ran out")
        dead = self._ledger.lost_members(record.members)
        participants.drop(dict.fromkeys(dead, "is lost: its lease ran out, or it restarted"))

    def _report_final(self, record: PushRecord, error: ConversionError) -> None:
        """Unless another rank has: the others need not wait for a next attempt."""
        with suppress(LedgerUnavailable):
            if not final_word(self._ledger.writer_reports(record.push_id).values()):
                report = WriterReport(rank=0, ok=False, reason=str(error), final=True)
                self._ledger.report_writer(record.push_id, report)

    def _decide_abort(self, record: PushRecord, error: Exception) -> Verdict:
        try:
            return self._ledger.decide(record.push_id, Decision.ABORT, str(error) or type(error).__name__)
        except LedgerUnavailable as unreachable:  # the engines abort by themselves, at the deadline
            raise LedgerUnavailable(f"{error}; and the decision could not be told: {unreachable}") from error

    def _account(
        self,
        record: PushRecord,
        verdict: Verdict,
        participants: Participants,
        progress: PushProgress,
        votes: Mapping[tuple[str, int], Vote],
        phases: Stopwatch,
        started: float,
        deadline: Deadline,
    ) -> PushSummary:
        """Tell the ledger how the push went, whichever way.

        Raises PushAborted when it was not committed, ConversionError when no later attempt can be either.
        """
        if verdict.decision is Decision.COMMIT:
            with phases.phase("commit"):
                self._wait_applied(record, progress, len(participants.left), deadline)
        else:
            progress.read_all()
        applied, reports = progress.applied, progress.reports
        took_s = time.monotonic() - started
        summary = summarize(record, verdict, participants, votes, applied, reports, phases.seconds, took_s)
        final = "" if verdict.decision is Decision.COMMIT else final_word(reports.values())
        finished_at = self._ledger.clock_of(time.monotonic())
        summary = dataclasses.replace(summary, finished_at=finished_at, reason=final or summary.reason)
        self._tell(summary)
        self._trace(summary, reports, votes, applied, phases)
        if final:
            raise ConversionError(final)
        if verdict.decision is not Decision.COMMIT:
            raise PushAborted(f"version {record.version} (push {record.push_id}): {verdict.reason}")
        return summary

    def _tell(self, summary: PushSummary) -> None:
        """Give the account to the ledger. What is committed stays so where that fails; an abort waits for the ledger."""
        try:
            self._ledger.publish_push(summary)
        except LedgerUnavailable as error:
            if summary.outcome != Decision.COMMIT:
                raise
            logger.warning("push %s is committed, but its account cannot be told: %s", summary.push_id, error)

    def _trace(
        self,
        summary: PushSummary,
        reports: Mapping[int, WriterReport],
        votes: Mapping[tuple[str, int], Vote],
        applied: Mapping[str, Applied],
        phases: Stopwatch,
    ) -> None:
        """Write what everybody told, where the contract asks for it; a full disk must not fail a push."""
        folder = self._contract.telemetry.trace_folder
        if folder is None:
            return
        spans = {f"trainer {rank}": report.spans for rank, report in reports.items()}
        spans["trainer 0"] = phases.told(self._ledger.clock_of)
        spans |= {f"{replica} rank {rank}": vote.spans for (replica, rank), vote in votes.items()}
        spans |= {replica: item.spans for replica, item in applied.items()}
        try:
            write_trace(
                Path(folder), summary.push_id, trace_events(summary.push_id, dataclasses.asdict(summary), spans)
            )
        except OSError as error:
            logger.warning("push %s: its trace cannot be written: %s", summary.push_id, error)

    def _wait_applied(self, record: PushRecord, progress: PushProgress, expected: int, deadline: Deadline) -> None:
        """Until so many replicas serve the version, or patience with them is over."""
        patience = Deadline(min(APPLY_S, max(deadline.left_s, 0.0) + ACCOUNT_S))
        try:
            wait_for(
                progress,
                lambda: True if len(progress.applied) >= expected else None,
                deadline=patience,
                what="replicas have not said that they serve",
            )
        except (DeadlineExceeded, LedgerUnavailable) as error:
            logger.warning("push %s is committed, but %s", record.push_id, error)


def wait_for(
    progress: PushProgress,
    fetch: Callable[[], T | None],
    *,
    deadline: Deadline,
    what: str,
    missing: Callable[[], str] = lambda: "",
) -> T:
    """`wait_until` of what is known of a push, which is looked at whenever somebody has told something, or nobody for a while."""
    return wait_until(
        fetch,
        deadline=deadline,
        what=what,
        missing=missing,
        poll_s=LEASE_LOOK_S,
        poll_max_s=LEASE_LOOK_S,
        pause=progress.take,
    )


def _put(answers: queue.SimpleQueue[tuple[str, T]], name: str, answer: T) -> None:
    answers.put((name, answer))


def _take_all(answers: queue.SimpleQueue[tuple[str, T]], timeout_s: float) -> list[tuple[str, T]]:
    """Those that are there; waits for a first one no longer than that."""
    taken = []
    with suppress(queue.Empty):
        taken.append(answers.get(timeout=timeout_s))
        while True:
            taken.append(answers.get_nowait())
    return taken

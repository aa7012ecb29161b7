"""The first trainer rank's part of a push: who takes part, when writers begin, and the one decision at the end.

Reads as the protocol: members, plan, begin, convert, ready, open, go, wire, votes, decide, applied. Every wait ends at the
push's one deadline, and sooner when somebody whom it waits for has died. Never imports vLLM.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path

from weightsync import verify
from weightsync.config import Contract
from weightsync.endpoints import Endpoints
from weightsync.errors import ConversionError, DeadlineExceeded, LedgerUnavailable, PushAborted, WeightSyncError
from weightsync.participants import Participants
from weightsync.rendezvous.handshake import Applied
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import Member, PushRecord, Verdict, Vote, WriterReport
from weightsync.telemetry import Stopwatch, Transports, agree_on_transports, seconds_of, trace_events, write_trace
from weightsync.transport.agent import transports_in_use
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Decision, PushSummary, ReplicaState
from weightsync.writer import Writer

logger = logging.getLogger(__name__)

LEARN_S = 15.0
"""ModelExpress gets so long to know a member that the ledger lists."""
APPLY_S = 5.0
"""Replicas get so long after a commit to say that they serve it; only the account waits for it, not the commit."""
ACCOUNT_S = 1.0
"""The account comes so long after the deadline at the latest: the other ranks wait GRACE_S for it."""
OPEN_WORKERS = 64
STEP_POLL_S = 0.005
"""Longest pause between two looks at the ledger within a push: a look costs three round trips, a pause counts as overhead."""
LEASE_LOOK_S = 0.25
"""Leases are looked at so often while a push waits; they are good for seconds."""
OPEN_LOOK_S = 0.25
LOST_LOOK_S = 0.5


class Coordinator:
    """Runs the pushes of one epoch on trainer rank 0."""

    def __init__(self, *, contract: Contract, epoch: int, world_size: int, ledger: Ledger, writer: Writer) -> None:
        self._contract = contract
        self._epoch = epoch
        self._world_size = world_size
        self._ledger = ledger
        self._writer = writer
        self.watch = Stopwatch()
        """Of the last push."""
        self._leases_seen_at = 0.0
        self._endpoints = Endpoints(token=contract.endpoint_token())
        self._pool = concurrent.futures.ThreadPoolExecutor(OPEN_WORKERS, thread_name_prefix="weightsync-open")

    def push(self, *, step: int, sequence: int) -> PushSummary:
        """Convert and push the model's present weights as the next version.

        Raises PushAborted with the reason, FencedOut when superseded, ConversionError naming a tensor of this rank.
        """
        deadline = Deadline(self._contract.transfer.timeout_seconds)
        with self._ledger.bounded(deadline.moment):
            members = self._wait_members(deadline)
            return self._run(step, sequence, members, deadline, catch_up=0)

    def catch_up(self, *, version: int, sequence: int, step: int) -> PushSummary | None:
        """Bring the replicas that are torn or behind to `version`, which the arenas still hold; None when all are current."""
        head = self._ledger.head()
        if (head.version_epoch, head.version) != (self._epoch, version):
            return None
        late = {
            name: member
            for name, member in self._ledger.live_members().items()
            if member.state == ReplicaState.DIRTY or (member.epoch, member.version) < head.order
        }
        if not late:
            return None
        deadline = Deadline(self._contract.transfer.timeout_seconds)
        with self._ledger.bounded(deadline.moment):
            return self._run(step, sequence, late, deadline, catch_up=version)

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
            )
        votes: dict[tuple[str, int], Vote] = {}
        try:
            votes = self._carry_out(record, participants, deadline, phases)
            verdict = self._ledger.decide(record.push_id, Decision.COMMIT)
        except WeightSyncError as error:  # the verdict may be COMMIT all the same, where only its answer was lost
            verdict = self._decide_abort(record, error)
            if isinstance(error, ConversionError):  # no later attempt sends these weights
                with suppress(PushAborted):
                    self._account(record, verdict, participants, votes, phases, started, deadline)
                raise
        return self._account(record, verdict, participants, votes, phases, started, deadline)

    def _quorum(self, catch_up: bool) -> int | None:
        """Of late replicas each one counts by itself, where the fleet as a whole may lack some."""
        quorum = self._contract.transfer.quorum
        return quorum and (1 if catch_up else quorum)

    def _carry_out(
        self, record: PushRecord, participants: Participants, deadline: Deadline, phases: Stopwatch
    ) -> dict[tuple[str, int], Vote]:
        """Everything between the begin of a push and its decision; raises when it cannot be committed."""
        with phases.phase("plan"):
            self._ledger.report_planned(record.push_id, 0)
            self._wait_ranks(record, participants, deadline, self._ledger.planned, "trainer ranks have not planned")
        with phases.phase("convert"):
            prepare(self._writer, record, self._contract)
            self._ledger.report_ready(record.push_id, 0)
            self._wait_ranks(record, participants, deadline, self._ledger.ready, "trainer ranks are not ready to write")
        with phases.phase("open"):
            self._open(record, participants, deadline)
            opened = frozenset(participants.left)
            self._ledger.release_writers(record.push_id, opened)
        write_and_report(self._ledger, self._writer, record, self._contract, opened, 0, deadline, phases)
        with phases.phase("wire"):
            self._wait_ranks(
                record, participants, deadline, self._ledger.writer_reports, "trainer ranks have not written"
            )
        with phases.phase("verify"):
            return self._wait_votes(record, participants, deadline)

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

    def _open(self, record: PushRecord, participants: Participants, deadline: Deadline) -> None:
        """Ask all replicas at once; returns when each has opened or is dropped. Nobody is written into who has not opened."""
        asked = {
            self._pool.submit(self._open_one, record, member, deadline): name
            for name, member in participants.left.items()
        }
        opened: set[str] = set()
        patience = deadline
        while len(opened) < len(participants.left):
            done, waiting = concurrent.futures.wait(
                asked, timeout=OPEN_LOOK_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            refused = {asked[future]: why for future in done if (why := future.result()) is not None}
            participants.drop({name: f"did not open: {why}" for name, why in refused.items()})
            opened |= {asked.pop(future) for future in done} - refused.keys()
            self._fail_early(record, participants)
            opened &= participants.left.keys()  # one that opened and was lost stands for nobody that has not
            patience = min(patience, participants.patience(len(opened), deadline), key=lambda d: d.moment)
            if patience.passed:
                what = f"had not opened after {patience.timeout_s:.1f} s"
                participants.drop({asked[future]: what for future in waiting})
                break

    def _open_one(self, record: PushRecord, member: Member, deadline: Deadline) -> str | None:
        """None when the replica has opened, else why not."""
        timeout_s = max(deadline.left_s, 0.1)
        try:
            answer = self._endpoints.post(member.url, "/weightsync/v1/push", record.to_json(), timeout_s=timeout_s)
        except (OSError, http.client.HTTPException) as error:
            return f"{member.url}: {type(error).__name__} {error}"
        return None if answer.ok else answer.message

    def _wait_ranks(
        self,
        record: PushRecord,
        participants: Participants,
        deadline: Deadline,
        reached: Callable[[str], Iterable[int]],
        what: str,
    ) -> None:
        """Until every trainer rank has got so far."""
        missing: set[int] = set(range(self._world_size))

        def fetch() -> bool | None:
            missing.difference_update(reached(record.push_id))
            self._fail_early(record, participants)
            return True if not missing else None

        wait_until(
            fetch,
            deadline=deadline,
            what=what,
            missing=lambda: f"missing {sorted(missing)}",
            poll_max_s=STEP_POLL_S,
        )

    def _wait_votes(
        self, record: PushRecord, participants: Participants, deadline: Deadline
    ) -> dict[tuple[str, int], Vote]:
        """The votes of all replicas that are left at the end, each of them for the version."""
        patience, missing = deadline, set(participants.left)

        def fetch() -> dict[tuple[str, int], Vote] | None:
            nonlocal patience, missing
            votes = self._ledger.votes(record.push_id)
            refused = {v.replica: f"voted no: rank {v.rank}: {v.reason}" for v in votes.values() if not v.ok}
            participants.drop(refused)
            self._fail_early(record, participants)
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

        return wait_until(
            fetch,
            deadline=deadline,
            what="replicas have not voted",
            missing=lambda: f"missing {sorted(missing)}",
            poll_max_s=STEP_POLL_S,
        )

    def _fail_early(self, record: PushRecord, participants: Participants) -> None:
        """Drop who cannot take part any more; raise PushAborted as soon as the push cannot succeed."""
        verdict = self._ledger.decision(record.push_id)
        if verdict is None or verdict.decision is Decision.ABORT:
            raise PushAborted(verdict.reason if verdict else f"the ledger lost push {record.push_id}")
        reports = self._ledger.writer_reports(record.push_id).values()
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

    def _decide_abort(self, record: PushRecord, error: WeightSyncError) -> Verdict:
        try:
            return self._ledger.decide(record.push_id, Decision.ABORT, str(error))
        except LedgerUnavailable as unreachable:  # the engines abort by themselves, at the deadline
            raise LedgerUnavailable(f"{error}; and the decision could not be told: {unreachable}") from error

    def _account(
        self,
        record: PushRecord,
        verdict: Verdict,
        participants: Participants,
        votes: Mapping[tuple[str, int], Vote],
        phases: Stopwatch,
        started: float,
        deadline: Deadline,
    ) -> PushSummary:
        """Tell the ledger how the push went, whichever way; raises PushAborted when it was not committed."""
        applied: dict[str, Applied] = {}
        if verdict.decision is Decision.COMMIT:
            with phases.phase("commit"):
                applied = self._wait_applied(record, len(participants.left), deadline)
        reports = self._ledger.writer_reports(record.push_id)
        took_s = time.monotonic() - started
        summary = _summary(record, verdict, participants, votes, applied, reports, phases.seconds, took_s)
        summary = dataclasses.replace(summary, finished_at=self._ledger.now())
        self._ledger.report_summary(record.push_id, summary)
        self._trace(summary, reports, votes, applied, phases)
        if verdict.decision is not Decision.COMMIT:
            raise PushAborted(f"version {record.version} (push {record.push_id}): {verdict.reason}")
        return summary

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

    def _wait_applied(self, record: PushRecord, expected: int, deadline: Deadline) -> dict[str, Applied]:
        def fetch() -> dict[str, Applied] | None:
            applied = self._ledger.applied(record.push_id)
            return applied if len(applied) >= expected else None

        try:
            patience = Deadline(min(APPLY_S, max(deadline.left_s, 0.0) + ACCOUNT_S))
            what = "replicas have not said that they serve"
            return wait_until(fetch, deadline=patience, what=what, poll_max_s=STEP_POLL_S)
        except DeadlineExceeded as error:
            logger.warning("push %s is committed, but %s", record.push_id, error)
            return self._ledger.applied(record.push_id)


def converts_on_the_wire(record: PushRecord, contract: Contract) -> bool:
    """Whether groups travel while others are converted: into staging a push may fail half way. A catch-up converts nothing."""
    return contract.transfer.commit == "staged" and not record.catch_up


def prepare(writer: Writer, record: PushRecord, contract: Contract) -> None:
    """Convert and measure whatever must be known before the first byte leaves; all ranks do, and wait for each other."""
    if converts_on_the_wire(record, contract):
        writer.begin()
        return
    if not record.catch_up:
        writer.fill()
    writer.measure(record)


def write_and_report(
    ledger: Ledger,
    writer: Writer,
    record: PushRecord,
    contract: Contract,
    replicas: Set[str],
    rank: int,
    deadline: Deadline,
    watch: Stopwatch,
) -> None:
    """Write this rank's part into `replicas`, and tell the ledger how it ended, and where bytes may still move."""
    write = writer.convert_and_write if converts_on_the_wire(record, contract) else writer.write
    try:
        with watch.phase("wire"):
            written = write(record, replicas, deadline, _LostReplicas(ledger, record))
    except WeightSyncError as error:
        ledger.report_writer(record.push_id, WriterReport(rank=rank, ok=False, reason=str(error)))
        raise
    watch.spans += writer.wire_spans(record, replicas)
    moved_by = transports_in_use()
    report = WriterReport(
        rank=rank,
        ok=True,
        bytes=written.bytes,
        failed=written.failed,
        in_flight=written.in_flight,
        spans=watch.told(ledger.clock_of),
        transports=moved_by.names,
        transport_proof=moved_by.proof,
    )
    ledger.report_writer(record.push_id, report)


class _LostReplicas:
    """Which replicas of a push are dead; asks the ledger at most every LOST_LOOK_S, and believes nobody dead without it."""

    def __init__(self, ledger: Ledger, record: PushRecord) -> None:
        self._ledger = ledger
        self._record = record
        self._known: frozenset[str] = frozenset()
        self._next_look = Deadline(LOST_LOOK_S)

    def __call__(self) -> frozenset[str]:
        if self._next_look.passed:
            with suppress(LedgerUnavailable):
                patient = self._ledger.until(time.monotonic() + LOST_LOOK_S)
                self._known = frozenset(patient.lost_members(self._record.members))
            self._next_look = Deadline(LOST_LOOK_S)
        return self._known


def _summary(
    record: PushRecord,
    verdict: Verdict,
    participants: Participants,
    votes: Mapping[tuple[str, int], Vote],
    applied: Mapping[str, Applied],
    reports: Mapping[int, WriterReport],
    phases: Mapping[str, float],
    seconds: float,
) -> PushSummary:
    committed = verdict.decision is Decision.COMMIT
    received = sum(vote.bytes for vote in votes.values())
    wire_s = max((seconds_of(report.spans).get("wire", 0.0) for report in reports.values()), default=0.0)
    holders = sorted(participants.left) if committed else sorted(record.members)
    digests = {replica: sum(int(v.digest, 16) for v in votes.values() if v.replica == replica) for replica in holders}
    measured = {verify.to_hex(digest) for digest in digests.values()}
    served = [verify.to_hex(sum(int(part, 16) for part in item.digest.split("+"))) for item in applied.values()]
    moved_by = agree_on_transports(
        Transports(names=report.transports, proof=report.transport_proof) for report in reports.values() if report.bytes
    )
    return PushSummary(
        push_id=record.push_id,
        epoch=record.epoch,
        version=record.version,
        step=record.step,
        outcome=verdict.decision,
        reason=verdict.reason,
        catch_up=record.catch_up,
        seconds=seconds,
        bytes=received,
        gbps=received / wire_s / 1e9 if wire_s and received else 0.0,
        pause_seconds=max((item.pause_seconds for item in applied.values()), default=0.0),
        phases=dict(phases),
        copy_seconds=max((item.copy_seconds for item in applied.values()), default=0.0),
        replicas=holders,
        dropped=participants.dropped,
        digest=min(measured) if committed else "",
        digest_ok=committed
        and record.verify != "off"
        and applied.keys() >= set(holders)
        and len(measured) == 1
        and set(served) == measured,
        transports=moved_by.names,
        transport_proof=moved_by.proof,
    )

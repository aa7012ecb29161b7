"""What a trainer uses: connect once, push after each optimizer step, close.

    with Publisher.from_env(model) as publisher:
        publisher.push(step=0)          # every epoch begins with a push of what the trainer holds
        for step in range(1, steps):
            ...
            publisher.push(step=step)

Every rank makes one and calls `push` for the same steps. A push converts this rank's shards into its slot arena, and returns
when every engine serves them; the model may be changed at once. Between pushes a thread brings engines that start, restart or
were torn up to the version that the arenas still hold, whatever the trainer is doing, so that a loop that samples from the
engines never waits for a push that waits for it. With `transfer.arenaBudget` or `zeroCopy` arenas hold no whole version: engines
are brought up by their peers then, or by the next push. Imports torch and torch.distributed, never vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from weightsync import collector
from weightsync.accounts import unaccounted
from weightsync.config import Contract, PodFacts
from weightsync.coordinator import Coordinator
from weightsync.errors import (
    ConfigError,
    ConversionError,
    DeadlineExceeded,
    FencedOut,
    LedgerUnavailable,
    PushAborted,
    RendezvousUnavailable,
    TransportError,
    WeightSyncError,
)
from weightsync.layout.families import family_of
from weightsync.layout.records import SourceLayout
from weightsync.layout.shards import LocalSources, named_tensors, sources_of
from weightsync.metrics import TrainerMetrics
from weightsync.predecessor import account_for_predecessor
from weightsync.push_steps import prepare, write_and_report
from weightsync.rendezvous.heartbeat import writer_heartbeat
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.modelexpress import Rendezvous
from weightsync.rendezvous.records import Lead, PushRecord, WriterReport, final_word, was_final
from weightsync.scale_exchange import ScaleExchange
from weightsync.slots import SlotArena
from weightsync.telemetry import Stopwatch
from weightsync.transport import Agent
from weightsync.transport.agent import transports_in_use
from weightsync.waiting import Deadline, wait_until
from weightsync.wire import Decision, PushSummary
from weightsync.writer import GRACE_S, Writer, check_plans

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""A push that is aborted (an engine died, Redis came back) is tried again with the same bytes under a new version."""
ATTEMPT_PAUSE_S = 2.0
"""Before the second attempt; it doubles. All together outlast the lease of an engine that died, which then is no member."""
START_TIMEOUT_S = 300.0
"""Ranks of one incarnation may start so far apart."""
OUTAGE_PAUSE_S = 1.0
T = TypeVar("T")
LATE_LOOK_S = 1.0
FOLLOW_LOOK_S = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushReport:
    """A committed push, the same on every rank."""

    version: int
    epoch: int
    step: int
    seconds: float
    bytes: int
    """Payload bytes counted at the receivers, all replicas together."""
    gbps: float
    pause_seconds: float
    digest: str
    replicas: tuple[str, ...]


class _Ended(Exception):
    """Rank 0 has left this call of `push`: no attempt of another rank would meet it."""


class Publisher:
    """One trainer rank's end of a session; a context manager."""

    @classmethod
    def from_env(cls, model: torch.nn.Module) -> Self:
        """Join the session of $WEIGHTSYNC_CONFIG. `model` is the (FSDP2-wrapped) Hugging Face module; all ranks call this.

        Raises ConfigError, UnsupportedLayout naming a tensor, FencedOut if a newer epoch is in force, LedgerUnavailable.
        """
        local = sources_of(named_tensors(model), family_of(_config_of(model)))
        return cls(local, contract=Contract.load(), facts=PodFacts.load())

    def __init__(self, local: LocalSources, *, contract: Contract, facts: PodFacts) -> None:
        """Join the session of `contract` with what this rank holds; raises as `from_env` does."""
        self._rank, self._world_size = _position()
        self._contract = contract
        self._watch = Stopwatch()
        self._metrics = TrainerMetrics()
        if contract.telemetry.metrics_port is not None:
            self._metrics.serve(facts.ip, contract.telemetry.metrics_port + facts.local_rank)
        self._local = local
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._ledger = Ledger.from_contract(contract)
        self._epoch = self._agree_on_epoch(facts.epoch)
        self._lease = writer_heartbeat(self._ledger, self._epoch, self._rank).start()
        self._lease.wait_first(START_TIMEOUT_S)  # before the exchange below: nobody may miss a rank that has not begun
        layouts = self._gather_layouts()
        self._agent = Agent(f"{contract.session}/trainer/{self._epoch}/{self._rank}/{facts.uid}")
        self._rendezvous = Rendezvous.from_contract(contract)
        slots = SlotArena(
            rank=self._rank,
            local=self._local,
            layouts=layouts,
            format_=contract.transfer.format,
            budget_bytes=contract.transfer.arena_budget_bytes,
            zero_copy=contract.transfer.zero_copy,
        )
        self._scales = ScaleExchange(_store(), self._rank, self._world_size)
        self._writer = Writer(rank=self._rank, agent=self._agent, slots=slots, rendezvous=self._rendezvous)
        self._coordinator = self._make_coordinator()
        self._held: PushSummary | None = None
        self._sequence = 0
        self._calls = 0
        """Of `push`; each rank takes over rank 0's count with what it pushes."""
        self._ended = (0, 0)
        """Number and step of the last call that is over."""
        self._followed: PushRecord | None = None
        """The last push that this rank took part in for the present call."""
        self._keeper = threading.Thread(target=self._keep_current, name="weightsync-keeper", daemon=True)
        self._keeper.start()

    @property
    def epoch(self) -> int:
        """Incarnation of this trainer."""
        return self._epoch

    def push(self, *, step: int) -> PushReport:
        """Convert and push the model's present weights; returns when the engines serve them. All ranks call it for a step.

        Raises PushAborted with the reason after ATTEMPTS tries, LedgerUnavailable or RendezvousUnavailable when Redis or
        ModelExpress are away for longer than the push's timeout, FencedOut when another trainer took over (end this
        process), and ConversionError naming a tensor of any rank with an infinity or NaN: no engine serves it.
        """
        with self._lock:
            self._held = self._followed = None
            self._calls += 1
            try:
                self._held = self._push_until_committed(step)
            except WeightSyncError as error:
                if isinstance(error, ConversionError):
                    self._metrics.failed()
                self._held = self._committed()
                if self._held is None:
                    raise
                logger.warning("push %s is committed; this rank did not hear so: %s", self._held.push_id, error)
            finally:
                self._ended = (self._calls, int(step))
                self._writer.settle()
            watch = self._watch if self._coordinator is None else self._coordinator.watch
            self._metrics.committed(self._held, watch.spans, transports_in_use())
            return _report(self._held)

    def _push_until_committed(self, step: int) -> PushSummary:
        outage = Deadline(self._contract.transfer.timeout_seconds)
        for attempt in range(1, ATTEMPTS + 1):
            while True:
                try:
                    return self._push_once(step)
                except (LedgerUnavailable, RendezvousUnavailable) as error:
                    self._metrics.failed()
                    if outage.passed:
                        raise
                    logger.warning("step %d waits, %.0f s at most: %s", step, outage.left_s, error)
                    time.sleep(OUTAGE_PAUSE_S)
                except _Ended:
                    self._metrics.failed()
                    if self._followed is not None:
                        self._raise_final(self._followed)
                    raise PushAborted(f"rank 0 has ended its push of step {step}, and tells why") from None
                except (PushAborted, TransportError, DeadlineExceeded) as error:
                    self._metrics.failed()
                    logger.warning("attempt %d of %d to push step %d: %s", attempt, ATTEMPTS, step, error)
                    if attempt == ATTEMPTS:
                        raise
                    # All ranks alike: none may wait for rank 0's pause.
                    time.sleep(ATTEMPT_PAUSE_S * 2 ** (attempt - 1))
                    break
        raise AssertionError("the last attempt returns or raises")

    def _committed(self) -> PushSummary | None:
        """The push that this rank took part in last, if it was committed, whatever kept this rank from hearing so."""
        record = self._followed
        if record is None:
            return None
        with suppress(LedgerUnavailable):
            verdict = self._ledger.decision(record.push_id)
            if verdict is not None and verdict.decision is Decision.COMMIT:
                return self._ledger.summary(record.push_id) or unaccounted(record, verdict)
        return None

    def close(self) -> None:
        """Leave the session; engines keep what they hold."""
        self._closing.set()
        self._keeper.join()
        with self._lock:
            with suppress(Exception):  # a goodbye
                self._tell_ended()
            self._lease.close()
            self._writer.close()
            self._scales.forget()
            self._agent.close()
            self._rendezvous.close()
            if self._coordinator is not None:
                self._coordinator.close()
            self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _push_once(self, step: int) -> PushSummary:
        try:
            if self._coordinator is None:
                return self._follow_push(step)
            self._sequence += 1
            return self._coordinator.push(step=step, sequence=self._sequence, call=self._calls)
        except Exception:
            self._scales.forget()
            raise

    def _follow_push(self, step: int) -> PushSummary:
        """Take part in the coordinator's next push; catch-ups that it began meanwhile are refused, the arena has changed."""
        patience = Deadline(self._contract.transfer.timeout_seconds + GRACE_S)
        while True:
            with self._ledger.bounded(patience.moment):
                record = wait_until(
                    partial(self._take_next, step),
                    deadline=patience,
                    what=f"rank 0 has not begun the push of step {step}",
                )
            if not record.catch_up:
                break
            self._refuse(record, "this rank holds newer weights already")
        if record.step != step:
            self._refuse(record, f"this rank pushes step {step}, the coordinator step {record.step}")
            raise PushAborted(
                f"rank {self._rank} pushes step {step}, rank 0 pushes step {record.step}: call push() alike on all ranks"
            )
        self._calls, self._followed = record.call, record
        return self._follow(record)

    def _follow(self, record: PushRecord) -> PushSummary:
        """This rank's part of a push that rank 0 coordinates, up to its decision."""
        deadline = Deadline.at(self._ledger.deadline_to_monotonic(record.deadline_at))
        with self._ledger.bounded(deadline.moment):
            return self._take_part(record, deadline)

    def _take_part(self, record: PushRecord, deadline: Deadline) -> PushSummary:
        watch = self._watch = Stopwatch()
        try:
            with watch.phase("plan"):
                check_plans(record, self._writer.learn(record.members, deadline, catch_up=record.catch_up))
            self._ledger.report_planned(record.push_id, self._rank, self._scales.group)
            with watch.phase("convert"):
                groups = self._wait_planned(record, deadline)
                agree = self._scales.within(record.push_id, deadline, groups, lambda: self._go_on(record, None))
                prepare(self._writer, record, self._contract, agree)
            self._ledger.report_ready(record.push_id, self._rank)
            replicas = wait_until(
                lambda: self._may_write(record),
                deadline=deadline,
                what=f"push {record.push_id}: receivers are not open",
            )
            write_and_report(self._ledger, self._writer, record, self._contract, replicas, self._rank, deadline, watch)
        except PushAborted:
            self._raise_final(record)
            raise
        except ConversionError as error:  # no later attempt sends these weights
            self._refuse(record, str(error), final=True)
            account, reports = self._ledger.summary(record.push_id), self._ledger.writer_reports(record.push_id)
            if account is not None and not was_final(account.reason, reports.values()):  # rank 0 heard none, and tries again
                raise PushAborted(str(error)) from error
            raise
        except WeightSyncError as error:
            self._refuse(record, str(error))
            self._raise_final(record)
            raise PushAborted(f"push {record.push_id}: {error}") from error
        except Exception as error:  # a device without memory, say: nobody need wait for the deadline
            self._refuse(record, str(error) or type(error).__name__)
            raise
        try:
            with self._writer.delivering():
                return self._outcome(record, deadline)
        except (PushAborted, DeadlineExceeded):
            self._raise_final(record)
            raise

    def _raise_final(self, record: PushRecord) -> None:
        """Raise ConversionError where some rank's weights cannot be sent at all: rank 0 makes no further attempt."""
        with suppress(LedgerUnavailable):
            reports = self._ledger.until(time.monotonic()).writer_reports(record.push_id)
            if final := final_word(reports.values()):
                raise ConversionError(final)

    def _wait_planned(self, record: PushRecord, deadline: Deadline) -> dict[int, str]:
        """Until every rank has planned: in an exchange of scales, one that stays away would hold the others."""

        def fetch() -> dict[int, str] | None:
            groups = self._ledger.planned(record.push_id, self._world_size)
            return self._go_on(record, groups if len(groups) == self._world_size else None)

        return wait_until(
            fetch,
            deadline=deadline,
            what=f"push {record.push_id}: trainer ranks have not planned",
        )

    def _may_write(self, record: PushRecord) -> frozenset[str] | None:
        return self._go_on(record, self._ledger.released(record.push_id))

    def _go_on(self, record: PushRecord, reached: T | None) -> T | None:
        """`reached`, None to look again; raises PushAborted once the push is over."""
        verdict = self._ledger.decision(record.push_id)
        if verdict is None or verdict.decision is not Decision.OPEN:
            raise PushAborted(verdict.reason if verdict else f"the ledger lost push {record.push_id}")
        return reached

    def _outcome(self, record: PushRecord, deadline: Deadline) -> PushSummary:
        """How the push ended, from rank 0's account. Without one the ledger's decision counts: a commit is one all the same."""

        def fetch() -> PushSummary | None:
            summary = self._ledger.summary(record.push_id)
            if summary is None:
                self._fail_without_coordinator()
            return summary

        patience = Deadline(max(deadline.left_s, 0.0) + GRACE_S)
        try:
            summary = wait_until(
                fetch, deadline=patience, what=f"push {record.push_id}: rank 0 has not told how it ended"
            )
        except (DeadlineExceeded, PushAborted) as error:
            verdict = self._ledger.decision(record.push_id)
            if verdict is None or verdict.decision is not Decision.COMMIT:
                raise
            logger.warning("push %s is committed, without an account: %s", record.push_id, error)
            return unaccounted(record, verdict)
        if summary.outcome != Decision.COMMIT:
            raise PushAborted(f"version {record.version} (push {record.push_id}): {summary.reason}")
        return summary

    def _take_next(self, step: int) -> PushRecord | None:
        """The coordinator's newest push, once; raises PushAborted when rank 0 is gone, _Ended when it begins none for this call."""
        lead = self._ledger.lead(self._epoch)
        newest = self._newest(lead.current)
        record = None if newest is None else newest[1]
        if self._is_over(lead, record, step):
            if lead.ended_step == step:
                self._calls = lead.ended_call
            raise _Ended
        if newest is None:
            self._fail_without_coordinator()
            return None
        self._sequence = newest[0]
        return record

    def _is_over(self, lead: Lead, newest: PushRecord | None, step: int) -> bool:
        """Whether rank 0 has left this rank's call of `push`: it says so, or pushes for a later one.

        A rank that took part in none of this call's pushes may count otherwise than rank 0, so that the step decides.
        """
        told = lead.ended_call >= self._calls
        if self._followed is None:
            return told and lead.ended_step == step and (newest is None or newest.step != step)
        if newest is None or newest.catch_up:
            return told
        return newest.call > self._calls

    def _newest(self, current: tuple[int, str] | None) -> tuple[int, PushRecord] | None:
        """The coordinator's newest push, unless this rank has taken it up already."""
        if current is None or current[0] <= self._sequence:
            return None
        sequence, push_id = current
        record = self._ledger.push(push_id)
        return None if record is None else (sequence, record)

    def _fail_without_coordinator(self) -> None:
        if 0 in self._ledger.lost_writers(self._epoch, self._world_size):
            raise PushAborted("trainer rank 0 is lost: its lease ran out")

    def _refuse(self, record: PushRecord, reason: str, *, final: bool = False) -> None:
        """Nothing of this rank is in flight for the push, and it will not be ready."""
        report = WriterReport(rank=self._rank, ok=False, reason=reason, final=final)
        self._ledger.report_writer(record.push_id, report)

    def _keep_current(self) -> None:
        """Thread: bring late replicas up to what the arenas hold, whenever no push is under way; tell of pushes that have ended."""
        look_s, fenced = LATE_LOOK_S if self._coordinator is not None else FOLLOW_LOOK_S, False
        while not self._closing.wait(look_s):
            try:
                self._tell_ended()
                if self._held is None or fenced or not self._lock.acquire(blocking=False):
                    continue
                try:
                    self._catch_up()
                finally:
                    self._lock.release()
            except FencedOut as error:
                logger.error("catching up ends: %s", error)
                fenced = True
            except WeightSyncError as error:
                logger.warning("late replicas were not brought up to date, trying again: %s", error)
            except Exception:  # a bug must not leave replicas late, and ranks waiting, for good
                logger.exception("late replicas were not brought up to date, trying again")

    def _tell_ended(self) -> None:
        """Have no rank wait for rank 0, which may have given a push up because there was no ledger to tell it to.

        Told again at each look, since a ledger may lose it.
        """
        call, step = self._ended
        if self._rank == 0 and self._world_size > 1 and call > 0:
            with suppress(LedgerUnavailable):  # at the next look, then
                self._ledger.until(time.monotonic()).tell_ended(self._epoch, call, step)

    def _catch_up(self) -> None:
        held = self._held
        if held is None:
            return
        if self._coordinator is not None:
            self._sequence += 1  # also for one that is aborted: the other ranks take no number twice
            self._coordinator.catch_up(version=held.version, sequence=self._sequence, step=held.step)
            return
        newest = self._newest(self._ledger.current_push(self._epoch))
        if newest is not None and newest[1].catch_up and newest[1].version == held.version:
            self._sequence, record = newest
            self._follow(record)

    def _make_coordinator(self) -> Coordinator | None:
        if self._rank != 0:
            return None
        return Coordinator(
            contract=self._contract,
            epoch=self._epoch,
            world_size=self._world_size,
            ledger=self._ledger,
            writer=self._writer,
            exchange=self._scales,
        )

    def _agree_on_epoch(self, given: int | None) -> int:
        """The operator's epoch, or the next free one; rank 0 asks the ledger and tells the others."""
        return self._exchange(self._open_epoch(given) if self._rank == 0 else 0)[0]

    def _open_epoch(self, given: int | None) -> int:
        ledger = self._ledger.until(time.monotonic() + START_TIMEOUT_S)
        before = ledger.head().epoch
        epoch = ledger.open_epoch(given)
        if before < epoch:
            try:
                account_for_predecessor(ledger, before, epoch)
            except Exception:  # an account is missing then; the others wait for this epoch
                logger.exception("the last push of epoch %d stays without an account", before)
        return epoch

    @collector.paused()
    def _gather_layouts(self) -> list[SourceLayout]:
        packed = self._exchange(self._local.layout(self._rank).to_bytes())
        return [SourceLayout.from_bytes(data) for data in packed]

    def _exchange(self, value: Any) -> list[Any]:
        """What every rank says, by rank; over a gloo group of our own, so that a trainer's collectives are not disturbed."""
        if self._world_size == 1:
            return [value]
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=START_TIMEOUT_S))
        answers: list[Any] = [None] * self._world_size
        dist.all_gather_object(answers, value, group=group)
        dist.destroy_process_group(group)
        return answers


def _position() -> tuple[int, int]:
    """(rank, world size); never from a device index, which is 0 wherever a process sees one GPU."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _store() -> Any:
    """torch's, which all ranks share; None for a process alone. Torch has no public name for it."""
    return distributed_c10d._get_default_store() if dist.is_initialized() else None


def _config_of(model: torch.nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ConfigError(
            f"{type(model).__name__} has no Hugging Face `config`: it names the family that maps parameters to the checkpoint"
        )
    return config.to_dict()


def _report(summary: PushSummary) -> PushReport:
    return PushReport(
        version=summary.version,
        epoch=summary.epoch,
        step=summary.step,
        seconds=summary.seconds,
        bytes=summary.bytes,
        gbps=summary.gbps,
        pause_seconds=summary.pause_seconds,
        digest=summary.digest,
        replicas=tuple(summary.replicas),
    )

"""The steps of a push that every trainer rank takes alike, whether it coordinates or follows: prepare, write, report.

Never imports vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Set
from contextlib import suppress

from weightsync.config import Contract
from weightsync.errors import ConversionError, LedgerUnavailable, WeightSyncError
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord, WriterReport
from weightsync.scale_exchange import Agree
from weightsync.telemetry import Stopwatch
from weightsync.transport.agent import transports_in_use
from weightsync.waiting import Deadline
from weightsync.writer import Writer

LOST_LOOK_S = 0.5


def converts_on_the_wire(record: PushRecord, contract: Contract) -> bool:
    """Whether groups travel while others are converted: into staging a push may fail half way. A catch-up converts nothing."""
    return contract.transfer.commit == "staged" and not record.catch_up


def prepare(writer: Writer, record: PushRecord, contract: Contract, agree: Agree) -> None:
    """Convert and measure whatever must be known before the first byte leaves; all ranks do, and wait for each other."""
    if converts_on_the_wire(record, contract):
        writer.begin(agree)
        return
    if not record.catch_up:
        writer.fill(agree)
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
        final = isinstance(error, ConversionError)
        ledger.report_writer(record.push_id, WriterReport(rank=rank, ok=False, reason=str(error), final=final))
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

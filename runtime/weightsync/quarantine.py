"""Memory that a lost writer may still write is not offered again before its access is proved to have ended (design section 8).

One `Quarantine` belongs to one `Receiver`, which holds its lock around every call. Imports the ledger, no transport.
"""

from __future__ import annotations

import time

from weightsync.errors import FencedOut, LedgerUnavailable
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord


class Quarantine:
    """Writers of an aborted push whose death alone would prove that their access has ended.

    profile: the fabric's, for messages.
    """

    def __init__(self, *, replica: str, rank: int, ledger: Ledger, profile: str) -> None:
        self._replica, self._rank = replica, rank
        self._ledger = ledger
        self._profile = profile
        self._held: tuple[PushRecord, frozenset[int]] | None = None

    @property
    def empty(self) -> bool:
        return self._held is None

    def silent_writers(self, record: PushRecord) -> frozenset[int]:
        """Those of whose bytes to this rank some may be under way still."""
        return record.writers_into(self._rank) - self._acknowledged(record)

    def hold(self, record: PushRecord, silent: frozenset[int]) -> None:
        """Nothing is offered from here on until these writers of `record` have spoken, or are proved gone."""
        self._held = (record, silent)

    def check(self, record: PushRecord) -> None:
        """Raise FencedOut when memory must not be offered to the writers of `record` yet."""
        if self._held is None:
            return
        aborted, writers = self._held
        silent = frozenset() if self._gone(aborted, record) else writers - self._acknowledged(aborted)
        if silent:
            lender = f"restart engine {aborted.source}, or {self._replica} if there is no {aborted.source} any more"
            cure = lender if aborted.source else "restart the trainer"
            raise FencedOut(
                f"writers {sorted(silent)} of push {aborted.push_id} have not said that their transfers ended; "
                f"over {self._profile} only their death proves it: {cure}"
            )
        self._held = None

    def _gone(self, aborted: PushRecord, record: PushRecord) -> bool:
        """Whether the processes that wrote `aborted` are dead, by what is known when `record` comes.

        The operator opens an epoch when the trainer's last pods are gone. An engine that joins under the name of the lender from
        another process has replaced it: a StatefulSet starts no pod before the last of its name has ended.
        """
        if not aborted.source:
            return record.epoch > aborted.epoch
        try:
            lender = self._ledger.until(time.monotonic()).members().get(aborted.source)  # one try
        except LedgerUnavailable:
            return False
        return lender is not None and _process(lender.incarnation) != _process(aborted.source_incarnation)

    def _acknowledged(self, record: PushRecord) -> frozenset[int]:
        try:
            reports = self._ledger.until(time.monotonic()).writer_reports(record.push_id)  # one try
        except LedgerUnavailable:
            return frozenset()
        return frozenset(rank for rank, report in reports.items() if self._replica not in report.in_flight)


def _process(incarnation: str) -> str:
    """The first rank's process of a replica: its incarnation without the number of its agent."""
    return incarnation.split("+")[0].rpartition(".")[0]

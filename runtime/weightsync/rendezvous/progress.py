"""What all sides have said of one push, as its coordinator waits for it: read from a stream, blocking, each word once.

Asking the ledger for the whole push each few milliseconds cost more processor time than all that was said: the answers grow with
the fleet, and so does the number of times that somebody speaks. Imports the ledger's parts only.
"""

from __future__ import annotations

import time

from weightsync.rendezvous.handshake import Applied, HandshakeLedger
from weightsync.rendezvous.records import Verdict, Vote, WriterReport
from weightsync.wire import Decision

GATHER_S = 0.001
"""After news so long passes before the next read: a fleet that speaks at once is heard in a few reads, not in one a word."""


class PushProgress:
    """All that is known of a push since it began, as of the last `take`; used by one thread."""

    def __init__(self, ledger: HandshakeLedger, push_id: str) -> None:
        self._ledger = ledger
        self._push_id = push_id
        self._fields: dict[str, str] = {}
        self._last_entry = "0"
        self._had_news = False
        self.verdict: Verdict | None = Verdict(decision=Decision.OPEN, reason="")
        """The decision in force; None once the ledger has lost the push."""
        self.planned: dict[int, str] = {}
        """What trainer ranks that have planned said of their group."""
        self.ready: set[int] = set()
        """Trainer ranks whose bytes are converted and whose writes are prepared."""
        self.reports: dict[int, WriterReport] = {}
        """By trainer rank."""
        self.votes: dict[tuple[str, int], Vote] = {}
        """By replica and rank."""
        self.applied: dict[str, Applied] = {}
        """By replica."""

    def take(self, patience_s: float) -> None:
        """Take in what is new, and wait for it, no longer than that. Raises LedgerUnavailable.

        When nothing comes the push itself is read, so that a ledger that lost it, or the stream, is found out.
        """
        if self._had_news:
            time.sleep(min(GATHER_S, patience_s))
        news = self._ledger.told(self._push_id, self._last_entry, patience_s)
        self._had_news = bool(news)
        if not news:
            self.read_all()
            return
        for entry, fields in news:
            self._last_entry = entry
            self._note(fields)

    def read_all(self) -> None:
        """Take in the push as it stands."""
        fields = self._ledger.fields_of(self._push_id)
        if not fields:
            self.verdict = None
            return
        self._note(fields)

    def _note(self, fields: dict[str, str]) -> None:
        new = {field: text for field, text in fields.items() if self._fields.get(field) != text}
        self._fields |= new
        if "decision" in new:
            self.verdict = Verdict(decision=Decision(new["decision"]), reason=fields.get("reason", ""))
        for field, text in new.items():
            kind, _, who = field.partition(":")
            match kind:
                case "planned":
                    self.planned[int(who)] = text
                case "ready":
                    self.ready.add(int(who))
                case "writer":
                    self.reports[int(who)] = WriterReport.from_json(text)
                case "vote":
                    vote = Vote.from_json(text)
                    self.votes[vote.replica, vote.rank] = vote
                case "applied":
                    applied = Applied.from_json(text)
                    self.applied[applied.replica] = applied

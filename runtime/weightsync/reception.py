"""One push as an engine rank takes it in: the writers' last words, the check of what arrived, the vote.

Runs on a thread beside the engine's, so that nothing of it is in the engine's step loop. It never touches live memory, and what
it does with the memory that it measures is to read it. Imports the transport and the ledger, never vLLM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from weightsync import verify
from weightsync.errors import FencedOut, WeightSyncError
from weightsync.meter import TensorMeter
from weightsync.rendezvous.fencing import Fence, Notification
from weightsync.rendezvous.ledger import Ledger
from weightsync.rendezvous.records import PushRecord, Vote
from weightsync.telemetry import Stopwatch
from weightsync.threads import KeptThreads
from weightsync.transport import Agent
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

NOTIFICATION_POLL_S = 0.002


class Reception:
    """One push, on one of `threads`.

    landing: measures the memory that writers were offered; names: its targets; fills: digests of what no writer touches of them.
    payload_bytes: what all writers together must have written.
    prepare: called once all that came is as it was sent, and told whether the push is still wanted; returns what stands against
        a commit, or nothing.
    on_checked: told what is wrong, or nothing, and the bytes that came, before the vote; False when the push is over.
    """

    def __init__(
        self,
        *,
        record: PushRecord,
        fence: Fence,
        agent: Agent,
        ledger: Ledger,
        threads: KeptThreads,
        replica: str,
        rank: int,
        landing: TensorMeter,
        names: Iterable[str],
        fills: Mapping[str, int],
        payload_bytes: int,
        on_checked: Callable[[str, int], bool],
        prepare: Callable[[Callable[[], bool]], str] = lambda wanted: "",
    ) -> None:
        self.record = record
        self._targets = sorted(names)
        self.names = verify.chosen_names(self._targets, mode=record.verify, push_id=record.push_id)
        """The targets that this push measures."""
        self.digests: dict[str, int] = {}
        """Of those targets as they were found; complete once checked."""
        self._fence = fence
        self._agent = agent
        self._ledger = ledger
        self._replica, self._rank = replica, rank
        self._landing = landing
        self._fills = fills
        self._payload_bytes = payload_bytes
        self._on_checked = on_checked
        self._prepare = prepare
        self._deadline = Deadline.at(ledger.deadline_to_monotonic(record.deadline_at))
        self._threads = threads
        self._stopped = threading.Event()
        self._ended: threading.Event | None = None

    def start(self) -> None:
        self._ended = self._threads.run(self._run)

    def stop(self) -> None:
        """End it, once started; whatever it was about to vote does not count any more, the decision has fallen."""
        self._stopped.set()
        if self._ended is not None:
            self._ended.wait()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _run(self) -> None:
        try:
            watch = Stopwatch()
            with watch.phase("wire"):
                notes = self._collect()
            if notes is None:
                return
            with watch.phase("verify"):
                faults = self._check(notes) or self._prepare(self._is_wanted)
            vote = self._vote(faults, notes, watch)
            if self._on_checked(faults, vote.bytes):
                self._ledger.until(self._deadline.moment).vote(self.record.push_id, vote)
        except WeightSyncError as error:
            # The push ends by its deadline: the coordinator misses this vote, and the ledger's decision comes by RPC.
            logger.error(
                "push %s: rank %d of %s cannot vote: %s", self.record.push_id, self._rank, self._replica, error
            )

    def _is_wanted(self) -> bool:
        return not self._stopped.is_set() and not self._deadline.passed

    def _vote(self, faults: str, notes: Mapping[int, Notification], watch: Stopwatch) -> Vote:
        return Vote(
            replica=self._replica,
            rank=self._rank,
            ok=not faults,
            reason=faults,
            digest=verify.to_hex(sum(self.digests.values())),
            bytes=sum(note.bytes_written for note in notes.values()),
            spans=watch.told(self._ledger.clock_of),
        )

    def _collect(self) -> dict[int, Notification] | None:
        """The final notification of every writer, or None when stopped or past the deadline."""
        notes: dict[int, Notification] = {}
        expected = self.record.writers_into(self._rank)
        while len(notes) < len(expected):
            for peer, payload in self._agent.notifications():
                note = self._accept(peer, payload)
                if note is not None and note.writer_rank in expected:
                    notes[note.writer_rank] = note
            if self._stopped.is_set() or self._deadline.passed:
                return None
            if len(notes) < len(expected):
                time.sleep(NOTIFICATION_POLL_S)
        return notes

    def _accept(self, peer: str, payload: bytes) -> Notification | None:
        """The message, if it belongs to this push; anything else is fenced."""
        try:
            note = Notification.decode(payload)
            note.require(self._fence)
        except FencedOut as error:
            logger.warning("fenced a message of agent %s: %s", peer, error)
            return None
        return note

    def _check(self, notes: Mapping[int, Notification]) -> str:
        """Hold what arrived against the writers' words; returns what is wrong, in words, or nothing."""
        written = sum(note.bytes_written for note in notes.values())
        if written != self._payload_bytes:
            return f"{len(notes)} writers wrote {written} bytes, this rank's targets take {self._payload_bytes}"
        self.digests = self._landing.measure(self.names)
        wrong = []
        for index, name in enumerate(self._targets):
            if name not in self.names:
                continue
            sent = sum(note.partial_digests.get(index, 0) for note in notes.values()) + self._fills.get(name, 0)
            if verify.to_hex(sent) != verify.to_hex(self.digests[name]):
                wrong.append(name)
        if not wrong:
            return ""
        return f"{len(wrong)} of {len(self.digests)} targets differ from what was sent: {', '.join(wrong[:5])}"

"""Epochs, versions and pushes in the ledger: who may push, which version it is, and the one decision that ends it.

A part of `Ledger`; imports no client of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from weightsync.errors import FencedOut
from weightsync.rendezvous import scripts
from weightsync.rendezvous.connection import LedgerConnection, Witness
from weightsync.rendezvous.records import Head, Lead, PushRecord, Verdict, Vote, WriterReport
from weightsync.wire import PUSHES_KEPT, Decision, Keys, PushSummary

PUSH_TTL_S = 86_400
"""A push's record outlives every reader of its decision, and then goes by itself."""
TOLD_TTL_S = 600
"""After the last word. Its reader reads as it is told, and finds in the push's record what it missed."""
BLOCK_S = 0.5
"""Longest blocking read, shorter than the socket's timeout: who waits longer asks again, and learns when the ledger lost a push."""


class PushLedger(LedgerConnection):
    """The part of the ledger that trainers and receivers of a push share."""

    def open_epoch(self, epoch: int | None = None, floor: tuple[int, int] = (0, 0)) -> int:
        """Put an epoch in force and return it: `epoch` where an operator numbers them, else one above all known.

        `floor` is the greatest committed (epoch, version) the caller knows, from receivers, should the ledger be empty.
        Raises FencedOut if a newer epoch is in force.
        """
        self._witness(lambda known: known.with_committed(*floor))
        outcome, number = self._run_witnessed("open_epoch", scripts.OPEN_EPOCH, 0 if epoch is None else epoch)
        if outcome == "FENCED":
            raise FencedOut(
                f"epoch {epoch} of session {self.session} is over: epoch {number} is in force; end this trainer"
            )
        self._witness(lambda known: dataclasses.replace(known, seen_epoch=max(known.seen_epoch, int(number))))
        return int(number)

    def head(self) -> Head:
        """Epoch in force and committed version. An empty ledger answers zeros."""
        names = ("epoch", "version", "version_epoch", "published")
        values = self._call("head", lambda client: client.hmget(Keys(self.session).head, list(names)))
        head = Head(**{name: int(value or 0) for name, value in zip(names, values, strict=True)})
        self._note_head(**vars(head))
        return head

    def raise_head(self, epoch: int, version: int, seen_epoch: int = 0) -> Head:
        """Assert that `version` was committed in `epoch`, and `seen_epoch` was in force; older words change nothing."""
        self._witness(
            lambda known: dataclasses.replace(
                known.with_committed(epoch, version), seen_epoch=max(known.seen_epoch, epoch, seen_epoch)
            )
        )
        epoch_, version_, version_epoch, published = self._run_witnessed("raise_head", scripts.RAISE_HEAD)
        head = Head(epoch=epoch_, version=version_, version_epoch=version_epoch, published=published)
        self._note_head(**vars(head))
        return head

    def begin_push(
        self,
        *,
        epoch: int,
        sequence: int,
        step: int,
        timeout_s: float,
        writers: int,
        members: Mapping[str, str],
        plan_digests: Mapping[str, str],
        catch_up: bool = False,
        floor_version: int = 0,
        verify: str = "full",
        call: int = 0,
    ) -> PushRecord:
        """Open a push under a version of its own and make it current in `epoch`. The first trainer rank calls it.

        `members` maps replica to incarnation, `plan_digests` layout digest to plan digest. The version is above all
        that was published or committed, and `floor_version`; with `catch_up` it is the version that this epoch
        committed last (and `floor_version`, if positive, must be it). `sequence` counts the trainer's own pushes,
        `call` those of its user.
        Raises FencedOut when another epoch is in force, or when there is nothing to catch up to.
        """
        constant = {
            "session": self.session,
            "step": step,
            "writers": writers,
            "plan_digests": dict(plan_digests),
            "members": dict(members),
            "verify": verify,
            "call": call,
        }
        arguments = (epoch, sequence, timeout_s, int(catch_up), floor_version, json.dumps(constant), PUSH_TTL_S)
        outcome, *facts = self._run_witnessed("begin_push", scripts.BEGIN_PUSH, *arguments)
        if outcome == "FENCED":
            raise FencedOut(
                f"epoch {epoch} of session {self.session} may not push: epoch {facts[0]} is in force; end this trainer"
            )
        if outcome == "NOTHING":
            raise FencedOut(
                f"nothing to catch up to for epoch {epoch} at version {floor_version}: version {facts[0]} was committed"
                f" in epoch {facts[1]}; push a new version"
            )
        push_id, version, attempt, deadline_at = facts
        self._witness(lambda seen: _with_tried(seen, int(version), int(attempt)))
        record = {"push_id": push_id, "epoch": epoch, "version": version, "attempt": attempt, "catch_up": catch_up}
        return PushRecord(**record, deadline_at=float(deadline_at), **constant)

    def push(self, push_id: str) -> PushRecord | None:
        """The record of a push; None when the ledger does not know it."""
        names = ("record", "epoch", "version", "attempt", "deadline_at", "catch_up")
        values = self._push_fields(push_id, names)
        if values["record"] is None:
            return None
        return PushRecord(
            push_id=push_id,
            epoch=int(values["epoch"]),
            version=int(values["version"]),
            attempt=int(values["attempt"]),
            deadline_at=float(values["deadline_at"]),
            catch_up=values["catch_up"] == "1",
            **json.loads(values["record"]),
        )

    def decision(self, push_id: str) -> Verdict | None:
        """The decision in force, OPEN included; None when the ledger does not know the push."""
        values = self._push_fields(push_id, ("decision", "reason"))
        if values["decision"] is None:
            return None
        return Verdict(decision=Decision(values["decision"]), reason=values["reason"] or "")

    def await_decision(self, push_id: str, patience_s: float) -> Verdict | None:
        """As `decision`, but one that is still OPEN is waited for, without polling, for at most BLOCK_S."""
        told = self._await_entries("await decision", Keys(self.session).decided(push_id), "0", patience_s)
        if not told:
            return self.decision(push_id)
        entry = told[0][1]
        return Verdict(decision=Decision(entry["decision"]), reason=entry["reason"])

    def told(self, push_id: str, after: str, patience_s: float) -> list[tuple[str, dict[str, str]]]:
        """What was added to a push since the entry `after` ("0": ever), as (entry, fields); waits for one for at most BLOCK_S.

        The stream may be gone while `fields_of` is not, never the other way round.
        """
        return self._await_entries("await news", Keys(self.session).told(push_id), after, patience_s)

    def fields_of(self, push_id: str) -> dict[str, str]:
        """All that is known of a push, by field of its hash; empty when the ledger does not know it."""
        return self._call("read push", lambda client: client.hgetall(Keys(self.session).push(push_id)))  # type: ignore[return-value]

    def decide(self, push_id: str, wanted: Decision, reason: str = "") -> Verdict:
        """End a push, once: the first decision stays, and this returns the one in force.

        A commit becomes an abort when the deadline has passed by the ledger's clock, another epoch is in force, or the
        ledger lost the push; committing a normal push sets the head in the same step.
        """
        if wanted is Decision.OPEN:
            raise ValueError("a push is decided by COMMIT or ABORT")
        arguments = (push_id, wanted.value, reason, PUSH_TTL_S, TOLD_TTL_S)
        decision, why = self._run_witnessed("decide", scripts.DECIDE, *arguments)
        verdict = Verdict(decision=Decision(decision), reason=why)
        if verdict.decision is Decision.COMMIT:
            epoch, version, _ = map(int, push_id.split("."))
            self._witness(lambda known: known.with_committed(epoch, version))
        return verdict

    def current_push(self, epoch: int) -> tuple[int, str] | None:
        """(sequence, push id) of the newest push of `epoch`; None before its first."""
        return self.lead(epoch).current

    def tell_ended(self, epoch: int, call: int, step: int) -> None:
        """The first rank has ended its call of `push` of that number: it begins nothing more for it."""
        key = Keys(self.session).ended_call(epoch)
        self._call("tell ended call", lambda client: client.set(key, f"{call} {step}", ex=PUSH_TTL_S))

    def lead(self, epoch: int) -> Lead:
        """What the first rank of `epoch` is at, read in one step."""
        keys = Keys(self.session)
        told: Any = self._call(
            "lead", lambda client: client.mget([keys.current_push(epoch), keys.ended_call(epoch)])
        )
        call, step = (0, 0) if told[1] is None else map(int, told[1].split(" "))
        return Lead(current=_current(told[0]), ended_call=call, ended_step=step)

    def report_writer(self, push_id: str, report: WriterReport) -> bool:
        """Record that a trainer rank's handles are all terminal. False when the ledger does not know the push."""
        return self._add_to_push(push_id, f"writer:{report.rank}", report.to_json())

    def writer_reports(self, push_id: str) -> dict[int, WriterReport]:
        """Reports by trainer rank."""
        reports = self._read_from_push(push_id, "writer:", WriterReport.from_json)
        return {report.rank: report for report in reports}

    def vote(self, push_id: str, vote: Vote) -> bool:
        """Record what an engine rank found in its memory. False when the ledger does not know the push."""
        return self._add_to_push(push_id, f"vote:{vote.replica}:{vote.rank}", vote.to_json())

    def votes(self, push_id: str) -> dict[tuple[str, int], Vote]:
        """Votes by (replica, rank)."""
        votes = self._read_from_push(push_id, "vote:", Vote.from_json)
        return {(vote.replica, vote.rank): vote for vote in votes}

    def publish_push(self, summary: PushSummary) -> None:
        """Give the account of a push that ended: to the other trainer ranks, and first in the list that the operator shows.

        The first account of a push stays.
        """
        self._run("publish_push", scripts.PUBLISH_PUSH, summary.to_json(), PUSHES_KEPT, summary.push_id)

    def pushes(self) -> list[PushSummary]:
        """Pushes that ended, newest first, at most PUSHES_KEPT."""
        texts = self._call("pushes", lambda client: client.lrange(Keys(self.session).pushes, 0, -1))
        return [PushSummary.from_json(text) for text in texts]  # type: ignore[union-attr]

    def _await_entries(self, what: str, key: str, after: str, patience_s: float) -> list[tuple[str, dict[str, str]]]:
        """Entries of a stream behind `after`; none when it gets none within BLOCK_S and `patience_s`."""
        block_ms = max(1, round(min(patience_s, BLOCK_S) * 1000))
        told: Any = self._call(what, lambda client: client.xread({key: after}, block=block_ms))
        if not told:
            return []
        [[_, entries]] = told if isinstance(told, list) else told.items()
        return entries

    def _push_fields(self, push_id: str, names: tuple[str, ...]) -> dict[str, Any]:
        key = Keys(self.session).push(push_id)
        values = self._call("read push", lambda client: client.hmget(key, list(names)))
        return dict(zip(names, values, strict=True))

    def _add_to_push(self, push_id: str, field: str, text: str) -> bool:
        return bool(self._run(f"write {field}", scripts.ADD_TO_PUSH, push_id, field, text, TOLD_TTL_S))

    def _read_from_push(self, push_id: str, prefix: str, parse: Callable[[str], Any]) -> list[Any]:
        fields = sorted(self.fields_of(push_id).items())
        return [parse(text) for field, text in fields if field.startswith(prefix)]


def _current(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    sequence, push_id = text.split(" ")
    return int(sequence), push_id


def _with_tried(known: Witness, version: int, attempt: int) -> Witness:
    return dataclasses.replace(known, published=max(known.published, version), attempt=max(known.attempt, attempt))

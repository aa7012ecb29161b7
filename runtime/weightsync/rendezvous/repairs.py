"""Repairs in the ledger: who brings a torn or late replica to the committed version, a peer or the trainer's keeper.

A claim is won by compare-and-set, and stands until its deadline or until its holder's lease has run out, whichever comes first:
a replica that restarts does not wait for what its predecessor had claimed. A part of `Ledger`; imports no client of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from weightsync.rendezvous import scripts
from weightsync.rendezvous.connection import LedgerConnection
from weightsync.rendezvous.pushes import PUSH_TTL_S
from weightsync.rendezvous.records import Claim, Head, Member, PushRecord
from weightsync.wire import Keys

CLAIM_MARGIN_S = 5.0
"""A claim outlasts the repair's deadline by so long: its end takes a moment, too."""


class RepairLedger(LedgerConnection):
    """The part of the ledger by which peers and the trainer's keeper do not both repair one replica."""

    def claim_for_trainer(self, replica: str, *, epoch: int, timeout_s: float) -> Claim | None:
        """The first rank of a trainer takes a replica on for as long; None when a peer has."""
        lease = self._unprefixed(Keys(self.session).writer_lease(epoch, 0))
        claim = Claim(replica=replica, source="", lease=lease, word="1")
        outcome, _ = self._run_witnessed(
            "claim repair", scripts.CLAIM_REPAIR, replica, claim.to_json(), _ttl_ms(timeout_s)
        )
        return claim if outcome == "OK" else None

    def begin_repair(
        self, *, target: Member, source: Member, head: Head, timeout_s: float, step: int
    ) -> tuple[PushRecord, Claim] | None:
        """`target` takes itself on: open its repair from `source` to the committed version of `head`.

        None when somebody else has claimed it, or another version is committed by now. `step`: the version's label.
        """
        lease = self._unprefixed(Keys(self.session).replica_lease(target.replica))
        claim = Claim(replica=target.replica, source=source.replica, lease=lease, word=target.incarnation)
        constant = {
            "session": self.session,
            "step": step,
            "writers": source.ranks,
            "plan_digests": {digest: f"whole-{digest}" for digest in target.layout_digests},
            "members": {target.replica: target.incarnation},
            "verify": "full",
            "source": source.replica,
            "source_incarnation": source.incarnation,
        }
        version = (head.version_epoch, head.version, timeout_s, json.dumps(constant), PUSH_TTL_S)
        arguments = (target.replica, claim.to_json(), _ttl_ms(timeout_s), *version)
        outcome, *facts = self._run_witnessed("begin repair", scripts.BEGIN_REPAIR, *arguments)
        if outcome != "OK":
            return None
        push_id, attempt, deadline_at = facts
        self._witness(lambda known: dataclasses.replace(known, attempt=max(known.attempt, int(attempt))))
        record = PushRecord(
            push_id=push_id,
            epoch=head.version_epoch,
            version=head.version,
            attempt=int(attempt),
            catch_up=True,
            deadline_at=float(deadline_at),
            **constant,
        )
        return record, claim

    def release_claim(self, claim: Claim) -> bool:
        """Give a claim back. False when it does not stand any more."""
        return bool(self._run("release claim", scripts.RELEASE_REPAIR, claim.replica, claim.to_json()))

    def claims(self, replicas: Iterable[str]) -> list[Claim]:
        """The claims on these replicas, those of dead holders too, until they run out."""
        keys = [Keys(self.session).repair(replica) for replica in replicas]
        texts = self._call("read claims", lambda client: client.mget(keys)) if keys else []
        return [Claim.from_json(text) for text in texts if text is not None]  # type: ignore[union-attr]

    def _unprefixed(self, key: str) -> str:
        return key.removeprefix(Keys(self.session).prefix)


def _ttl_ms(timeout_s: float) -> int:
    return round((timeout_s + CLAIM_MARGIN_S) * 1000)

"""Who is still in a push: replicas that refuse, die or lag are dropped for as long as a quorum stays.

Pure bookkeeping of one push on its coordinator. Whoever is dropped is not waited for, learns the decision from the ledger as
every replica does, finds that it was taken without it, and is caught up later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from weightsync.errors import PushAborted
from weightsync.rendezvous.records import Member
from weightsync.waiting import Deadline

logger = logging.getLogger(__name__)

STRAGGLER_SHARE = 0.5
"""Once a quorum has got so far, the others get this share of the time that the push has left."""


class Participants:
    """The replicas of one push.

    quorum: how many must hold its version; None for all of `members`.
    Raises PushAborted, here and in `drop`, as soon as fewer are left.
    """

    def __init__(self, members: Mapping[str, Member], quorum: int | None) -> None:
        self._of = len(members)
        self.left = dict(members)
        """Those that may still hold the version, by name."""
        self.quorum = len(members) if quorum is None else quorum
        self.dropped: dict[str, str] = {}
        """Why, by replica."""
        self._check()

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Go on without these replicas (name -> why); names that are no member, or dropped before, change nothing."""
        new = {name: why for name, why in reasons.items() if name in self.left}
        self.dropped |= new
        for name, why in new.items():
            del self.left[name]
            logger.warning("going on without %s: %s", name, why)
        self._check()

    def patience(self, done: int, deadline: Deadline) -> Deadline:
        """How long to wait for the rest when `done` replicas have got so far."""
        if done < self.quorum or done == len(self.left):
            return deadline
        return Deadline(max(deadline.left_s, 0.0) * STRAGGLER_SHARE)

    def _check(self) -> None:
        if len(self.left) < self.quorum:
            told = "; ".join(f"{name} {why}" for name, why in list(self.dropped.items())[:3]) or "nobody else lives"
            raise PushAborted(f"{len(self.left)} of {self._of} replicas are left, {self.quorum} are needed: {told}")

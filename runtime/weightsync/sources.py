"""Which healthy replica repairs a torn or late one. Pure: the same answer whatever order members are listed in.

A source holds the committed version, is CLEAN, and its ranks have the layouts of the other's, rank by rank: then its memory is
byte for byte what the other must become. Another layout is left to the trainer. Imports the records only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from weightsync.rendezvous.records import Claim, Head, Member
from weightsync.wire import ReplicaState

LOANS_AT_ONCE = 2
"""A replica lends to so many others at once, since it serves meanwhile; each that is repaired can lend to the next."""


def needs_repair(member: Member, head: Head) -> bool:
    """Whether a replica is torn or behind the committed version, and no push is open on it."""
    behind = member.state == ReplicaState.CLEAN and member.order < head.order
    return behind or member.state == ReplicaState.DIRTY


def loans(claims: Iterable[Claim], live: Mapping[str, Member]) -> Counter[str]:
    """To how many replicas each source lends now; what was claimed by an incarnation that is gone does not count."""
    standing = [claim for claim in claims if claim.replica in live and live[claim.replica].incarnation == claim.word]
    return Counter(claim.source for claim in standing if claim.source)


def choose_source(
    target: Member, live: Mapping[str, Member], head: Head, lent: Mapping[str, int], failures: Mapping[str, int]
) -> Member | None:
    """The replica that repairs `target`, None when there is none now.

    live: members whose lease lives, by name. lent: loans of each source. failures: how often each incarnation has failed this
    target. The one that failed least is taken, of those the one with the fewest loans, of those the first by a hash of both
    names, so that late replicas spread over the sources without a word between them.
    """
    able = [
        member
        for name, member in live.items()
        if name != target.replica and _lends_to(member, target, head) and lent.get(name, 0) < LOANS_AT_ONCE
    ]
    if not able:
        return None
    return min(
        able,
        key=lambda m: (failures.get(m.incarnation, 0), lent.get(m.replica, 0), _spread(target.replica, m.replica)),
    )


def _lends_to(member: Member, target: Member, head: Head) -> bool:
    healthy = member.lends and member.state == ReplicaState.CLEAN and member.order == head.order
    return healthy and member.layout_digests == target.layout_digests


def _spread(target: str, source: str) -> bytes:
    return hashlib.blake2b(f"{target}/{source}".encode(), digest_size=8).digest() + source.encode()

"""The words that name one life of an engine's rank, and of a replica (those of its ranks, joined). Standard library only."""

from __future__ import annotations

import time
from collections.abc import Sequence

RankKey = tuple[str, int, str]
"""(replica, rank, incarnation of that rank)"""


def process_word(pod_uid: str) -> str:
    """Names this process of a pod; ranks of one pod that begin in the same millisecond differ by their number."""
    return f"{pod_uid}-{time.time_ns() // 1_000_000:x}"


def pod_of(incarnation: str) -> str:
    """UID of the pod in which a rank of that incarnation runs."""
    return incarnation.rpartition("-")[0]


def replica_incarnation(ranks: Sequence[str]) -> str:
    """One word for the incarnations of all ranks of a replica, by rank."""
    return "+".join(ranks)


def replica_ranks(replica: str, word: str) -> list[RankKey]:
    """The ranks of a replica, out of that word."""
    return [(replica, rank, incarnation) for rank, incarnation in enumerate(word.split("+"))]

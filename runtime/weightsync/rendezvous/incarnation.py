"""The word that names one life of an engine replica: the incarnations of its ranks, joined. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

RankKey = tuple[str, int, str]
"""(replica, rank, incarnation of that rank)"""


def replica_incarnation(ranks: Sequence[str]) -> str:
    """One word for the incarnations of all ranks of a replica, by rank."""
    return "+".join(ranks)


def replica_ranks(replica: str, word: str) -> list[RankKey]:
    """The ranks of a replica, out of that word."""
    return [(replica, rank, incarnation) for rank, incarnation in enumerate(word.split("+"))]

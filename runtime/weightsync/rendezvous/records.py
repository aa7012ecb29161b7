"""Records of the rendezvous that only the runtime reads: members, pushes, claims, reports, votes.

Frozen, JSON in and out, no tensor, no client; imports `weightsync.wire` and `weightsync.telemetry` only. What the operator
reads too is in `wire`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from weightsync.telemetry import Span, spans_of
from weightsync.wire import Decision, JsonRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(JsonRecord):
    """One engine replica that takes part in pushes, as it describes itself."""

    replica: str
    url: str
    """http base of the engine's endpoint, without a trailing slash."""
    ranks: int
    """Workers of the replica: its data-parallel times its tensor parallel size."""
    incarnation: str
    """Unique to one engine process: pod UID and process start."""
    layout_digests: tuple[str, ...]
    """Digest of each rank's layout, by rank."""
    version: int = 0
    """Committed version that the live weights hold (the last one, when DIRTY)."""
    epoch: int = 0
    """Epoch in which `version` was committed; 0 for the version 0 that was loaded."""
    seen_epoch: int = 0
    """Newest epoch that any accepted push carried; never below `epoch`."""
    state: str = "CLEAN"
    digest: str = ""
    lends: bool = False
    """Whether other replicas may be repaired from its live memory: a NIC can register it."""
    joined_at: float = 0.0
    """Seconds since the Unix epoch by the ledger's clock; 0 until the first join, which sets it. The later of two
    incarnations under one name wins."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout_digests", tuple(self.layout_digests))
        if len(self.layout_digests) != self.ranks:
            raise ValueError(f"member {self.replica}: {len(self.layout_digests)} layout digests for {self.ranks} ranks")

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.version)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Where the session stands."""

    epoch: int
    """Epoch in force; an older trainer is refused."""
    version: int
    """Last committed version; 0 while nothing was committed."""
    version_epoch: int
    """Epoch that committed it."""
    published: int
    """Highest version that was ever tried."""

    @property
    def order(self) -> tuple[int, int]:
        return (self.version_epoch, self.version)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushRecord(JsonRecord):
    """One push, or one repair, as its coordinator opened it; nothing in it changes afterwards."""

    push_id: str
    """epoch.version.attempt"""
    session: str
    epoch: int
    version: int
    attempt: int
    """Counts the pushes of a session, so that a version that is pushed again has another push_id."""
    step: int
    """The trainer's own label."""
    catch_up: bool
    """True when it brings late replicas to a version that was committed before."""
    deadline_at: float
    """Seconds since the Unix epoch by the ledger's clock; nothing commits after it."""
    writers: int
    """World size of the trainer; in a repair, of the replica that lends."""
    plan_digests: dict[str, str]
    """Digest of the plan for each layout digest."""
    members: dict[str, str]
    """Incarnation of each replica that takes part."""
    call: int = 0
    """The trainer's own count of its calls of `push`, of which each may take several pushes; 0 in a catch-up or a repair."""
    verify: str = "full"
    """`transfer.verify` of the coordinator, which all sides follow: engines may still run under an older contract."""
    source: str = ""
    """Of a repair: the replica that lends its memory. Empty when a trainer writes."""
    source_incarnation: str = ""

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.version)

    def told_to(self, replica: str) -> PushRecord:
        """The part that concerns one replica: none needs the names and incarnations of a whole fleet."""
        return dataclasses.replace(self, members={replica: self.members[replica]})

    def writers_into(self, rank: int) -> frozenset[int]:
        """Who writes into rank `rank` of a replica: every rank of a trainer; in a repair, the lender's rank of that number."""
        return frozenset({rank}) if self.source else frozenset(range(self.writers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lead:
    """What the first rank of an epoch is at."""

    current: tuple[int, str] | None
    """Sequence and push id of the newest push; None before its first."""
    ended_call: int
    """The last call of `push` that it has told to be over, however it ended; 0 before."""
    ended_step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim(JsonRecord):
    """Somebody brings a replica to the committed version, and nobody else does."""

    replica: str
    """The one that is repaired."""
    source: str
    """The replica that lends; empty for a trainer."""
    lease: str
    """Key of the holder's lease, without the session's prefix."""
    word: str
    """What that key holds while the holder lives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a push ended, or that it has not."""

    decision: Decision
    reason: str
    """Why it was aborted; empty otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterReport(JsonRecord):
    """What one trainer rank says of its part of a push, once all its handles are terminal."""

    rank: int
    ok: bool
    reason: str = ""
    final: bool = False
    """Whether no later attempt can do better: the weights themselves cannot be sent."""
    bytes: int = 0
    """Payload bytes of the writes that ended well."""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why, for each replica that this rank could not write into while others went well."""
    in_flight: tuple[str, ...] = ()
    """Those of them towards which bytes may still move: the rank will not touch its arena before they end."""
    spans: tuple[Span, ...] = ()
    """Its plan, convert and wire, and the wire to each peer as NIXL measured it."""
    transports: tuple[str, ...] = ()
    transport_proof: str = ""
    """See `weightsync.telemetry.Transports`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_flight", tuple(self.in_flight))  # JSON has lists
        object.__setattr__(self, "spans", spans_of(self.spans))
        object.__setattr__(self, "transports", tuple(self.transports))


def final_word(reports: Iterable[WriterReport]) -> str:
    """Why no attempt of a push can go well, by the first rank that says so; empty when none does."""
    return next((f"trainer rank {report.rank}: {report.reason}" for report in reports if report.final), "")


def was_final(reason: str, reports: Iterable[WriterReport]) -> bool:
    """Whether rank 0, which accounts for a push with this reason, had heard a final word: any rank's, where several had one."""
    return any(report.final and report.reason in reason for report in reports)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote(JsonRecord):
    """What one engine rank says of the bytes it received."""

    replica: str
    rank: int
    ok: bool
    reason: str = ""
    digest: str = ""
    """Hexadecimal sum of the digests of the rank's targets, measured in place."""
    bytes: int = 0
    """Payload bytes, counted by the receiver."""
    spans: tuple[Span, ...] = ()
    """Its wire, from the opening to the last writer's word, and verify."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", spans_of(self.spans))

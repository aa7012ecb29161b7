"""Names and records that the runtime writes into the ledger and the operator reads from it.

Standard library only: the operator imports this module and must not pull in torch or NIXL. Every key of one session starts
with `ws:{session}:`, so that an ACL pattern or a deletion covers a session and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any, Self

PUSHES_KEPT = 64
"""Length of the list of push summaries in the ledger; older ones fall off."""


class ReplicaState(enum.StrEnum):
    """What an engine replica's weights are (design section 8)."""

    CLEAN = "CLEAN"
    OPEN = "OPEN"
    VERIFIED = "VERIFIED"
    DIRTY = "DIRTY"


class Decision(enum.StrEnum):
    """The one compare-and-set that ends a push."""

    OPEN = "OPEN"
    COMMIT = "COMMIT"
    ABORT = "ABORT"


KEY_PREFIX = "ws:"
"""Of every ledger key, in front of the session."""


class Keys:
    """Ledger keys of one session."""

    def __init__(self, session: str) -> None:
        self.prefix = f"{KEY_PREFIX}{session}:"
        self.head = self.prefix + "head"
        """Hash: epoch, version (committed), version_epoch (the committed version's), published (last version tried)."""
        self.members = self.prefix + "members"
        """Hash: replica name -> JSON `weightsync.rendezvous.records.Member`."""
        self.replicas = self.prefix + "replicas"
        """Hash: replica name -> JSON `ReplicaStatus`."""
        self.pushes = self.prefix + "pushes"
        """List, newest first, at most PUSHES_KEPT: JSON `PushSummary`."""

    def push(self, push_id: str) -> str:
        """Hash of one push: record, decision, reason, writer:<rank>, vote:<replica>:<rank>."""
        return f"{self.prefix}push:{push_id}"

    def decided(self, push_id: str) -> str:
        """Stream with one entry (decision, reason) once the push is decided, for those who wait for it without polling."""
        return f"{self.push(push_id)}:decided"

    def told(self, push_id: str) -> str:
        """Stream of what is added to the push's hash (field -> value), for its coordinator, in the order in which it came."""
        return f"{self.push(push_id)}:told"

    def current_push(self, epoch: int) -> str:
        """String: push id that the ranks of `epoch` take part in, with the trainer's own count of its pushes."""
        return f"{self.prefix}current:{epoch}"

    def ended_call(self, epoch: int) -> str:
        """String: number and step of the last call of `push` that the first rank of `epoch` has ended, however it ended."""
        return f"{self.prefix}ended:{epoch}"

    def repair(self, replica: str) -> str:
        """String with a TTL: who brings this replica to the committed version, JSON `weightsync.rendezvous.repairs.Claim`."""
        return f"{self.prefix}repair:{replica}"

    def replica_lease(self, replica: str) -> str:
        """String with a TTL: present while the replica's heartbeat thread lives."""
        return f"{self.prefix}lease:replica:{replica}"

    def writer_lease(self, epoch: int, rank: int) -> str:
        """String with a TTL: present while the trainer rank's heartbeat thread lives."""
        return f"{self.prefix}lease:writer:{epoch}:{rank}"


class JsonRecord:
    """JSON in and out for the frozen records below; unknown fields are ignored, so that an older reader survives."""

    def to_json(self) -> str:
        # Not `asdict`, which copies all that a record holds, names of a whole fleet among it; none of them holds a record.
        return json.dumps(vars(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, Any] = json.loads(text)
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaStatus(JsonRecord):
    """One engine replica as it last described itself."""

    name: str
    version: int
    """Version that the live weights hold (the last one, when DIRTY)."""
    epoch: int
    state: str
    """A `ReplicaState`."""
    serving: bool
    """True when the replica answers requests: CLEAN, or paused by a push within its deadline, and not behind."""
    reason: str = ""
    """Why it is not serving, in words; empty when it is."""
    digest: str = ""
    """Hexadecimal sum of the digests of all its targets, measured in live memory, or as staged where modules are replayed."""
    lends: bool = False
    """True when other replicas of the same layout may be repaired from its memory, once it is CLEAN and current."""
    direct_bytes: int = 0
    """Payload of a push that its ranks take where the engine computes with it."""
    replayed_bytes: int = 0
    """Payload of a push that its ranks take in load format, and make modules of."""
    updated_at: float = 0.0
    """Seconds since the Unix epoch, by the ledger's clock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushSummary(JsonRecord):
    """One push as its first trainer rank saw it end."""

    push_id: str
    epoch: int
    version: int
    step: int
    """The trainer's own label."""
    outcome: str
    """COMMIT or ABORT."""
    reason: str = ""
    """Why it was aborted, and by whom; empty when committed."""
    catch_up: bool = False
    """True when it brought late replicas to a version that was committed before."""
    source: str = ""
    """The replica whose memory it came from; empty when a trainer sent it."""
    seconds: float = 0.0
    bytes: int = 0
    """Payload bytes, counted at the receivers and summed over replicas."""
    gbps: float = 0.0
    """Gigabytes (1e9) a second: bytes / seconds on the wire (first write posted to last one verified as done)."""
    pause_seconds: float = 0.0
    """The longest pause of any replica."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by phase: plan, open, convert, wire, verify, commit."""
    copy_seconds: float = 0.0
    """The longest device copy of a staged commit, a part of its pause; 0 in place."""
    replicas: tuple[str, ...] | list[str] = ()
    """Those that hold the version; of an abort, those that were to."""
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why, for each replica that a quorum went on without."""
    digest: str = ""
    """Hexadecimal digest of the version: the sum over the targets of one replica."""
    digest_ok: bool = False
    """True when every replica measured that digest in live memory before it served."""
    transports: tuple[str, ...] | list[str] = ()
    """UCX transports that moved the bytes, of all trainer ranks."""
    transport_proof: str = ""
    """How that is known: `ucx` from UCX's own choice of protocol, `exclusion` since UCX_TLS leaves one; empty: not proved."""
    finished_at: float = 0.0
    """Seconds since the Unix epoch, by the ledger's clock."""

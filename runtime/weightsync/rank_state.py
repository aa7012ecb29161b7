"""What an engine rank holds, as its receiver keeps it, and as it tells the replica that it belongs to. Plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsync import verify


@dataclass(frozen=True, kw_only=True)
class Held:
    """A version whose bytes were measured in live memory."""

    epoch: int
    version: int
    digests: Mapping[str, int]
    """Digest by name of each target that was measured: all of them, or those that the push chose."""
    replayed: Mapping[str, int] = field(default_factory=dict)
    """Digest of each live tensor that a replay made of targets; compared with this rank's own memory only."""

    @property
    def order(self) -> tuple[int, int]:
        return (self.epoch, self.version)

    @property
    def digest(self) -> str:
        return verify.to_hex(sum(self.digests.values()))


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the receiver tells the replica it belongs to; picklable, since it crosses vLLM's RPC."""

    rank: int
    incarnation: str
    layout_digest: str
    state: str
    epoch: int
    version: int
    seen_epoch: int
    digest: str
    reason: str
    torn: bool
    """Whether live memory is not what any version was, also while a push is open that repairs it."""
    push_id: str
    """The push that was opened last; empty before any."""
    copy_seconds: float
    """What the last commit took to copy, wait for the device included; 0 in place, where nothing is replayed."""
    received_bytes: int = 0
    """Payload that writers brought and this rank verified, since it began."""
    direct_bytes: int = 0
    """Payload of one push that lands where the engine computes with it, or is copied there as it is."""
    replayed_bytes: int = 0
    """Payload of one push that lands in load format, for the engine's loader to make modules of."""
    lends: bool = False
    """Whether its live memory can be lent to the same rank of another replica."""
